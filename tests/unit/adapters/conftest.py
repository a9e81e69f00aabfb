"""Base models of two shapes for adapters to fit, SmolLM2's and a tiny one, and a hub and an S3 to have them from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapter_files import SMOLLM2, TINY, Base, lora_config, lora_tensors, make_base, write_adapter
from hub_server import HubServer

if TYPE_CHECKING:
    from adapter_server import AdapterServer
    from s3_server import S3Server


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("smollm2"), SMOLLM2)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty hub that the hub source finds by HF_ENDPOINT, and no token in the environment."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LORAX_USE_GLOBAL_HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    from s3_server import S3Server  # moto takes its time

    with S3Server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An empty S3 that the source finds by S3_ENDPOINT_URL."""
    endpoints = ("R2_ACCOUNT_ID", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    for name in (*endpoints, "PREDIBASE_MODEL_BUCKET", "PREDIBASE_MODEL_FOLDER", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("S3_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3_server.reset()
    return s3_server


@pytest.fixture
def make_adapter(tmp_path: Path, tiny: Base) -> Callable[..., Path]:
    """`make_adapter(name, modules, rank, seed, tensors=..., **config changes)` -> folder of an adapter for `tiny`."""

    def make(
        name: str = "adapter",
        modules: tuple[str, ...] = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
        rank: int = 4,
        seed: int = 0,
        tensors: Mapping[str, torch.Tensor] | None = None,
        **changes: Any,
    ) -> Path:
        made = lora_tensors(tiny.targets, modules, rank, seed) if tensors is None else tensors
        return write_adapter(tmp_path / name, lora_config(modules, rank, **changes), made)

    return make


@pytest.fixture
def make_server(
    request: pytest.FixtureRequest, tiny: Base, tmp_path: Path
) -> Iterator[Callable[..., AdapterServer]]:
    """`make_server(**options)` -> a server with an empty disk cache, which the test's servers share."""
    from adapter_server import AdapterServer

    # A server closes before what it loads from, and finds it in the environment from the start.
    for name in ("hub", "s3"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
    servers: list[AdapterServer] = []

    def make(**options: Any) -> AdapterServer:
        servers.append(AdapterServer(tiny, tmp_path / "disk", **options))
        return servers[-1]

    yield make
    for server in servers:
        server.manager.close()
