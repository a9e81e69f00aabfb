"""`lorax-triton serve` as a process of its own, with a tiny model and a real tritonserver."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorax_backend.cli.main import main
from lorax_backend.server.processes import free_ports, stubs

pytestmark = [pytest.mark.triton, pytest.mark.slow]
TIMEOUT_S = 120.0
READY = "Stop it with Ctrl-C."


class ServeProcess:
    """A running `lorax-triton serve`, and what it has printed."""

    def __init__(self, *flags: str) -> None:
        self.http_port, grpc_port, metrics_port, self.gateway_port = free_ports(4, "127.0.0.1")
        ports = ["--triton-http-port", "--grpc-port", "--metrics-port", "--port"]
        numbers = [self.http_port, grpc_port, metrics_port, self.gateway_port]
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "lorax_backend.cli", "serve", "--hostname", "127.0.0.1"),
                *(f"{flag}={number}" for flag, number in zip(ports, numbers, strict=True)),
                *("--num-blocks=64", "--adapter-pages=8", *flags),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def end(self) -> None:
        self.process.kill()
        self.wait()
        self._reader.join(TIMEOUT_S)

    def read_until(self, text: str | None) -> str:
        """All output up to a line that holds `text`, or to the end of it."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            line = self._queue.get(timeout=max(0.1, deadline - time.monotonic()))
            if line is None:
                assert text is None, f"{text!r} never came:\n{self.output}"
                return self.output
            self.lines.append(line)
            if text is not None and text in line:
                return self.output

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)


@pytest.fixture
def start_serve() -> Iterator[Callable[..., ServeProcess]]:
    started: list[ServeProcess] = []

    def start(*flags: str) -> ServeProcess:
        started.append(ServeProcess(*flags))
        return started[-1]

    yield start
    for serve in started:
        serve.end()


def tritonserver_of(pid: int) -> int:
    """The server that a `serve` process has started."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text().startswith("tritonserver"):
            return int(child)
    raise AssertionError("no tritonserver among the children")


def test_it_serves_says_so_and_lets_running_requests_finish(
    start_serve, tiny_model_path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = start_serve("--model-id", str(tiny_model_path()), "--max-total-tokens", "512")
    table = serve.read_until(READY)
    assert "is ready; the model loaded in" in table
    assert re.search(r"KV cache +64 blocks of 16 tokens", table)
    assert f"{serve.url}/v2/models/lorax/generate" in table

    assert main(["info", "--json", "--url", serve.url]) == 0
    info = json.loads(capsys.readouterr().out)["info"]
    assert (info["num_blocks"], info["max_total_tokens"]) == (64, 512)

    body = {"text_input": "hello", "max_tokens": 400, "stream": True, "return_token_ids": True}
    body["sampling_parameters"] = json.dumps({"ignore_eos_token": True})
    request = urllib.request.Request(
        f"{serve.url}/v2/models/lorax/generate_stream", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as stream:
        first = stream.readline()
        serve.process.send_signal(signal.SIGTERM)
        answers = [json.loads(line[5:]) for line in [first, *stream] if line.startswith(b"data:")]
    ids = [answer["token_ids"] for answer in answers if "token_ids" in answer]
    assert sum(len(value) if isinstance(value, list) else 1 for value in ids) == 400
    assert serve.wait() == 0
    assert serve.read_until(None).endswith("stopped")


def test_a_model_that_cannot_load_ends_it_with_one_readable_reason(
    start_serve, tiny_model_path, tmp_path
) -> None:
    for path in tiny_model_path().iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    config |= {"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    serve = start_serve("--model-id", str(tmp_path))
    assert serve.wait() == 1
    reason = serve.read_until(None).splitlines()[-1]
    assert reason.startswith("lorax-triton: the server did not start: ")
    assert "UnheardOfForCausalLM" in reason
    assert "Traceback" not in serve.output


def test_it_ends_with_an_error_when_the_models_process_is_killed(start_serve, tiny_model_path) -> None:
    serve = start_serve("--model-id", str(tiny_model_path()))
    serve.read_until(READY)
    for pid in stubs(tritonserver_of(serve.process.pid)):
        os.kill(pid, signal.SIGKILL)
    assert serve.wait() == 1
    assert "the server ended by itself" in serve.read_until(None)
