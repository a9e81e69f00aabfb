"""A scheduler in simulated time: requests arrive, steps take as long as a cost model says, tokens are made up.

Much faster than the fake runner of fakes_engine, since nothing is computed; for questions of who waits how long.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fakes_engine import FakeClock, FakeProvider

from lorax_backend.scheduler.scheduler import Scheduler
from lorax_backend.scheduler.sequence import Sequence as EngineSequence
from lorax_backend.scheduler.sequence import StepResult
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.types import EngineRequest


def accelerator_step(num_tokens: int) -> float:
    """Seconds of a step: memory bound when it only decodes, then linear in its tokens."""
    return 0.010 + 0.00002 * num_tokens


@dataclass
class Outcome:
    """What happened to one request; times in seconds, from its arrival."""

    arrival: float
    arrival_step: int
    queue_s: float | None = None
    first_token_s: float | None = None
    started_step: int | None = None
    error: str | None = None


@dataclass
class Simulation:
    """Drives a Scheduler. `run` adds what has arrived before each step."""

    settings: SchedulerSettings
    provider: FakeProvider
    step_seconds: Callable[[int], float] = accelerator_step
    before_step: Callable[[int], None] = lambda step: None
    clock: FakeClock = field(default_factory=FakeClock)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    tokens_of: dict[str, int] = field(default_factory=dict)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.settings, self.provider, self.clock)

    def run(self, arrivals: Iterable[tuple[float, EngineRequest]], max_steps: int = 20_000) -> None:
        """Until every request has been answered.

        Raises:
            AssertionError: that takes more than `max_steps` steps.
        """
        pending = sorted(arrivals, key=lambda arrival: arrival[0])[::-1]
        while pending or self.scheduler.num_running or self.scheduler.num_waiting:
            while pending and pending[-1][0] <= self.clock.now:
                self.add(pending.pop()[1])
            if not self.step():
                self.clock.now = max(self.clock.now + 0.010, pending[-1][0] if pending else 0.0)
            assert self.num_steps < max_steps, f"{self.scheduler.num_waiting} requests still wait"

    def add(self, request: EngineRequest) -> None:
        self.outcomes[request.handle] = Outcome(self.clock.now, self.num_steps)
        self.scheduler.add(EngineSequence.from_request(request, self.clock.now))
        if request.adapter is not None:
            self.provider.acquire(request.handle, request.adapter, None)

    def step(self) -> bool:
        """One step; False if there was nothing to compute."""
        self.before_step(self.num_steps)
        self.num_steps += 1
        self.provider.poll()
        batch = self.scheduler.schedule()
        for output in self.scheduler.take_errors():
            assert output.error is not None
            self.outcomes[output.handle].error = output.error["error_type"]
        if batch is None:
            return False
        for item in batch.sequences:
            outcome = self.outcomes[item.seq.handle]
            if outcome.started_step is None:
                outcome.started_step = self.num_steps
                outcome.queue_s = self.clock.now - outcome.arrival
            name = item.seq.adapter.id if item.seq.adapter else ""
            self.tokens_of[name] = self.tokens_of.get(name, 0) + item.count
        self.clock.now += self.step_seconds(batch.num_tokens)
        count = batch.num_sampled
        for output in self.scheduler.update(batch, StepResult([1] * count, [None] * count, [None] * count)):
            outcome = self.outcomes[output.handle]
            if outcome.first_token_s is None:
                outcome.first_token_s = self.clock.now - outcome.arrival
        return True

    def longest_wait_steps(self, handles: Iterable[int]) -> int:
        return max(
            outcome.started_step - outcome.arrival_step
            for handle in handles
            if (outcome := self.outcomes[handle]).started_step is not None
        )


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def poisson(rate: float, count: int, draw: random.Random) -> list[float]:
    """Times of `count` arrivals, `rate` a second."""
    now, times = 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        times.append(now)
    return times
