"""Rows that a flood gives back, when no row is free, to adapters that have less than half their share.

Half, because what is taken back must be computed again: the chances of ordinary traffic are left to even out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain, islice

from lorax_backend.scheduler.adapter_queue import AdapterQueue
from lorax_backend.scheduler.leases import AdapterRoom
from lorax_backend.scheduler.rotation import Rotation
from lorax_backend.scheduler.rows import RunningRows
from lorax_backend.scheduler.sequence import Sequence
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.scheduler.waiting import WaitingQueues, queue_of

_MAX_RECLAIMED = 4  # rows of one step
_MAX_LOOKED_AT = 16  # queues that run nothing, those given least


class RowReclaim:
    """Finds sequences to preempt for the sake of fairness. Each makes way for one that starts, and an adapter is never
    brought below its share, so there are no more of them than requests of others."""

    def __init__(
        self,
        settings: SchedulerSettings,
        adapters: AdapterRoom,
        queues: WaitingQueues,
        rows: RunningRows,
        rotation: Rotation,
        is_held: Callable[[Sequence, float], bool],
    ) -> None:
        self._max_weight = max([1.0, *settings.adapter_weights.values()])
        self._settings = settings
        self._adapters = adapters
        self._queues = queues
        self._rows = rows
        self._rotation = rotation
        self._is_held = is_held

    def victims(self, now: float) -> list[Sequence]:
        """Running sequences that give up their rows before this step, because adapters that have been given less and
        have not half their share of rows can use them: one row for each. The first in serving order never does."""
        if self._rows.free or not self._queues.has_backlog:
            return []
        total, num_rows = self._queues.present(now).weight, self._rows.num_rows
        if total > num_rows * self._max_weight:
            return []
        entitled = (
            queue
            for queue in chain(self._queues.idle(_MAX_LOOKED_AT), self._queues.busy)
            if (2 * queue.running + 1) * total <= num_rows * queue.weight and self._could_start(queue, now)
        )
        claims = sorted(queue.counter for queue in islice(entitled, _MAX_RECLAIMED))
        victims: list[Sequence] = []
        taken: Counter[AdapterQueue] = Counter()
        for seq in reversed(self._rows.sequences[1:] if claims else []):
            queue = queue_of(seq)
            left = queue.running - taken[queue] - 1
            if left * total >= num_rows * queue.weight and queue.counter > claims[len(victims)]:
                taken[queue] += 1
                victims.append(seq)
                if len(victims) == len(claims):
                    break
        return victims

    def _could_start(self, queue: AdapterQueue, now: float) -> bool:
        cap = self._settings.max_running_per_adapter
        if not queue.ready or queue.ready[0].num_in_flight or self._rotation.is_closed(queue):
            return False
        if cap and queue.running >= cap:
            return False
        head = queue.ready[0]
        if queue.ref is not None:
            if not queue.running and not self._adapters.is_on_device(queue.ref):
                return False
            if not self._adapters.is_ready(head.handle, queue.ref):
                return False
        return not self._is_held(head, now)
