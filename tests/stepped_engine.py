"""A real engine core, stepped on the test's thread, which counts what every step gave to whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorax_backend.config import ServerConfig
from lorax_backend.engine.build import build_engine
from lorax_backend.engine.core import EngineCore
from lorax_backend.types import AdapterRef, EngineRequest, SamplingParams

WAIT_S = 30.0
_STEP_S = 0.01
_MOMENT_S = 0.2


class SteppedEngine:
    """Runs a core as the engine's loop does, with a scheduler to which each step takes 10 ms. `tokens` and `errors`
    are by handle.

    `num_steps` counts the steps that gave somebody a token; `first_step` has, by handle, the one of its first.
    """

    def __init__(self, model_path: Path, **options: Any) -> None:
        config = ServerConfig(device="cpu", block_size=4, **options)
        built = build_engine(config, model_path, lambda line: None).core
        # The scheduler's bounds are in seconds: of steps, so that a busy machine changes nothing.
        self.core = EngineCore(built._runner, built.adapters, built._settings, lambda: self._now)
        self.tokens: dict[int, list[int]] = {}
        self.errors: dict[int, str] = {}
        self.first_step: dict[int, int] = {}
        self.num_steps = 0
        self._wanted: dict[int, int] = {}
        self._now = 0.0
        self._woken = threading.Event()
        self.core.adapters.set_wakeup(self._woken.set)

    @property
    def live(self) -> list[int]:
        """Handles of requests that are not over."""
        return list(self._wanted)

    def add(
        self, handle: int, ref: AdapterRef | None, count: int, prompt: tuple[int, ...] = (5, 6, 7, 8)
    ) -> None:
        self.tokens[handle] = []
        self._wanted[handle] = count
        self.core.add(EngineRequest(handle, list(prompt), SamplingParams(count), ref))
        self._woken.set()

    def step(self) -> set[int]:
        """Step once, after waiting for something to do; the handles that got a token, none of them two."""
        if not self.core.has_work:
            assert self._woken.wait(WAIT_S), "nothing happened"
        self._woken.clear()
        self._now += _STEP_S
        given: list[int] = []
        for output in self.core.step():
            if output.error is not None:
                self.errors[output.handle] = output.error["error_type"]
                del self._wanted[output.handle]
                continue
            assert output.token_id is not None
            self.tokens[output.handle].append(output.token_id)
            given.append(output.handle)
            self.first_step.setdefault(output.handle, self.num_steps)
            if len(self.tokens[output.handle]) == self._wanted[output.handle]:
                del self._wanted[output.handle]
        assert len(given) == len(set(given)), "a step is one token a stream"
        self.num_steps += bool(given)
        return set(given)

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.step()

    def finish(self) -> None:
        """Step until no request is left; then everything is accounted for."""
        self.until(lambda: not self._wanted)
        self.core.check_integrity()

    def wait_for_news(self) -> None:
        """Until the loader's threads have something to tell, or for a moment: who steps after each of these takes few
        steps until a load is over, however slow the machine."""
        self._woken.wait(_MOMENT_S)

    def tiers(self) -> dict[str, Any]:
        return self.core.adapters.stats()
