"""perf_analyzer may be given as a file where nothing can be fetched."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from perf_analyzer import PerfAnalyzerError, find_perf_analyzer
from triton_load import Load

SCRIPT = "#!/bin/sh\necho perf_analyzer 9.9.9\n"


@pytest.fixture(autouse=True)
def new_glibc_and_own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("perf_analyzer._glibc", lambda: (2, 40))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_given_binary_is_used_as_it_is(tmp_path: Path) -> None:
    binary = tmp_path / "perf_analyzer"
    binary.write_text(SCRIPT)
    binary.chmod(0o755)
    assert find_perf_analyzer(binary) == [str(binary)]


def test_a_given_wheel_is_unpacked_and_unpacked_anew_when_it_changes(tmp_path: Path) -> None:
    wheel = tmp_path / "perf_analyzer-9.9.9-py3-none-any.whl"
    for text in (SCRIPT, SCRIPT + "true\n"):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("perf_analyzer/bin/perf_analyzer", text)
        (binary,) = find_perf_analyzer(wheel)
        assert Path(binary).read_text() == text


@pytest.mark.parametrize("content", [None, b"not a wheel"])
def test_a_file_that_is_missing_or_no_wheel_is_named(tmp_path: Path, content: bytes | None) -> None:
    wheel = tmp_path / "perf_analyzer.whl"
    if content is not None:
        wheel.write_bytes(content)
    with pytest.raises(PerfAnalyzerError, match=r"perf_analyzer\.whl"):
        find_perf_analyzer(wheel)


def test_a_given_binary_that_does_not_start_is_not_exchanged_for_another(tmp_path: Path) -> None:
    broken = tmp_path / "perf_analyzer"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(PerfAnalyzerError, match="does not start; give another"):
        find_perf_analyzer(broken)


def test_prompts_for_a_random_model_are_words_of_its_vocabulary_and_all_differ() -> None:
    load = Load(("",), "local", prompt_words=6, max_tokens=4, vocab_size=1024)
    prompts = [load.prompt(index) for index in range(300)]
    words = {int(word.removeprefix("w")) for prompt in prompts for word in prompt.split()}
    assert len(set(prompts)) == 300
    assert min(words) >= 2
    assert max(words) < 1024
