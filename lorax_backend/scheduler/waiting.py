"""The sequences that wait for room, in serving order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from lorax_backend.scheduler.sequence import Sequence
from lorax_backend.types import AdapterRef

OrderKey = tuple[float, int]


class WaitingQueue:
    """Owns the order of waiting sequences. Those whose adapter is still loading stand aside: nobody waits for them.

    Sequences are served by arrival, a level of priority counting as `priority_weight_s` seconds of earlier arrival.
    The key never changes, so only finitely many sequences ever go before a given one: none starves.
    """

    def __init__(self, priority_weight_s: float) -> None:
        self._priority_weight_s = priority_weight_s
        self._ready: list[Sequence] = []
        self._loading: dict[AdapterRef, list[Sequence]] = {}
        self._blocked_since: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._ready) + sum(map(len, self._loading.values()))

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._ready
        for sequences in self._loading.values():
            yield from sequences

    @property
    def num_ready(self) -> int:
        """Sequences that wait for nothing but room."""
        return len(self._ready)

    def key(self, seq: Sequence) -> OrderKey:
        """Serving order, smallest first; unique for each sequence."""
        return seq.arrival - self._priority_weight_s * seq.priority, seq.handle

    def ready(self) -> list[Sequence]:
        """A copy of the sequences whose adapter was ready at the last `promote`, in serving order."""
        return list(self._ready)

    def add(self, seq: Sequence) -> None:
        if seq.adapter is None:
            insort(self._ready, seq, key=self.key)
        else:
            self._loading.setdefault(seq.adapter, []).append(seq)

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that is in the queue."""
        self._blocked_since.pop(seq.handle, None)
        place = bisect_left(self._ready, self.key(seq), key=self.key)
        if place < len(self._ready) and self._ready[place] is seq:
            del self._ready[place]
            return
        assert seq.adapter is not None
        sequences = self._loading[seq.adapter]
        sequences.remove(seq)
        if not sequences:
            del self._loading[seq.adapter]

    def promote(self, is_ready: Callable[[int, AdapterRef], bool]) -> None:
        """Move the sequences that may use their adapter now to the ready ones."""
        for ref, sequences in list(self._loading.items()):
            ready = [seq for seq in sequences if is_ready(seq.handle, ref)]
            for seq in ready:
                insort(self._ready, seq, key=self.key)
            if len(ready) == len(sequences):
                del self._loading[ref]
            elif ready:
                self._loading[ref] = [seq for seq in sequences if seq not in ready]

    def blocked_for(self, seq: Sequence, now: float) -> float:
        """Seconds since `seq` was first refused for want of room; to be called at each refusal."""
        return now - self._blocked_since.setdefault(seq.handle, now)
