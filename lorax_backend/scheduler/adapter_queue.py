"""What the scheduler knows of one adapter: who waits for it, who runs with it, and how much it has been given."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from lorax_backend.scheduler.sequence import Sequence
from lorax_backend.types import BASE_MODEL_ID, AdapterRef

# A level of priority doubles the share of the sequence's tokens, up to this many levels either way.
_MAX_SHARE_LEVELS = 4


@dataclass(slots=True, eq=False)
class AdapterQueue:
    """The sequences of one adapter, or of the base model (`ref` is None).

    Attributes:
        number: unique, in order of first request; breaks ties.
        counter: tokens computed for it, divided by `weight`: its virtual time. The lowest is served next.
        ready: sequences that wait for nothing but room, in serving order.
        loading: sequences whose adapter, or whose right to it, is not there yet, in the order in which they are asked
            about.
        running: sequences that have a row.
        preempted: sequences that had one and wait for another.
        served_at: when it was last given anything, or else began to wait; seconds of the scheduler's clock.
    """

    ref: AdapterRef | None
    number: int
    weight: float = 1.0
    counter: float = 0.0
    served_at: float = float("-inf")
    running: int = 0
    preempted: int = 0
    ready: list[Sequence] = field(default_factory=list)
    loading: dict[Sequence, None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return BASE_MODEL_ID if self.ref is None else str(self.ref)

    @property
    def num_waiting(self) -> int:
        return len(self.ready) + len(self.loading)

    @property
    def is_idle(self) -> bool:
        return not (self.running or self.ready or self.loading)

    def put(self, seq: Sequence) -> None:
        """Add a sequence to the ready ones."""
        insort(self.ready, seq, key=serving_key)

    def take_out(self, seq: Sequence) -> None:
        """Remove a waiting sequence."""
        place = bisect_left(self.ready, serving_key(seq), key=serving_key)
        if place < len(self.ready) and self.ready[place] is seq:
            del self.ready[place]
        else:
            del self.loading[seq]

    def charge(self, seq: Sequence, num_tokens: int) -> None:
        """`num_tokens` tokens of `seq` are computed in the next step."""
        self.counter += num_tokens * seq.token_cost

    def cost(self, priority: int) -> float:
        """Virtual time that one token of a sequence with this priority takes."""
        level = max(-_MAX_SHARE_LEVELS, min(_MAX_SHARE_LEVELS, priority))
        return 2.0**-level / self.weight


def serving_key(seq: Sequence) -> tuple[float, int]:
    """Order of serving within a queue and of keeping rows, smallest first; unique for each sequence and fixed."""
    return seq.order, seq.handle
