"""What the model's steps were, counted under LoRAX's names for metrics. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorax_backend.histogram import Histogram
from lorax_backend.scheduler.sequence import ScheduledBatch

PREFILL, DECODE = METHODS = ("prefill", "decode")
BATCH_SIZES = tuple(float(1 << power) for power in range(11))  # to 1024, as LoRAX has it


def method_of(batch: ScheduledBatch) -> str:
    """A step that computes more tokens than it has sequences works on a prompt, whatever else it decodes."""
    return PREFILL if batch.num_tokens > len(batch.sequences) else DECODE


class StepCounters:
    """Told of every step by the engine's thread.

    Attributes:
        launched, succeeded, failed: steps by method.
        seconds: by method, how long a step took: from its launch, or from the end of the step before it if that is
            later, until its tokens were read.
        started: sequences that began in a step, of the steps in which any did.
        joined: steps in which sequences began beside others that ran already.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.launched = dict.fromkeys(METHODS, 0)
        self.succeeded = dict.fromkeys(METHODS, 0)
        self.failed = dict.fromkeys(METHODS, 0)
        self.seconds = {method: Histogram() for method in METHODS}
        self.started = Histogram(BATCH_SIZES)
        self.joined = 0
        self._clock = clock
        self._last_end = float("-inf")

    @property
    def num_succeeded(self) -> int:
        """Steps of all methods whose tokens have been read."""
        return sum(self.succeeded.values())

    def launch(self, batch: ScheduledBatch, num_started: int) -> float:
        """A step is launched, in which so many sequences begin; returns the time, to be given to `end`."""
        self.launched[method_of(batch)] += 1
        if num_started:
            self.started.observe(num_started)
            self.joined += num_started < len(batch.sequences)
        return self._clock()

    def end(self, batch: ScheduledBatch, launched_at: float) -> None:
        """The tokens of a step have been read."""
        method, now = method_of(batch), self._clock()
        self.succeeded[method] += 1
        self.seconds[method].observe(now - max(launched_at, self._last_end))
        self._last_end = now

    def fail(self, batch: ScheduledBatch) -> None:
        """A step failed, in its launch or later."""
        self.failed[method_of(batch)] += 1

    def as_dict(self) -> dict[str, Any]:
        """All attributes, as plain data."""
        return {
            "launched": dict(self.launched),
            "succeeded": dict(self.succeeded),
            "failed": dict(self.failed),
            "seconds": {method: histogram.as_dict() for method, histogram in self.seconds.items()},
            "started": self.started.as_dict(),
            "joined": self.joined,
        }
