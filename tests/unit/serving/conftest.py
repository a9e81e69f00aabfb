"""Fixtures of the serving tests: tiny tokenizers, and services around a fake engine that are stopped again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes_serving import FakeEngine

from lorax_backend.config import ServerConfig
from lorax_backend.serving.service import GenerationService
from lorax_backend.serving.tokenizer import TokenizerPool

MakeService = Callable[..., GenerationService]


@pytest.fixture(scope="session")
def byte_level(tiny_model_path: Callable[..., Path]) -> TokenizerPool:
    return TokenizerPool(tiny_model_path(tokenizer="byte_level"))


@pytest.fixture(scope="session")
def byte_fallback(tiny_model_path: Callable[..., Path]) -> TokenizerPool:
    return TokenizerPool(tiny_model_path(tokenizer="byte_fallback"))


@pytest.fixture
def make_service(byte_level: TokenizerPool) -> Iterator[MakeService]:
    """`make_service(engine, **config)` -> a started service."""
    services: list[GenerationService] = []

    def make(engine: FakeEngine, **config: Any) -> GenerationService:
        settings = {"cancel_poll_interval_s": 0.005} | config
        service = GenerationService(engine, byte_level, ServerConfig(**settings))
        services.append(service)
        service.start()
        return service

    yield make
    for service in services:
        service.stop()
        assert service.num_live == 0
