"""Adapters administered, and a chat held, from the command line and the client, against a real tritonserver."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal import Terminal
from triton_calls import TritonCaller

from lorax_backend.cli.main import main
from lorax_backend.server.launch import TritonServer
from lorax_triton import AdapterError, AdapterNotFoundError, Client, OverloadedError, UnauthorizedError

pytestmark = pytest.mark.triton

PROMPT = "hello world this is"
KEY = "open sesame"


@pytest.fixture
def server(start_tiny: Callable[..., tuple[TritonServer, TritonCaller]]) -> TritonServer:
    server, _ = start_tiny(admin_api_key=KEY, engine_process="false")
    return server


@pytest.fixture
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_address, timeout=60, admin_key=KEY) as client:
        yield client


def row_of(client: Client, adapter_id: str) -> dict[str, object]:
    return next(row for row in client.adapters.list() if row["id"] == adapter_id and not row["retired"])


def test_adapters_are_preloaded_pinned_reloaded_named_and_unloaded(
    server: TritonServer, client: Client, tiny_adapters: list[str], tmp_path: Path
) -> None:
    first, second, third = tiny_adapters
    with Client(server.grpc_address, admin_key="wrong") as stranger, pytest.raises(UnauthorizedError):
        stranger.adapters.preload(first)

    assert client.adapters.preload(first, pin=True)["status"] == "ready"
    assert (row_of(client, first)["tier"], row_of(client, first)["pinned"]) == ("device", "device")
    assert client.adapters.preload(second, tier="host")["tier"] in ("host", "device")
    with pytest.raises(AdapterNotFoundError, match="no/such"):
        client.adapters.preload("/no/such/adapter", timeout=20)

    changing = tmp_path / "changing"
    shutil.copytree(first, changing)
    before = client.generate(PROMPT, str(changing), max_new_tokens=12).generated_text
    for file in Path(third).iterdir():
        shutil.copy(file, changing)
    assert client.adapters.reload(str(changing))["status"] == "ready"
    after = client.generate(PROMPT, str(changing), max_new_tokens=12).generated_text
    assert before == client.generate(PROMPT, first, max_new_tokens=12).generated_text
    assert after == client.generate(PROMPT, third, max_new_tokens=12).generated_text

    (changing / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterError):
        client.adapters.reload(str(changing))
    assert client.generate(PROMPT, str(changing), max_new_tokens=12).generated_text == after
    assert client.adapters.preload(second, tier="disk")["status"] == "ready"

    client.adapters.set_alias("support", third)
    assert [target["adapter_id"] for target in client.adapters.aliases()["support"]] == [third]
    assert client.generate(PROMPT, "support", max_new_tokens=12).generated_text == after
    assert client.adapters.delete_alias("support") is True
    assert client.adapters.delete_alias("support") is False

    client.adapters.unpin(first)
    assert row_of(client, first)["pinned"] is None
    client.adapters.unload(first)
    assert all(row["retired"] for row in client.adapters.list() if row["id"] == first)
    assert client.adapters.purge()["status"] == "purging"


def test_the_command_line_does_the_same(
    server: TritonServer,
    tiny_adapters: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = ["--url", server.grpc_address]
    assert main(["adapters", "preload", tiny_adapters[0], *where]) == 1
    assert "admin_key" in capsys.readouterr().err
    monkeypatch.setenv("LORAX_ADMIN_KEY", KEY)
    assert main(["adapters", "preload", tiny_adapters[0], "--pin", *where]) == 0
    assert capsys.readouterr().out.startswith(f"{tiny_adapters[0]}: ready")
    assert main(["adapters", "alias", "set", "short", tiny_adapters[0], *where]) == 0
    capsys.readouterr()
    assert main(["adapters", "list", *where]) == 0
    table = capsys.readouterr().out
    assert tiny_adapters[0] in table
    assert "PINNED" in table

    assert main(["chat", *where, "--adapter", "/no/such/adapter", "--adapter-source", "local"]) == 1
    assert "--adapter /no/such/adapter: " in capsys.readouterr().err, "told before a message is read"
    with Terminal(["chat", *where, "--adapter", "short", "--max-new-tokens", "8"]) as terminal:
        terminal.expect("short> ")
        terminal.type("hello\n")
        terminal.expect("tokens, first after")
        terminal.expect("short> ")
        terminal.type("/adapter -\n")
        terminal.expect("base> ")
        terminal.type("hello again\n")
        terminal.expect("[base: ")
        terminal.type("/quit\n")
        assert terminal.wait() == 0
    done = subprocess.run(
        [sys.executable, "-m", "lorax_backend.cli", "chat", *where, "--max-new-tokens", "4"],
        input="hello\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "4 tokens, first after" in done.stderr


def test_a_request_that_waits_too_long_in_the_queue_is_refused_as_overloaded(
    start_tiny: Callable[..., tuple[TritonServer, TritonCaller]],
) -> None:
    server, _ = start_tiny(max_batch_size="1", engine_process="false")
    with (
        Client(server.grpc_address, timeout=60) as client,
        client.generate_stream(PROMPT, max_new_tokens=4000, ignore_eos_token=True) as running,
    ):
        next(running)
        with pytest.raises(OverloadedError, match="queue"):
            client.generate(PROMPT, max_new_tokens=1, queue_timeout=0.2)
        next(running)
