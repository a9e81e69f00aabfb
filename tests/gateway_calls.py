"""HTTP calls to a gateway, with the standard library alone so that every byte is in the test's hands."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from lorax_backend.gateway.app import create_app
from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.server import server_options
from lorax_triton._transport import AsyncTransport

TIMEOUT_S = 60.0


@dataclass
class HttpAnswer:
    """A whole answer; header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream; comments are left out."""
        blocks = self.body.decode().split("\n\n")
        assert blocks[-1] == "", "a stream ends with an empty line"
        assert all(block.startswith(("data:", ":")) and "\n" not in block for block in blocks[:-1])
        return [json.loads(block[5:]) for block in blocks[:-1] if block.startswith("data:")]


@dataclass
class GatewayCaller:
    """Calls one gateway; `base` are headers of every call."""

    host: str
    port: int
    base: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> HttpAnswer:
        """A body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_S)
        try:
            sent = dict(self.base)
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            if body is not None:
                sent["content-type"] = "application/json"
            connection.request(method, path, body, sent | dict(headers or {}))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return HttpAnswer(response.status, names, response.read())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> HttpAnswer:
        return self.call("GET", path, headers=headers)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> HttpAnswer:
        return self.call("POST", path, body, headers)

    def generate(self, inputs: str = "hello there", path: str = "/generate", **parameters: Any) -> HttpAnswer:
        return self.post(path, {"inputs": inputs, "parameters": parameters})

    @contextlib.contextmanager
    def open_stream(
        self, inputs: str = "hello", headers: Mapping[str, str] | None = None, **parameters: Any
    ) -> Iterator[http.client.HTTPResponse]:
        """A stream being read; leaving the block closes the connection, whatever is left of it."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_S)
        try:
            body = json.dumps({"inputs": inputs, "parameters": parameters})
            connection.request(
                "POST", "/generate_stream", body, {"content-type": "application/json", **(headers or {})}
            )
            yield connection.getresponse()
        finally:
            connection.close()

    def raw(self, data: bytes) -> socket.socket:
        """A connection on which `data` has been sent."""
        connection = socket.create_connection((self.host, self.port), TIMEOUT_S)
        connection.sendall(data)
        return connection


def read_event(stream: http.client.HTTPResponse) -> Any:
    """The next event of a stream, or None at its end."""
    while True:
        line = stream.readline()
        if not line:
            return None
        if line.startswith(b"data:"):
            return json.loads(line[5:])


def wait_until(condition: Callable[[], bool], timeout: float = TIMEOUT_S, pause: float = 0.01) -> float:
    """Ask until `condition` holds; the seconds it took."""
    started = time.monotonic()
    event = threading.Event()
    while not condition():
        assert time.monotonic() - started < timeout, "it never came true"
        event.wait(pause)
    return time.monotonic() - started


class ThreadedGateway:
    """A gateway served by uvicorn on a thread of this process, for tests that look or reach inside."""

    def __init__(self, config: GatewayConfig, transports: Mapping[str, AsyncTransport] | None = None) -> None:
        self.app = create_app(config, transports=transports)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._server = uvicorn.Server(server_options(config, self.app))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> GatewayCaller:
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive())
        assert self._server.started
        return GatewayCaller("127.0.0.1", self._socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(TIMEOUT_S)
        self._socket.close()
        assert not self._thread.is_alive()
