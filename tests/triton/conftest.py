"""A real tritonserver with a tiny random model, and callers of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from triton_calls import TritonCaller

from lorax_backend.server.installation import Installation
from lorax_backend.server.launch import ServerOptions, TritonServer
from lorax_backend.server.repository import write_repository

MAX_TOTAL_TOKENS = 4096
READY_TIMEOUT_S = 120.0
# What every test server has in common: small, on the CPU, and quick to start and stop.
COMMON_OPTIONS = {"device": "cpu", "max_total_tokens": str(MAX_TOTAL_TOKENS), "num_blocks": "1200"}

_running: list[TritonServer] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show the servers' logs with a failure, and only then."""
    report = yield
    if report.failed:
        for server in _running:
            report.sections.append((f"tritonserver {server.grpc_address}", server.log_tail(60)))
    return report


StartServer = Callable[..., TritonServer]


class _Starter:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: list[TritonServer] = []

    def __call__(
        self,
        config: Mapping[str, str],
        repository: Path | None = None,
        installation: Installation | None = None,
        **options: Any,
    ) -> TritonServer:
        if repository is None:
            repository = write_repository(
                self._folder / f"repository-{len(self._servers)}", COMMON_OPTIONS | dict(config)
            )
        server = TritonServer(repository, ServerOptions(**options))
        self._servers.append(server)
        _running.append(server)
        server.start(installation)
        server.wait_ready(READY_TIMEOUT_S)
        return server

    def stop_all(self) -> None:
        for server in self._servers:
            server.terminate(timeout=20.0)
            _running.remove(server)


@pytest.fixture(scope="session")
def tiny_llama(tiny_model_path: Callable[..., Path]) -> Path:
    return tiny_model_path("llama", max_position_embeddings=MAX_TOTAL_TOKENS)


@pytest.fixture(scope="session")
def tiny_adapters(tiny_llama: Path, tiny_adapter: Callable[..., Path]) -> list[str]:
    """Folders of three adapters of different rank and targets for the tiny model."""
    everything = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    return [
        str(tiny_adapter(tiny_llama, rank=4, seed=1)),
        str(tiny_adapter(tiny_llama, rank=8, targets=everything, seed=2)),
        str(tiny_adapter(tiny_llama, rank=16, targets=("o_proj", "down_proj"), seed=3)),
    ]


@pytest.fixture(scope="session")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The server most tests share: all three models, engine on a thread of the stub."""
    starter = _Starter(tmp_path_factory.mktemp("triton"))
    config = {"model_id": str(tiny_llama), "default_adapter_source": "local", "engine_process": "false"}
    try:
        yield starter(config)
    finally:
        starter.stop_all()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """`start_server(config, repository=None, installation=None, **ServerOptions)` -> a server of this test's own."""
    starter = _Starter(tmp_path)
    yield starter
    starter.stop_all()


@pytest.fixture
def connect() -> Iterator[Callable[[TritonServer], TritonCaller]]:
    """`connect(server)` -> a caller that is closed at the end of the test."""
    callers: list[TritonCaller] = []

    def make(server: TritonServer) -> TritonCaller:
        callers.append(TritonCaller(server.grpc_address))
        return callers[-1]

    yield make
    for caller in callers:
        caller.close()


@pytest.fixture
def caller(server: TritonServer, connect: Callable[[TritonServer], TritonCaller]) -> TritonCaller:
    """A caller of the shared server."""
    return connect(server)


@pytest.fixture
def start_tiny(
    start_server: StartServer, tiny_llama: Path, connect: Callable[[TritonServer], TritonCaller]
) -> Callable[..., tuple[TritonServer, TritonCaller]]:
    """`start_tiny(**config)` -> a server of this test's own with only `lorax` and the tiny model, and a caller."""

    def start(arguments: Mapping[str, Any] | None = None, **config: str) -> tuple[TritonServer, TritonCaller]:
        base = {"model_id": str(tiny_llama), "default_adapter_source": "local"}
        server = start_server(base | config, models=("lorax",), **(arguments or {}))
        return server, connect(server)

    return start
