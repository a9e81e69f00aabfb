"""A real tritonserver with a tiny model, a gateway process in front of it, and callers of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes_gateway import FakeTriton, StartGateway
from gateway_calls import GatewayCaller, ThreadedGateway
from triton_calls import TritonCaller

from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.process import GatewayProcess
from lorax_backend.server.launch import ServerOptions, TritonServer
from lorax_backend.server.repository import write_repository

READY_TIMEOUT_S = 120.0
ADMIN_KEY = "the-server-s-own-key"

_running: list[TritonServer] = []
_gateway_log: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show the logs with a failure, and only then."""
    report = yield
    if report.failed:
        for server in _running:
            report.sections.append((f"tritonserver {server.grpc_address}", server.log_tail(40)))
        report.sections.append(("gateway", "\n".join(_gateway_log[-40:])))
    return report


@pytest.fixture(scope="session")
def gateway_model(tiny_model_path: Callable[..., Path]) -> Path:
    return tiny_model_path("llama", max_position_embeddings=4096)


@pytest.fixture(scope="session")
def gateway_adapter(gateway_model: Path, tiny_adapter: Callable[..., Path]) -> str:
    """Folder of an adapter of the tiny model."""
    return str(tiny_adapter(gateway_model, rank=4, seed=1))


@pytest.fixture(scope="session")
def start_triton(
    gateway_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., TritonServer]]:
    """`start_triton(**config)` -> a tritonserver with the tiny model, stopped at the end of the session."""
    started: list[TritonServer] = []

    def start(**config: str) -> TritonServer:
        values = {
            "device": "cpu", "max_total_tokens": "4096", "num_blocks": "1200", "model_id": str(gateway_model),
            "default_adapter_source": "local", "engine_process": "false",
        }  # fmt: skip
        repository = write_repository(tmp_path_factory.mktemp("triton") / "repository", values | config)
        server = TritonServer(repository, ServerOptions(models=("lorax",)))
        started.append(server)
        _running.append(server)
        server.start()
        server.wait_ready(READY_TIMEOUT_S)
        return server

    yield start
    for server in started:
        server.terminate(timeout=20.0)
        _running.remove(server)


@pytest.fixture(scope="session")
def triton(start_triton: Callable[..., TritonServer]) -> TritonServer:
    """The server most tests share."""
    return start_triton(admin_api_key=ADMIN_KEY)


@pytest.fixture(scope="session")
def triton_caller(triton: TritonServer) -> Iterator[TritonCaller]:
    """Asks the shared server itself, past the gateway."""
    caller = TritonCaller(triton.grpc_address)
    yield caller
    caller.close()


@pytest.fixture
def config_for() -> Callable[..., GatewayConfig]:
    """`config_for(*servers, **options)` -> options of a gateway in front of these servers."""

    def make(*servers: TritonServer, **options: Any) -> GatewayConfig:
        return GatewayConfig(
            triton_urls=tuple(server.grpc_address for server in servers),
            metrics_urls=tuple(f"http://{server.metrics_address}/metrics" for server in servers),
            host="127.0.0.1",
            port=0,
            **options,
        )

    return make


@pytest.fixture(scope="session")
def gateway(triton: TritonServer) -> Iterator[GatewayCaller]:
    """A caller of the gateway most tests share: a process of its own in front of the shared server."""
    config = GatewayConfig(
        triton_urls=(triton.grpc_address,),
        metrics_urls=(f"http://{triton.metrics_address}/metrics",),
        host="127.0.0.1",
        port=0,
        body_timeout=1.0,
    )
    process = GatewayProcess(config, _gateway_log.append, lambda: _gateway_log.append("it died"))
    process.start()
    host, _, port = process.address.rpartition("://")[2].rpartition(":")
    yield GatewayCaller(host, int(port))
    process.drain(20.0)
    assert "it died" not in _gateway_log


@pytest.fixture
def start() -> Iterator[StartGateway]:
    """`start(*servers, **options)` -> a caller of a gateway in front of them."""
    running: list[ThreadedGateway] = []

    def make(*servers: FakeTriton, **options: Any) -> GatewayCaller:
        values: dict[str, Any] = {"host": "127.0.0.1", "health_interval": 0.05} | options
        config = GatewayConfig(triton_urls=tuple(server.name for server in servers), **values)
        gateway = ThreadedGateway(config, {server.name: server.transport for server in servers})
        caller = gateway.__enter__()
        running.append(gateway)
        return caller

    yield make
    for gateway in running:
        gateway.__exit__()
