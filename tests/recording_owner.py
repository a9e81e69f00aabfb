"""An owner of an engine that remembers all it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fakes_engine import FakeProvider, expected_answer

from lorax_backend.types import EngineRequest, EngineStats, TokenOutput

_TIMEOUT_S = 60.0


@dataclass
class RecordingOwner:
    """EngineEvents that remember everything and let a test wait for it."""

    outputs: list[TokenOutput] = field(default_factory=list)
    stats: list[EngineStats] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        self._note(lambda: self.outputs.extend(outputs))

    def on_stats(self, stats: EngineStats) -> None:
        self._note(lambda: self.stats.append(stats))

    def on_dead(self, reason: str) -> None:
        self._note(lambda: self.deaths.append(reason))

    def wait(self, condition: Callable[[], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, _TIMEOUT_S), (
                self.outputs[-5:],
                self.stats[-1:],
                self.deaths,
            )

    def of(self, handle: int) -> list[TokenOutput]:
        return [output for output in self.outputs if output.handle == handle]

    def is_over(self, handle: int) -> bool:
        return any(output.finish_reason or output.error for output in self.of(handle))

    def assert_answered(self, request: EngineRequest) -> None:
        key = FakeProvider.key(request.adapter.id) if request.adapter else ""
        outputs = self.of(request.handle)
        assert ([output.token_id for output in outputs], outputs[-1].finish_reason) == expected_answer(
            request, key
        )

    def _note(self, change: Callable[[], None]) -> None:
        with self.changed:
            self.threads.add(threading.get_ident())
            change()
            self.changed.notify_all()
