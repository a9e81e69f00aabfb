"""`lorax-triton adapters`: what each word asks of the server, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_triton_server import Call, FakeTriton, error_json, error_response, response

from lorax_backend.cli.adapters import adapters_table, age, read_targets
from lorax_backend.cli.main import main

LISTED = [
    {
        "id": "acme/pirate",
        "source": "hub",
        "revision": None,
        "status": "on_device",
        "tier": "device",
        "rank": 16,
        "bytes": 3 * 2**20,
        "users": 2,
        "hits": 7,
        "last_used_s": 90.0,
        "pinned": "device",
        "error": None,
    },
    {"id": "/a/b", "source": "local", "status": "failed", "tier": None, "error": "no such folder"},
]
TABLE = """\
ADAPTER      SOURCE  STATUS     TIER    RANK  SIZE     USERS  HITS  LAST USED  PINNED
acme/pirate  hub     on_device  device  16    3.0 MiB  2      7     90 s ago   device
/a/b         local   failed
  no such folder"""


class Server:
    """Records commands and answers each as `answers` says."""

    def __init__(self) -> None:
        self.commands: list[dict[str, Any]] = []
        self.answers: dict[str, Any] = {"adapters": {"adapters": LISTED}}
        self.fake = FakeTriton(self._script)

    def _script(self, call: Call) -> Iterator[Any]:
        command = json.loads(call.inputs["control"][0])
        self.commands.append(command)
        found = self.answers.get(
            command["command"], {"status": "ready", "id": "a", "tier": "device", "bytes": 1024}
        )
        yield error_response(found) if isinstance(found, str) else response(True, details=[json.dumps(found)])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("LORAX_ADMIN_KEY", raising=False)
    server = Server()
    yield server
    server.fake.stop()


def run(server: Server, *words: str) -> int:
    return main(["adapters", *words, "--url", server.fake.url])


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["pin", "a", "--adapter-source", "hub"], {"command": "adapter_pin", "adapter_source": "hub"}),
        (["unpin", "a", "--revision", "v1"], {"command": "adapter_unpin", "revision": "v1"}),
        (["unload", "a"], {"command": "adapter_unload"}),
        (["reload", "a", "--api-token", "t"], {"command": "adapter_reload", "api_token": "t"}),
        (["purge", "a"], {"command": "adapter_purge"}),
        (
            ["preload", "a", "--tier", "host", "--pin", "--no-wait"],
            {"command": "adapter_preload", "tier": "host", "pin": True},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_word_sends_its_command_and_prints_a_line(
    server: Server, capsys: pytest.CaptureFixture[str], words: list[str], command: dict[str, Any]
) -> None:
    assert run(server, *words, "--admin-key", "k") == 0
    assert server.commands == [{"adapter_id": "a", "admin_key": "k"} | command]
    assert capsys.readouterr().out == "a: ready, tier device, bytes 1.0 KiB\n"


def test_list_prints_a_table_or_json(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "list") == 0
    assert capsys.readouterr().out == TABLE + "\n"
    assert run(server, "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == LISTED
    server.answers["adapters"] = {"adapters": []}
    assert run(server, "list") == 0
    assert capsys.readouterr().out == "no adapters\n"


def test_purge_wants_an_adapter_or_all(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "purge", "--all") == 0
    assert server.commands == [{"command": "adapter_purge", "all": True}]
    with pytest.raises(SystemExit):
        run(server, "purge")
    assert "required" in capsys.readouterr().err


def test_aliases_are_set_listed_and_deleted(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    targets = [{"adapter_id": "a", "weight": 0.9}, {"adapter_id": "b", "revision": "v2", "weight": 0.1}]
    server.answers |= {
        "alias_set": {"alias": "x", "targets": targets},
        "aliases": {"aliases": {"x": targets, "y": targets[1:]}},
        "alias_delete": {"deleted": True},
    }
    assert main(["adapters", "alias", "set", "x", "a=0.9", "b@v2=0.1", "--url", server.fake.url]) == 0
    assert server.commands[-1]["targets"] == [
        {"adapter_id": "a", "weight": 0.9},
        {"adapter_id": "b@v2", "weight": 0.1},
    ]
    assert main(["adapters", "alias", "list", "--url", server.fake.url]) == 0
    assert main(["adapters", "alias", "delete", "x", "--url", server.fake.url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "x  a (0.9), b@v2 (0.1)",
        "x  a (0.9), b@v2 (0.1)",
        "y  b@v2",
        "x: deleted",
    ]


def test_a_refusal_is_one_line_and_a_failure(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["adapter_pin"] = error_json("control.admin_key: is missing", "unauthorized", 401)
    assert run(server, "pin", "a") == 1
    assert capsys.readouterr().err == "lorax-triton: control.admin_key: is missing\n"
    assert main(["adapters", "list", "--url", "http://x"]) == 1
    assert "grpc://" in capsys.readouterr().err


def test_targets_are_adapters_with_or_without_weights() -> None:
    assert read_targets(["a"]) == "a"
    assert read_targets(["a=2", "b"]) == {"a": 2.0, "b": 1.0}
    assert read_targets(["hf://o/a=b"]) == "hf://o/a=b"
    with pytest.raises(ValueError, match="a is named twice"):
        read_targets(["a", "a=2"])


def test_ages_are_words() -> None:
    assert [age(seconds) for seconds in (1, 119, 600, 7200, 400000)] == [
        "1 s",
        "119 s",
        "10 min",
        "2 h",
        "5 days",
    ]


def test_columns_that_no_adapter_has_are_left_out() -> None:
    assert (
        adapters_table([{"id": "a", "status": "on_host", "users": 0}]).splitlines()[0]
        == "ADAPTER  STATUS   USERS"
    )
