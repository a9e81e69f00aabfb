"""The sequences that run, and the rows of the runner's per-sequence state that they hold."""

from __future__ import annotations

from bisect import insort
from collections import Counter

from lorax_backend.scheduler.adapter_queue import AdapterQueue, serving_key
from lorax_backend.scheduler.plan import StepPlan
from lorax_backend.scheduler.sequence import Sequence, SequenceStatus
from lorax_backend.scheduler.waiting import queue_of


class RunningRows:
    """Owns the rows. `sequences` holds those that run in serving order, `free` the rows nobody has."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.sequences: list[Sequence] = []
        self.free = list(range(num_rows - 1, -1, -1))
        self.finished: dict[int, None] = {}  # freed since the runner was last told

    def start(self, seq: Sequence) -> None:
        seq.slot = self.free.pop()
        seq.status = SequenceStatus.RUNNING
        insort(self.sequences, seq, key=serving_key)

    def stop(self, seq: Sequence) -> None:
        self.sequences.remove(seq)
        self.free.append(seq.slot)
        self.finished[seq.slot] = None
        seq.slot = -1

    def take_finished(self) -> list[int]:
        finished = list(self.finished)
        self.finished.clear()
        return finished

    def victim(self, plan: StepPlan) -> Sequence:
        """Who gives up its blocks when there are none left: the last in serving order of those whose adapter runs
        most sequences for its weight. The first of all in serving order is spared while there is another, so that
        however often blocks run out, one sequence after the other comes to its end."""
        counts = Counter(queue_of(seq) for seq in self.sequences)
        planned = plan.handles
        first = self.sequences[0]
        best: Sequence | None = None
        for seq in reversed(self.sequences):
            if seq.handle in planned or (seq is first and best is not None):
                continue
            if best is None or _crowding(seq, counts) > _crowding(best, counts):
                best = seq
        assert best is not None  # the sequence that needs a block is not in the plan yet
        return best


def _crowding(seq: Sequence, counts: Counter[AdapterQueue]) -> float:
    queue = queue_of(seq)
    return counts[queue] / queue.weight
