"""The sequences that wait, in one queue an adapter, and the fair order of the queues.

Between adapters: deficit round robin in its continuous form, as start-time fair queueing and the virtual token counter
of S-LoRA's authors have it. Every queue counts the tokens computed for it, prompt and generated, divided by its weight;
the queue with the lowest count is served next. A queue that begins to wait starts no lower than the lowest of those
that wait already (`floor`), so nobody saves up credit while idle; when nobody waits, what was used is forgotten.
Whatever the counts say, a queue that has been given nothing for `fairness_bound_s` goes before all others, those
overdue for longest first. So between two services of a queue lie at most the bound and one service of every queue that
has waited for longer, however many adapters come and go meanwhile.

Within a queue: by arrival, a level of priority counting as `priority_weight_s` seconds of earlier arrival. The key
never changes, so only finitely many sequences ever go before a given one. Between queues priority buys share, not
precedence: a level halves what a token is charged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from operator import attrgetter
from typing import NamedTuple

from lorax_backend.scheduler.adapter_queue import AdapterQueue
from lorax_backend.scheduler.sequence import Sequence
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.types import BASE_MODEL_ID, AdapterRef

# Queues with adapters under way that one call of `promote` asks about.
_MAX_ASKED = 128
# An adapter that was served within this many seconds is expected back.
_PRESENT_S = 10.0
_PRESENT_FOR_S = 0.1
# Queues without sequences that are remembered, at least.
_MIN_REMEMBERED = 256

# Queues of each kind that one step looks at.
_MAX_CANDIDATES = 64
_COUNTER, _SERVED_AT = attrgetter("counter"), attrgetter("served_at")

Order = tuple[int, float, float, int]


class Present(NamedTuple):
    """The adapters about at a time: their weights' sum, and the mean of their counters."""

    at: float
    weight: float
    mean_counter: float


