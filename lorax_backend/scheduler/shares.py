"""Who has had enough: limits on one adapter's part of a step, of the rows and of the blocks, while others are about."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from lorax_backend.scheduler.adapter_queue import AdapterQueue
from lorax_backend.scheduler.plan import StepPlan
from lorax_backend.scheduler.rows import RunningRows
from lorax_backend.scheduler.sequence import Sequence
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.scheduler.waiting import Present, WaitingQueues, queue_of

HEADROOM = 8  # one part in this many of rows and blocks
_PROMPT_PART = 4  # one part in this many of a step's tokens
_MIN_PROMPT_PART = 256  # tokens; steps get no shorter by less


@dataclass(slots=True)
class AdmissionStep:
    """One step's admissions. `is_open` is False once nothing more may start, `room_is_open` False once no further
    adapter may be taken into use; `passed` counts the sequences of a queue that were looked at in vain, `computed` the
    tokens of its prompts."""

    plan: StepPlan
    now: float
    prefilling: dict[AdapterQueue, deque[Sequence]]
    is_open: bool
    num_under_way: int
    room_is_open: bool = True
    num_refused: int = 0
    num_awaiting: int = 0
    num_without_room: int = 0
    num_looked_up: int = 0
    present: Present | None = None
    blocks_used: Counter[AdapterQueue] | None = None
    passed: Counter[AdapterQueue] = field(default_factory=Counter)
    computed: Counter[AdapterQueue] = field(default_factory=Counter)


class Shares:
    """Answers what an adapter may still be given. Reads the queues and rows, and owns nothing."""

    def __init__(self, settings: SchedulerSettings, queues: WaitingQueues, rows: RunningRows) -> None:
        self._settings = settings
        self._queues = queues
        self._rows = rows

    def is_aged(self, seq: Sequence, now: float) -> bool:
        return seq.refused_since is not None and now - seq.refused_since > self._settings.skip_bound_s

    def must_hold(self, queue: AdapterQueue, step: AdmissionStep) -> bool:
        """The adapter runs as many sequences as it may, or as it should while others may come."""
        if not queue.running:
            return False
        cap = self._settings.max_running_per_adapter
        if cap and queue.running >= cap:
            queue.served_at = step.now
            return True
        if len(self._rows.free) > self._rows.num_rows // HEADROOM:
            return False
        return not self.is_overdue(queue, step.now) and self._exceeds_share(
            queue, queue.running, self._rows.num_rows, step
        )

    def headroom(self, seq: Sequence, queue: AdapterQueue, step: AdmissionStep) -> int:
        """Blocks that are kept from the newcomer for others, since its adapter has more than its share."""
        if not queue.running or self.is_aged(seq, step.now) or self.is_overdue(queue, step.now):
            return 0
        if step.blocks_used is None:
            step.blocks_used = Counter()
            for other in self._rows.sequences:
                step.blocks_used[queue_of(other)] += len(other.block_table)
        if self._exceeds_share(queue, step.blocks_used[queue], self._settings.num_blocks, step):
            return self._settings.num_blocks // HEADROOM
        return 0

    def is_overdue(self, queue: AdapterQueue, now: float) -> bool:
        return now - queue.served_at > self._settings.fairness_bound_s

    def _exceeds_share(self, queue: AdapterQueue, used: int, total: int, step: AdmissionStep) -> bool:
        """The adapter has both its share of `total` and, so far, more tokens than the others."""
        present = self._present(step)
        alone = present.weight <= queue.weight
        ahead = queue.counter > present.mean_counter
        return not alone and ahead and used * present.weight >= total * queue.weight

    def _present(self, step: AdmissionStep) -> Present:
        if step.present is None:
            step.present = self._queues.present(step.now)
        return step.present

    def allowance(self, queue: AdapterQueue, step: AdmissionStep) -> int | None:
        """Prompt tokens that the adapter may still compute in this step; None if nobody else is there to feel it."""
        if not self._settings.chunked_prefill or self._present(step).near_weight <= queue.weight:
            return None
        part = max(_MIN_PROMPT_PART, self._settings.step_budget // _PROMPT_PART)
        return max(0, part - step.computed[queue])
