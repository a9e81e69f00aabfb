"""Fake servers for the client's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_triton_server import FakeTriton, Script


@pytest.fixture
def serve() -> Iterator[Callable[[Script], FakeTriton]]:
    """Starts a fake server that answers with the given script; all are stopped after the test."""
    servers: list[FakeTriton] = []

    def start(script: Script) -> FakeTriton:
        servers.append(FakeTriton(script))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
