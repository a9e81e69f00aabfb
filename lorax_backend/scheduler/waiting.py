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

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from lorax_backend.scheduler.adapter_queue import AdapterQueue
from lorax_backend.scheduler.sequence import Sequence
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.types import BASE_MODEL_ID, AdapterRef

# Queues with adapters under way that one call of `promote` asks about, and sequences of one such queue.
_MAX_ASKED = 128
_MAX_ASKED_OF_ONE = 16
# An adapter that was served within this many seconds is expected back.
_PRESENT_S = 10.0
# One that was served within this many seconds may come back during the next step.
_NEAR_S = 1.0
_PRESENT_FOR_S = 0.1
_PRESENT_QUEUES = 256  # of more queues it is worked out less often, so that a step costs no more on average
# Queues without sequences that are remembered, at least.
_MIN_REMEMBERED = 256
# Queues of each kind that one step looks at.
_MAX_CANDIDATES = 64
_COUNTER, _SERVED_AT = attrgetter("counter"), attrgetter("served_at")

Order = tuple[int, float, float, int]


class Present(NamedTuple):
    """The adapters about: their weights' sum, that of the ones that may feel how long the next step takes, and the mean
    of all their counters; good enough `until` then."""

    until: float
    weight: float
    near_weight: float
    mean_counter: float

    def joined(self, weight: float, absent_s: float) -> Present:
        """With an adapter that has come back after so many seconds."""
        return self._replace(
            weight=self.weight + weight * (absent_s >= _PRESENT_S),
            near_weight=self.near_weight + weight * (absent_s >= _NEAR_S),
        )


