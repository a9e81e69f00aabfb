"""Reasons found in tritonserver's log, and the choice of a tritonserver."""

from __future__ import annotations

import sys

import pytest

from lorax_backend.server import installation
from lorax_backend.server.failure import failure_reason
from lorax_backend.server.installation import Installation, ServerNotFoundError, find_tritonserver

QUOTED = [
    'I1121 23:46:50.1 9626 pb_stub.cc:366] "Failed to initialize Python stub: TritonModelException: no such folder"',
    "E1121 23:46:50.6 9626 model_lifecycle.cc:642] \"failed to load 'lorax' version 1: Internal: "
    'TritonModelException: model_id: no such folder\\nsecond line\\n\\nAt:\\n  /x/model.py(7): initialize\\n"',
    "I1121 23:46:50.6 9626 model_lifecycle.cc:777] \"failed to load 'lorax'\"",
    "error: creating server: Internal - failed to load all models",
]
PLAIN = [
    "2025-03-01T10:00:00Z 77 E model_lifecycle.cc:642] failed to load 'lorax' version 1: Internal: "
    "TritonModelException: model_id: no such folder",
    "second line",
    "",
    "At:",
    "  /x/model.py(7): initialize",
    "",
    "2025-03-01T10:00:00Z 77 I model_lifecycle.cc:777] failed to load 'lorax'",
]


@pytest.mark.parametrize("lines", [QUOTED, PLAIN], ids=["escaped on one line", "over several lines"])
def test_a_models_own_error_is_found_in_either_log_format(lines):
    assert failure_reason(lines) == "model_id: no such folder\nsecond line"


def test_each_failed_model_is_named_when_there_are_several():
    other = (
        QUOTED[1]
        .replace("'lorax'", "'lorax_tokenizer'")
        .replace("no such folder\\nsecond line", "no tokenizer")
    )

    reason = failure_reason([*QUOTED, other])

    assert "lorax: model_id: no such folder" in reason
    assert "lorax_tokenizer: model_id: no tokenizer" in reason


def test_without_a_failed_model_the_errors_are_the_reason():
    lines = ['I1121 1 2 a.cc:1] "fine"', 'E1121 1 2 a.cc:1] "port 8001 in use"', "error: cannot start"]

    assert failure_reason(lines) == "port 8001 in use\nerror: cannot start"


def test_a_server_that_says_nothing_has_a_reason_too():
    assert failure_reason([])


def test_a_server_on_path_is_preferred_and_gets_this_interpreter_first(tmp_path, monkeypatch):
    program = tmp_path / "tritonserver"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    found = find_tritonserver()
    arguments, env = found.prepare(tmp_path / "private")

    assert found == Installation(program)
    assert arguments == []
    assert env["PATH"].split(":") == [str(installation.Path(sys.executable).parent), str(tmp_path)]


def test_the_packaged_server_is_linked_into_a_private_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_tritonserver()

    arguments, env = found.prepare(tmp_path)

    python_backend = tmp_path / "backends" / "python"
    assert arguments == [f"--backend-directory={tmp_path / 'backends'}"]
    assert (python_backend / "triton_python_backend_stub").resolve().parent.name == "{}.{}".format(
        *sys.version_info
    )
    assert (python_backend / "triton_python_backend_utils.py").is_symlink()
    assert "nvidia_pytriton.libs" in env["LD_LIBRARY_PATH"]


def test_a_python_without_a_stub_is_told_which_ones_have_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installation.sysconfig, "get_python_version", lambda: "3.99")

    with pytest.raises(ServerNotFoundError, match=r"no stub for Python 3\.99; use one of .*3\.11"):
        find_tritonserver()


def test_no_server_at_all_is_an_error_that_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installation, "_packaged", lambda: None)

    with pytest.raises(ServerNotFoundError, match="pip install"):
        find_tritonserver()
