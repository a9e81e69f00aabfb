"""Who gets what a step has left beside its decodes: prompts under way, and sequences that wait.

The queues are served in fair order (see waiting), one prompt or chunk of one at a time, and charged at once, so that a
queue that has had its part goes behind the others in the same step. What is passed over, and for how long:
- A sequence that finds no KV blocks is passed over for `skip_bound_s`; then nothing behind it is admitted, so that
  blocks gather for it. It holds up only what is behind it: its adapter's share pays for it, not everybody's.
- A sequence whose prompt begins like one that is being computed, for a quarter of what it lacks or more, is passed
  over while that one gets there, and then takes its blocks up; for no longer than the same bound, and not when its
  queue is overdue. Only what a running sequence computes is waited for, so that a preemption or an end sets it free.
- An adapter that finds no room on the device is passed over for one time slice; then no other takes room before it,
  and adapters in use yield theirs (see rotation). It holds up nobody whose adapter has room.
- An adapter that is not on the device yet goes behind others by at most `grouping` tokens: requests for adapters that
  run already are taken together, which makes steps cheaper and copies fewer.
- While several adapters are about, a flood of one must not be felt by the others. While others wait, run or did so a
  second ago, none computes more than a quarter of a step's tokens in prompts (256 at least), so steps stay short. The
  last eighth of rows and of blocks is kept from those that have more than their share, unless they are overdue. And
  when no row is free all the same, an adapter with less than half its share takes one from an adapter that keeps its
  share without it (see reclaim).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from operator import attrgetter

from lorax_backend.scheduler.adapter_queue import AdapterQueue
from lorax_backend.scheduler.block_manager import BlockManager
from lorax_backend.scheduler.leases import AdapterLeases, AdapterRoom
from lorax_backend.scheduler.plan import StepPlan
from lorax_backend.scheduler.rotation import Rotation
from lorax_backend.scheduler.rows import RunningRows
from lorax_backend.scheduler.sequence import Sequence, SequenceStatus
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.scheduler.shares import HEADROOM, AdmissionStep, Shares
from lorax_backend.scheduler.waiting import Order, WaitingQueues, queue_of
from lorax_backend.types import AdapterRef

_MAX_REFUSALS = 32  # of one step, so that a long queue without room costs little
_MAX_AWAITING = 32  # likewise, of one step's sequences that wait for the prefix of another
_AWAITED_PART = 4  # one part in this many of the missing blocks is worth waiting for
_MAX_CLAIMS_TRIED = 4
_MAX_WITHOUT_ROOM = 8  # adapters refused by the device in one step; it is not asked about more
_MAX_LOOKED_UP = 32  # adapters of which one step asks whether they are on the device
_MAX_PREFETCHED = 4
_PLACE = attrgetter("counter", "served_at", "number")


class Admission:
    """Starts sequences. Shares the queues, rows and blocks with the Scheduler, which ends and preempts them."""

    def __init__(
        self,
        settings: SchedulerSettings,
        adapters: AdapterRoom,
        queues: WaitingQueues,
        rows: RunningRows,
        blocks: BlockManager,
    ) -> None:
        self.rotation = Rotation(settings.adapter_cycle_time_s)
        self.leases = AdapterLeases(adapters)
        self.prefill_turn = False
        self.too_large: list[Sequence] = []  # their adapters never fit the device; the caller ends them
        self.num_prompt_tokens = 0
        self.num_cached_prompt_tokens = 0
        self.num_started = 0
        self._settings = settings
        self._adapters = adapters
        self._queues = queues
        self._rows = rows
        self._blocks = blocks
        self._shares = Shares(settings, queues, rows)

    def fill(self, plan: StepPlan, prefilling: Iterable[Sequence], now: float) -> None:
        """Add prompts to the step: chunks of `prefilling`, which run already, and sequences that wait."""
        under_way: dict[AdapterQueue, deque[Sequence]] = {}
        num_under_way = 0
        for seq in prefilling:
            under_way.setdefault(queue_of(seq), deque()).append(seq)
            num_under_way += 1
        step = AdmissionStep(plan, now, under_way, bool(self._rows.free and plan.budget), num_under_way)
        backlogged = self._queues.has_backlog
        if backlogged:
            self.rotation.choose(now)
            self._serve_claims(step)
        if plan.budget and (under_way or (step.is_open and backlogged)):
            self._serve(step)
        if backlogged:
            self._prefetch()

    def _serve(self, step: AdmissionStep) -> None:
        """Give the queues their parts in fair order. Most steps have room for one or two, so the places of the others
        are not worked out: they come as a stream, sorted already."""
        first = dict.fromkeys(step.prefilling)
        if step.is_open:
            first |= dict.fromkeys((*self._queues.overdue(step.now), *self._queues.idle_base))
        heap = [(self._order(queue, step.now), queue) for queue in first]
        heapq.heapify(heap)
        others = self._in_order(first, step) if step.is_open else iter(())
        coming = next(others, None)
        located: set[AdapterQueue] = set()
        while step.plan.budget and (step.is_open or step.num_under_way):
            while coming is not None and not (heap and heap[0] < coming):
                if self._may_be_admitted(coming[1], step) and not self._shares.must_hold(coming[1], step):
                    heapq.heappush(heap, coming)
                coming = next(others, None)
            if not heap:
                break
            queue = heap[0][1]
            if self._is_far(queue, located, step):
                order = self._queues.order(queue, step.now, self._settings.grouping)
                heapq.heapreplace(heap, (order, queue))
            elif self._serve_one(queue, step):
                heapq.heapreplace(heap, (self._order(queue, step.now), queue))
            else:
                heapq.heappop(heap)

    def _in_order(
        self, others: dict[AdapterQueue, None], step: AdmissionStep
    ) -> Iterator[tuple[Order, AdapterQueue]]:
        """Queues with ready sequences but `others`, none of which is overdue, with their places."""
        busy = sorted([queue for queue in self._queues.busy if queue not in others], key=_PLACE)
        idle = [queue for queue in self._queues.idle() if queue not in others]
        return heapq.merge(*(((self._order(q, step.now), q) for q in queues) for queues in (busy, idle)))

    def _may_be_admitted(self, queue: AdapterQueue, step: AdmissionStep) -> bool:
        """False if none of its sequences can start in this step, whatever they are."""
        if self.rotation.is_closed(queue):
            return False
        if queue.ref is not None and not queue.running and not step.room_is_open:
            self.rotation.claim(queue, step.now)
            return False
        return True

    def _order(self, queue: AdapterQueue, now: float) -> Order:
        idle = queue.ref is not None and not queue.running
        return self._queues.order(queue, now, self._settings.grouping / 2 if idle else 0.0)

    def _is_far(self, queue: AdapterQueue, located: set[AdapterQueue], step: AdmissionStep) -> bool:
        """True, once, for an adapter that would have to be copied to the device."""
        if queue.ref is None or queue.running or queue in located or step.num_looked_up == _MAX_LOOKED_UP:
            return False
        step.num_looked_up += 1
        located.add(queue)
        return not self._adapters.is_on_device(queue.ref)

    def _serve_claims(self, step: AdmissionStep) -> None:
        """Those that have waited for room on the device go first, so that what others yield is theirs."""
        for queue in islice(self.rotation.claims, _MAX_CLAIMS_TRIED):
            if not queue.ready:
                self.rotation.withdraw(queue)
                continue
            if not step.is_open:
                return
            if self._shares.allowance(queue, step) == 0:
                continue
            if not self._admit(queue, step) and self.rotation.has_overdue_claim(step.now):
                step.room_is_open = False
                return

    def _serve_one(self, queue: AdapterQueue, step: AdmissionStep) -> bool:
        """Compute a chunk of a prompt under way, or admit one sequence; False if the queue can be given no more."""
        if self._shares.allowance(queue, step) == 0:
            return False
        under_way = step.prefilling.get(queue)
        while under_way:
            seq = under_way.popleft()
            step.num_under_way -= 1
            if seq.status is SequenceStatus.RUNNING:  # it may have been preempted
                self._compute(seq, step)
                return True
        return step.is_open and self._admit(queue, step)

    def _admit(self, queue: AdapterQueue, step: AdmissionStep) -> bool:
        """Start the first sequence of the queue that can; False if there is none."""
        if not queue.ready or not self._may_be_admitted(queue, step) or self._shares.must_hold(queue, step):
            return False
        while step.is_open and step.passed[queue] < len(queue.ready):
            seq = queue.ready[step.passed[queue]]
            if seq.num_in_flight:
                step.passed[queue] += 1
            elif queue.ref is not None and not self._adapters.is_ready(seq.handle, queue.ref):
                self._queues.hold_back(seq)
            else:
                started = self._try(seq, queue, step)
                if started is not None:
                    return started
                step.passed[queue] += 1
        return False

    def _try(self, seq: Sequence, queue: AdapterQueue, step: AdmissionStep) -> bool | None:
        """Start one sequence. False if none of its queue can start now, None if another may."""
        prefix = self._matched_prefix(seq)
        if self._awaits_prefix(seq, prefix, step.now):
            seq.refused_since = step.now if seq.refused_since is None else seq.refused_since
            step.num_awaiting += 1
            return None if step.num_awaiting < _MAX_AWAITING else False
        if self._must_wait_for_budget(seq, prefix, step.plan):
            step.is_open = False
            return False
        if not self._has_blocks(seq, prefix, queue, step):
            self._refuse(seq, step)
            return None
        if self.leases.take(seq):
            self._start(seq, prefix, step)
            return True
        assert queue.ref is not None
        if self._adapters.is_on_device(queue.ref):  # its copy is still under way
            return False
        if not self._adapters.fits(queue.ref):
            self.too_large.append(seq)
            return None
        self.rotation.claim(queue, step.now)
        step.num_without_room += 1
        if step.num_without_room == _MAX_WITHOUT_ROOM:
            step.room_is_open = False
        return False

    def _refuse(self, seq: Sequence, step: AdmissionStep) -> None:
        """There are no blocks for it. Close the step to others when it has been passed over for long enough."""
        step.num_refused += 1
        if seq.refused_since is None:
            seq.refused_since = step.now
        if self._shares.is_aged(seq, step.now) or step.num_refused == _MAX_REFUSALS:
            step.is_open = False

    def _has_blocks(self, seq: Sequence, prefix: list[int], queue: AdapterQueue, step: AdmissionStep) -> bool:
        """True if a newcomer finds blocks and leaves about what the running sequences grow by in the next few steps, so
        that it is not preempted as soon as it has started. Nothing runs: nothing to leave, so anything can start."""
        if not self._rows.sequences:
            return self._blocks.can_allocate(seq, prefix)
        reserve = len(self._rows.sequences) // 4 + 1
        if self._blocks.can_allocate(seq, prefix, reserve + self._settings.num_blocks // HEADROOM):
            return True
        return self._blocks.can_allocate(seq, prefix, reserve + self._shares.headroom(seq, queue, step))

    def _matched_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the prefix cache that `seq` may take up: none if every position of its prompt must be computed."""
        cache_key = "" if seq.adapter is None else self._adapters.cache_key(seq.adapter)
        if cache_key != seq.cache_key:
            seq.cache_key = cache_key
            seq.block_hashes.clear()
        return [] if seq.sampling.prompt_logprobs else self._blocks.match(seq)

    def is_held_for_prefix(self, seq: Sequence, now: float) -> bool:
        """True if a ready sequence does not start now because another is computing what it could take up."""
        return self._awaits_prefix(seq, self._matched_prefix(seq), now)

    def _awaits_prefix(self, seq: Sequence, prefix: list[int], now: float) -> bool:
        if (
            seq.sampling.prompt_logprobs
            or self._shares.is_aged(seq, now)
            or self._shares.is_overdue(queue_of(seq), now)
        ):
            return False
        coming = self._blocks.num_coming(seq, len(prefix))
        missing = self._blocks.blocks_for(len(seq.token_ids)) - len(prefix)
        return coming > 0 and coming * _AWAITED_PART >= missing

    def _must_wait_for_budget(self, seq: Sequence, prefix: list[int], plan: StepPlan) -> bool:
        """Without chunked prefill: the prompt does not fit beside the decodes of this step. It then goes first in the
        next one, and the decodes take what it leaves, but not in two steps running. Only a recomputation longer than
        any step is split."""
        if self._settings.chunked_prefill:
            return False
        missing = seq.num_tokens - len(prefix) * self._settings.block_size
        if min(missing, self._settings.step_budget) <= plan.budget:
            return False
        self.prefill_turn = not plan.prefill_first
        return True

    def _start(self, seq: Sequence, prefix: list[int], step: AdmissionStep) -> None:
        queue = queue_of(seq)
        self._queues.remove(seq)
        self._blocks.allocate(seq, prefix)
        seq.num_computed = len(prefix) * self._settings.block_size
        self._rows.start(seq)
        if not queue.running:
            self.rotation.start(queue, step.now)
            self._queues.note_started(queue)
        queue.running += 1
        self.num_started += 1
        if step.blocks_used is not None:
            step.blocks_used[queue] += len(seq.block_table)
        if seq.first_scheduled is None:
            seq.first_scheduled = step.now
            seq.num_cached = seq.num_computed
            self.num_prompt_tokens += seq.prompt_len
            self.num_cached_prompt_tokens += seq.num_cached
        self._compute(seq, step)
        step.is_open = bool(step.plan.budget and self._rows.free)

    def _compute(self, seq: Sequence, step: AdmissionStep) -> None:
        queue = queue_of(seq)
        count = step.plan.add(seq, self._shares.allowance(queue, step))
        queue.charge(seq, count)
        queue.served_at = step.now
        step.computed[queue] += count

    def _prefetch(self) -> None:
        """Name the adapters that come next and are not on the device yet."""
        refs: list[AdapterRef] = []
        for queue in islice(chain(self.rotation.claims, self._queues.idle(_MAX_LOOKED_UP)), _MAX_LOOKED_UP):
            ref = queue.ref
            if ref is None or queue.running or not queue.ready or ref in refs:
                continue
            if not self._adapters.is_on_device(ref) and self._adapters.is_ready(queue.ready[0].handle, ref):
                refs.append(ref)
            if len(refs) == _MAX_PREFETCHED:
                break
        if refs:
            self._adapters.prefetch(refs)
