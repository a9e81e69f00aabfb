"""Both kinds of engine, with fakes inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from fakes_engine import FakeEngineBuilder
from recording_owner import RecordingOwner

from lorax_backend.engine.client import EngineClientBase
from lorax_backend.engine.loop import InProcessEngine
from lorax_backend.engine.process import ProcessEngine

Start = Callable[..., tuple[EngineClientBase, RecordingOwner]]


Start = Callable[..., tuple[EngineClientBase, RecordingOwner]]


@pytest.fixture(params=[InProcessEngine, ProcessEngine])
def engine_class(request: pytest.FixtureRequest) -> type[Any]:
    return request.param


@pytest.fixture
def start(engine_class: type[Any]) -> Iterator[Start]:
    """Start an engine of fakes; the options are those of FakeEngineBuilder."""
    engines: list[EngineClientBase] = []

    def start_engine(
        owner: RecordingOwner | None = None, **options: Any
    ) -> tuple[EngineClientBase, RecordingOwner]:
        owner = owner or RecordingOwner()
        engines.append(engine_class(replace(FakeEngineBuilder(), **options)))
        engines[-1].start(owner)
        return engines[-1], owner

    yield start_engine
    for engine in engines:
        engine.stop()
