"""Requests that give up when they have waited too long for their first step."""

from __future__ import annotations

import heapq

from lorax_backend.scheduler.sequence import Sequence, SequenceStatus

_MIN_KEPT = 64


class QueueDeadlines:
    """Finds them without looking at all that wait: the next deadline is on top of a heap."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._limit = _MIN_KEPT

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, seq: Sequence) -> None:
        if seq.queue_timeout_s is None:
            return
        heapq.heappush(self._heap, (seq.arrival + seq.queue_timeout_s, seq.handle, seq))
        if (
            len(self._heap) > self._limit
        ):  # mostly of sequences that were served: they would be kept to the last
            self._heap = [entry for entry in self._heap if _still_waits(entry[2])]
            heapq.heapify(self._heap)
            self._limit = max(_MIN_KEPT, 2 * len(self._heap))

    def take_expired(self, now: float) -> list[Sequence]:
        """Sequences that have not been scheduled once in their time; each is returned once."""
        expired = []
        while self._heap and self._heap[0][0] <= now:
            seq = heapq.heappop(self._heap)[2]
            if _still_waits(seq):
                expired.append(seq)
        return expired

    def next(self) -> float | None:
        """When the next one may expire, on the scheduler's clock; None if none does."""
        while self._heap and not _still_waits(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None


def _still_waits(seq: Sequence) -> bool:
    return seq.first_scheduled is None and seq.status is SequenceStatus.WAITING