class WaitingQueues:
    """Owns the adapters' queues. Sequences whose adapter is still loading stand aside: nobody waits for them."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        self._queues: dict[AdapterRef | None, AdapterQueue] = {}
        self._backlogged: dict[AdapterQueue, None] = {}  # those with ready sequences
        # Of these the ones that run something, and the ones that do not: their counters and times of service stand
        # still, so they are kept sorted by both, however many there are.
        self._busy: dict[AdapterQueue, None] = {}
        self._by_counter: list[tuple[float, float, int, AdapterQueue]] = []
        self._by_service: list[tuple[float, int, AdapterQueue]] = []
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
        queue = queue_of(seq)
        queue.loading[seq] = None
        queue.preempted += seq.first_scheduled is not None
        self._new[seq] = None
        self._num_waiting += 1

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that waits."""
        queue = queue_of(seq)
        queue.take_out(seq)
        queue.preempted -= seq.first_scheduled is not None
        self._new.pop(seq, None)
        self._num_waiting -= 1
        self._note_empty(queue)

    def hold_back(self, seq: Sequence) -> None:
        """A ready sequence lost its adapter, or its right to it."""
        queue = queue_of(seq)
        queue.take_out(seq)
        queue.loading[seq] = None
        self._loading[queue] = None
        self._note_empty(queue)

    def promote(
        self, is_ready: Callable[[int, AdapterRef], bool], now: float, at_most: int | None = _MAX_ASKED
    ) -> None:
        """Move the sequences that may use their adapter now to the ready ones. Of the adapters under way, `at_most`
        are asked about, in turn, and a few sequences of each; all, if it is None."""
        risen: dict[AdapterQueue, None] = {}
        for seq in self._new:
            queue = queue_of(seq)
            if queue.ref is None or is_ready(seq.handle, queue.ref):
                del queue.loading[seq]
                queue.put(seq)
                risen[queue] = None
            else:
                self._loading[queue] = None
        self._new.clear()
        for queue in list(islice(self._loading, at_most)):
            del self._loading[queue]
            if _promote_some(queue, is_ready, len(queue.loading) if at_most is None else _MAX_ASKED_OF_ONE):
                risen[queue] = None
            if queue.loading:
                self._loading[queue] = None
        self._note_risen([queue for queue in risen if queue not in self._backlogged], now)

    @property
    def has_backlog(self) -> bool:
        return bool(self._backlogged)

    def backlog_tokens(self, at_most: int) -> int:
        """Tokens of the ready sequences; counted until there are more than `at_most`."""
        total = 0
        for queue in self._backlogged:
            for seq in queue.ready:
                total += seq.num_tokens
                if total > at_most:
                    return total
        return total

    @property
    def busy(self) -> list[AdapterQueue]:
        """Queues with ready sequences that also run some."""
        return list(self._busy)

    def idle(self, at_most: int = _MAX_CANDIDATES) -> list[AdapterQueue]:
        """Queues with ready sequences that run none, the lowest counters first."""
        return [entry[-1] for entry in self._by_counter[:at_most]]

    @property
    def idle_base(self) -> list[AdapterQueue]:
        """The base model's queue, if it has ready sequences and runs none."""
        queue = self._queues.get(None)
        return [queue] if queue is not None and queue.ready and not queue.running else []

    def overdue(self, now: float) -> list[AdapterQueue]:
        """Queues with ready sequences that have been given nothing for too long: as many as one step looks at of
        those that run nothing, and the others."""
        limit = now - self._settings.fairness_bound_s
        late = []
        for entry in islice(self._by_service, _MAX_CANDIDATES):
            if entry[0] >= limit:
                break
            late.append(entry[-1])
        if self._busy and min(map(_SERVED_AT, self._busy)) < limit:
            late += [queue for queue in self._busy if queue.served_at < limit]
        return late

    def note_started(self, queue: AdapterQueue) -> None:
        """The first sequence of the queue is about to run."""
        if queue in self._backlogged:
            self._leave_idle(queue)
            self._busy[queue] = None

    def note_stopped(self, queue: AdapterQueue) -> None:
        """The last sequence of the queue has stopped, and its time of service been set."""
        if queue in self._busy:
            del self._busy[queue]
            self._enter_idle(queue)

    def order(self, queue: AdapterQueue, now: float, penalty: float = 0.0) -> Order:
        """Place among the queues, smallest first. `penalty` is virtual time, for what serving it would cost others."""
        if now - queue.served_at > self._settings.fairness_bound_s:
            return 0, queue.served_at, 0.0, queue.number
        return 1, queue.counter + penalty, queue.served_at, queue.number

    def present(self, now: float) -> Present:
        """The adapters that wait, run, or did so a moment ago. Who has left is noticed a little late."""
        if self._present is None or now > self._present.until:
            since = now - _PRESENT_S
            about = [q for q in self._queues.values() if q.running or q.ready or q.served_at > since]
            weight = sum([queue.weight for queue in about])
            near = [q.weight for q in about if q.running or q.ready or q.served_at > now - _NEAR_S]
            used = sum([queue.counter * queue.weight for queue in about])
            until = now + _PRESENT_FOR_S * max(1.0, len(self._queues) / _PRESENT_QUEUES)
            self._present = Present(until, weight, sum(near), used / weight if weight else 0.0)
        return self._present

    def _note_risen(self, risen: list[AdapterQueue], now: float) -> None:
        if not risen:
            return
        if self._backlogged:
            lowest = [self._by_counter[0][0]] if self._by_counter else []
            self._floor = max(self._floor, min([*lowest, *map(_COUNTER, self._busy)]))
        else:
            self._floor = max(map(_COUNTER, self._queues.values()))
        for queue in risen:
            if self._present is not None and not queue.running:
                self._present = self._present.joined(queue.weight, now - queue.served_at)
            queue.counter = max(queue.counter, self._floor)
            queue.served_at = now
            self._backlogged[queue] = None
            if queue.running:
                self._busy[queue] = None
            else:
                self._enter_idle(queue)

    def _note_empty(self, queue: AdapterQueue) -> None:
        if not queue.ready and queue in self._backlogged:
            del self._backlogged[queue]
            if queue.running:
                del self._busy[queue]
            else:
                self._leave_idle(queue)
        if not queue.loading:
            self._loading.pop(queue, None)

    def _enter_idle(self, queue: AdapterQueue) -> None:
        insort(self._by_counter, (queue.counter, queue.served_at, queue.number, queue))
        insort(self._by_service, (queue.served_at, queue.number, queue))

    def _leave_idle(self, queue: AdapterQueue) -> None:
        place = bisect_left(self._by_counter, (queue.counter, queue.served_at, queue.number))
        del self._by_counter[place]
        del self._by_service[bisect_left(self._by_service, (queue.served_at, queue.number))]

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


def _promote_some(queue: AdapterQueue, is_ready: Callable[[int, AdapterRef], bool], count: int) -> bool:
    """Ask about `count` sequences of an adapter under way, and about as many more for as long as some are ready. True
    if any was."""
    any_ready = False
    while queue.loading:
        found = False
        for seq in list(islice(queue.loading, count)):
            del queue.loading[seq]
            if queue.ref is None or is_ready(seq.handle, queue.ref):
                queue.put(seq)
                found = True
            else:
                queue.loading[seq] = None
        if not found:
            break
        any_ready = True
    return any_ready


def queue_of(seq: Sequence) -> AdapterQueue:
    """The queue of a registered sequence."""
    assert seq.queue is not None
    return seq.queue
