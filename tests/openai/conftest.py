"""A real tritonserver with a tiny model and a gateway in front of it; the official package on both ways to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import lorax_triton
from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.process import GatewayProcess
from lorax_backend.server.launch import ServerOptions, TritonServer
from lorax_backend.server.repository import write_repository

READY_TIMEOUT_S = 120.0
ALIAS = "my-alias"
# An adapter's own, which says where it comes from.
ADAPTER_TEMPLATE = "{% for message in messages %}adapter:{{ message['content'] }};{% endfor %}"

_running: list[TritonServer] = []
_gateway_log: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever talks to a server starts a real one."""
    for item in items:
        if "start_ways" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.triton)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show the logs with a failure, and only then."""
    report = yield
    if report.failed:
        for server in _running:
            report.sections.append((f"tritonserver {server.grpc_address}", server.log_tail(40)))
        report.sections.append(("gateway", "\n".join(_gateway_log[-40:])))
    return report


class Ways:
    """The two ways to one server: `http`, the gateway's address, and `grpc`, the server's."""

    def __init__(self, server: TritonServer, gateway: GatewayProcess) -> None:
        self.http = f"{gateway.address}/v1"
        self.grpc = server.grpc_address


@pytest.fixture(scope="session")
def start_ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ways]]:
    """`start_ways(**config)` -> a tritonserver and a gateway, stopped at the end of the session."""
    servers: list[TritonServer] = []
    gateways: list[GatewayProcess] = []

    def start(**config: str) -> Ways:
        values = {"device": "cpu", "default_adapter_source": "local", "engine_process": "false"}
        repository = write_repository(tmp_path_factory.mktemp("openai") / "repository", values | config)
        server = TritonServer(repository, ServerOptions(models=("lorax",)))
        servers.append(server)
        _running.append(server)
        server.start()
        server.wait_ready(READY_TIMEOUT_S)
        gateway_config = GatewayConfig(
            triton_urls=(server.grpc_address,),
            metrics_urls=(f"http://{server.metrics_address}/metrics",),
            host="127.0.0.1",
            port=0,
        )
        gateway = GatewayProcess(gateway_config, _gateway_log.append, lambda: None)
        gateways.append(gateway)
        gateway.start()
        return Ways(server, gateway)

    yield start
    for gateway in gateways:
        gateway.drain(20.0)
    for server in servers:
        server.terminate(timeout=20.0)
        _running.remove(server)


@pytest.fixture(scope="session")
def tiny_model(tiny_model_path: Callable[..., Path]) -> str:
    return str(tiny_model_path("llama", max_position_embeddings=4096))


@pytest.fixture(scope="session")
def adapter(tiny_model: str, tiny_adapter: Callable[..., Path]) -> str:
    """Folder of an adapter of the tiny model."""
    return str(tiny_adapter(Path(tiny_model), rank=8, targets=("q_proj", "o_proj", "lm_head"), seed=5))


@pytest.fixture(scope="session")
def templated_adapter(tiny_model: str, tiny_adapter: Callable[..., Path]) -> str:
    """Folder of an adapter that brings a chat template along."""
    folder = tiny_adapter(Path(tiny_model), rank=4, seed=6)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": ADAPTER_TEMPLATE}))
    return str(folder)


@pytest.fixture(scope="session")
def ways(start_ways: Callable[..., Ways], tiny_model: str, adapter: str) -> Ways:
    """The server that most tests share."""
    return start_ways(
        model_id=tiny_model,
        max_total_tokens="2048",
        num_blocks="1000",
        adapter_aliases=json.dumps({ALIAS: adapter}),
    )


@pytest.fixture(scope="session", params=["http", "grpc"])
def client(request: pytest.FixtureRequest, ways: Ways) -> Iterator[openai.OpenAI]:
    """The official client, over HTTP and over gRPC."""
    if request.param == "http":
        made = openai.OpenAI(base_url=ways.http, api_key="EMPTY", max_retries=0)
    else:
        made = lorax_triton.OpenAI(base_url=ways.grpc, max_retries=0)
    with made:
        yield made


@pytest.fixture(scope="session")
def http_client(ways: Ways) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=ways.http, api_key="EMPTY", max_retries=0) as made:
        yield made


@pytest.fixture
def shim(ways: Ways) -> Iterator[lorax_triton.OpenAI]:
    with lorax_triton.OpenAI(base_url=ways.grpc, max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def native(ways: Ways) -> Iterator[lorax_triton.Client]:
    with lorax_triton.Client(ways.grpc) as made:
        yield made