class WaitingQueues:
    """Owns the adapters' queues. Sequences whose adapter is still loading stand aside: nobody waits for them."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        self._queues: dict[AdapterRef | None, AdapterQueue] = {}
        self._backlogged: dict[AdapterQueue, None] = {}  # those with ready sequences
        self._loading: dict[AdapterQueue, None] = {}
        self._new: dict[Sequence, None] = {}  # since the last `promote`; they are in `loading` of their queue
        self._floor = 0.0
        self._present: Present | None = None
        self._num_waiting = 0
        self._num_created = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue.ready
            yield from queue.loading

    @property
    def backlogged(self) -> Iterable[AdapterQueue]:
        """Queues in which sequences wait for nothing but room."""
        return self._backlogged

    def register(self, seq: Sequence) -> AdapterQueue:
        """Tie a new sequence to the queue of its adapter; it does not wait yet."""
        queue = self._queues.get(seq.adapter)
        if queue is None:
            self._forget_idle()
            key = BASE_MODEL_ID if seq.adapter is None else seq.adapter.id
            weight = self._settings.adapter_weights.get(key, 1.0)
            queue = AdapterQueue(seq.adapter, self._num_created, weight)
            self._queues[seq.adapter] = queue
            self._num_created += 1
        seq.queue = queue
        seq.order = seq.arrival - self._settings.priority_weight_s * seq.priority
        seq.token_cost = queue.cost(seq.priority)
        return queue

    def add(self, seq: Sequence) -> None:
        """A registered sequence waits; it is looked at in the next `promote`."""
        seq.refused_since = None
        queue_of(seq).loading.append(seq)
        self._new[seq] = None
        self._num_waiting += 1

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that waits."""
        queue = queue_of(seq)
        queue.take_out(seq)
        self._new.pop(seq, None)
        self._num_waiting -= 1
        self._note_empty(queue)

    def hold_back(self, seq: Sequence) -> None:
        """A ready sequence lost its adapter, or its right to it."""
        queue = queue_of(seq)
        queue.take_out(seq)
        queue.loading.append(seq)
        self._loading[queue] = None
        self._note_empty(queue)

    def promote(
        self, is_ready: Callable[[int, AdapterRef], bool], now: float, at_most: int | None = _MAX_ASKED
    ) -> None:
        """Move the sequences that may use their adapter now to the ready ones. Of the adapters under way, `at_most`
        are asked about, in turn."""
        risen: dict[AdapterQueue, None] = {}
        for seq in self._new:
            queue = queue_of(seq)
            if queue.ref is None or is_ready(seq.handle, queue.ref):
                queue.loading.remove(seq)
                queue.put(seq)
                risen[queue] = None
            else:
                self._loading[queue] = None
        self._new.clear()
        for queue in list(islice(self._loading, at_most)):
            del self._loading[queue]
            waiting, queue.loading = queue.loading, []
            for seq in waiting:
                if queue.ref is None or is_ready(seq.handle, queue.ref):
                    queue.put(seq)
                    risen[queue] = None
                else:
                    queue.loading.append(seq)
            if queue.loading:
                self._loading[queue] = None
        self._note_risen([queue for queue in risen if queue not in self._backlogged], now)

    @property
    def has_backlog(self) -> bool:
        return bool(self._backlogged)

    def candidates(self, now: float) -> Iterable[AdapterQueue]:
        """The queues that one step looks at. Of very many: those overdue for longest, those with the lowest counts,
        and those whose adapters are in use, who need no room."""
        if len(self._backlogged) <= 2 * _MAX_CANDIDATES:
            return self._backlogged
        limit = now - self._settings.fairness_bound_s
        overdue = sorted([q for q in self._backlogged if q.served_at < limit], key=_SERVED_AT)
        lowest = sorted(self._backlogged, key=_COUNTER)
        in_use = [queue for queue in self._backlogged if queue.running]
        return chain(overdue[:_MAX_CANDIDATES], lowest[:_MAX_CANDIDATES], in_use)

    def order(self, queue: AdapterQueue, now: float, penalty: float = 0.0) -> Order:
        """Place among the queues, smallest first. `penalty` is virtual time, for what serving it would cost others."""
        if now - queue.served_at > self._settings.fairness_bound_s:
            return 0, queue.served_at, 0.0, queue.number
        return 1, queue.counter + penalty, queue.served_at, queue.number

    def present(self, now: float) -> Present:
        """The adapters that wait, run, or did so a moment ago. Who has left is noticed a little late."""
        if self._present is None or now - self._present.at > _PRESENT_FOR_S:
            weight = used = 0.0
            for queue in self._queues.values():
                if queue.running or queue.ready or now - queue.served_at < _PRESENT_S:
                    weight += queue.weight
                    used += queue.counter * queue.weight
            self._present = Present(now, weight, used / weight if weight else 0.0)
        return self._present

    def _note_risen(self, risen: list[AdapterQueue], now: float) -> None:
        if not risen:
            return
        if self._backlogged:
            self._floor = max(self._floor, min(queue.counter for queue in self._backlogged))
        else:
            self._floor = max(queue.counter for queue in self._queues.values())
        for queue in risen:
            if self._present is not None and not queue.running and now - queue.served_at >= _PRESENT_S:
                self._present = self._present._replace(weight=self._present.weight + queue.weight)
            queue.counter = max(queue.counter, self._floor)
            queue.served_at = now
            self._backlogged[queue] = None

    def _note_empty(self, queue: AdapterQueue) -> None:
        if not queue.ready:
            self._backlogged.pop(queue, None)
        if not queue.loading:
            self._loading.pop(queue, None)

    def _forget_idle(self) -> None:
        """Forget queues that nobody uses, the oldest first, once they are half of all."""
        if len(self._queues) < _MIN_REMEMBERED:
            return
        idle = [queue for queue in self._queues.values() if queue.is_idle]
        if 2 * len(idle) <= len(self._queues):
            return
        idle.sort(key=lambda queue: queue.served_at)
        for queue in idle[: len(idle) // 2 + 1]:
            del self._queues[queue.ref]


def queue_of(seq: Sequence) -> AdapterQueue:
    """The queue of a registered sequence."""
    assert seq.queue is not None
    return seq.queue
