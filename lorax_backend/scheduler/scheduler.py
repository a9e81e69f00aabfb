"""The scheduler: which sequences compute which tokens in the next step.

Overlap. `schedule` may be called for step k+1 before `update` for step k. Sequences of step k then count as one token
longer than is known (`num_in_flight`), and step k+1 takes that token on the device. What follows from it:
- A sequence that ends in `update` may be in a later launched step. That step's token for it is dropped.
- A sequence that is preempted may have a token under way. The token is right, so it is kept when it arrives, and the
  sequence is not admitted again before that. No work is lost and no token is drawn twice.
- Blocks and rows are given away at once, because steps run in launch order (see block_manager); adapters are not (see
  leases).
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable

from lorax_backend.errors import AdapterTooLargeError, LoraxError
from lorax_backend.scheduler.block_manager import BlockManager
from lorax_backend.scheduler.leases import AdapterLeases, AdapterRoom
from lorax_backend.scheduler.plan import StepPlan
from lorax_backend.scheduler.sequence import ScheduledBatch, Sequence, SequenceStatus, StepResult
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.scheduler.waiting import WaitingQueue
from lorax_backend.types import AdapterRef, FinishReason, TokenOutput

_MAX_REFUSALS = 32  # of one step, so that a long queue without room costs little


class Scheduler:
    """Owns every sequence from `add` to its end: its place in line, its row, its blocks. The engine thread's alone."""

    def __init__(
        self, settings: SchedulerSettings, adapters: AdapterRoom, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings
        self.blocks = BlockManager(settings.num_blocks, settings.block_size, settings.prefix_caching)
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._adapters = adapters
        self._leases = AdapterLeases(adapters)
        self._clock = clock
        self._sequences: dict[int, Sequence] = {}
        self._waiting = WaitingQueue(settings.priority_weight_s)
        self._running: list[Sequence] = []  # in serving order
        self._free_rows = list(range(settings.num_rows - 1, -1, -1))
        self._finished_rows: dict[int, None] = {}
        self._prefill_turn = False
        self._errors: list[TokenOutput] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """True if a sequence runs or waits for nothing but room."""
        self._waiting.promote(self._adapters.is_ready)
        return bool(self._running or self._waiting.num_ready)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. Its adapter, if any, has been acquired; the scheduler releases it in the end.

        Raises:
            ValidationError: it could not run even alone.
            ValueError: the handle is in use.
        """
        self.settings.check_fits(seq.prompt_len, seq.sampling.max_new_tokens)
        if seq.handle in self._sequences:
            raise ValueError(f"handle {seq.handle} is in use")
        self._sequences[seq.handle] = seq
        self._waiting.add(seq)

    def cancel(self, handle: int) -> bool:
        """End a sequence without an output; False if there is none."""
        seq = self._sequences.get(handle)
        if seq is None:
            return False
        self._finish(seq)
        return True

    def end_with_error(self, handle: int, error: LoraxError) -> list[TokenOutput]:
        """End a sequence with an error; no output if there is none."""
        return [TokenOutput(handle, None, error=error.to_dict())] if self.cancel(handle) else []

    def take_errors(self) -> list[TokenOutput]:
        """Ends of sequences that `schedule` found impossible to serve."""
        errors, self._errors = self._errors, []
        return errors

    def schedule(self) -> ScheduledBatch | None:
        """The next step, or None if nothing can be computed now. The caller launches it before anything else, and
        later calls `update`, `fail` or `abandon` for it, in the order of the steps."""
        self._waiting.promote(self._adapters.is_ready)
        plan = StepPlan(self.settings.step_budget, prefill_first=self._prefill_turn)
        self._prefill_turn = False
        if plan.prefill_first:
            self._admit(plan)
            self._continue(plan)
        else:
            self._continue(plan)
            self._admit(plan)
        if not plan:
            return None
        batch = plan.batch(list(self._finished_rows))
        self._finished_rows.clear()
        for item in batch.sequences:
            item.seq.num_computed = item.start + item.count
            item.seq.num_in_flight += item.sample
            self.blocks.register(item.seq)
        self._leases.step_launched()
        return batch

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[TokenOutput]:
        """Take in what the oldest launched step drew; the new tokens, and ends by length or stop token.

        Raises:
            RuntimeError: the result is not one of this batch; nothing was changed.
        """
        if not batch.num_sampled == len(result.token_ids) == len(result.logprobs) == len(result.top_logprobs):
            raise RuntimeError(
                f"the step drew {len(result.token_ids)} tokens for {batch.num_sampled} sequences"
            )
        outputs = []
        draws = enumerate(zip(result.token_ids, result.logprobs, result.top_logprobs, strict=True))
        for item in batch.sequences:
            if item.sample:
                entry, drawn = next(draws)
                item.seq.num_in_flight -= 1
                if item.seq.status is not SequenceStatus.FINISHED:
                    outputs.append(self._append(item.seq, *drawn, result.prompt_logprobs.get(entry)))
        self._leases.step_done()
        return outputs

    def fail(self, batch: ScheduledBatch, error: LoraxError, launched: bool) -> list[TokenOutput]:
        """End every sequence of a step that raised. `launched` is False if the newest step failed to start, True if
        the oldest one failed on the way. Nothing that it may have left in the prefix cache is kept."""
        outputs = []
        for item in batch.sequences:
            item.seq.num_in_flight -= item.sample
            outputs += self.end_with_error(item.seq.handle, error)
        self.blocks.reset_prefix_cache()
        if launched:
            self._leases.step_done()
        else:
            self._leases.step_not_launched()
            self._finished_rows.update(dict.fromkeys(batch.finished_slots))
        return outputs

    def abandon(self, batch: ScheduledBatch) -> None:
        """Drop the result of a step launched after one that failed, since it may have read what that one wrote. The
        step must have come to its end. Its sequences are preempted, so they lose time but nothing else."""
        for item in batch.sequences:
            item.seq.num_in_flight -= item.sample
            if item.seq.status is SequenceStatus.RUNNING:
                self._preempt(item.seq)
        self.blocks.reset_prefix_cache()
        self._leases.step_done()

    def check_integrity(self) -> None:
        """Check that rows and blocks are all accounted for.

        Raises:
            RuntimeError: naming everything that is wrong.
        """
        self.blocks.check_integrity(self._sequences.values())
        rows = sorted(self._free_rows + [seq.slot for seq in self._running])
        if rows != list(range(self.settings.num_rows)):
            raise RuntimeError(
                f"row accounting is off: {len(self._free_rows)} free, {len(self._running)} running"
            )
        if len(self._running) + len(self._waiting) != len(self._sequences):
            raise RuntimeError(
                f"sequence accounting is off: {len(self._running)} running + {len(self._waiting)} waiting are not "
                f"{len(self._sequences)}"
            )

    def _continue(self, plan: StepPlan) -> None:
        """Schedule what runs already: decodes first, then prompts that are not computed to their end yet."""
        prefilling = []
        for seq in list(self._running):  # a copy: preemption shortens the list at its end
            if seq.status is not SequenceStatus.RUNNING or seq in plan or _awaits_last_token(seq):
                continue
            if seq.num_tokens - seq.num_computed > 1:
                prefilling.append(seq)
            elif plan.budget and self._make_room(seq, plan):
                plan.add(seq)
        for seq in prefilling:
            if plan.budget and seq.status is SequenceStatus.RUNNING:
                plan.add(seq)

    def _make_room(self, seq: Sequence, plan: StepPlan) -> bool:
        """Get the block of the next token of `seq`, preempting the last in serving order while there is none; False
        if that is `seq` itself. A victim is never in the plan, since `seq` at least is not in it yet."""
        if seq.num_tokens <= len(seq.block_table) * self.settings.block_size:
            return True
        while not self.blocks.can_append(seq, seq.num_tokens):
            victim = next(other for other in reversed(self._running) if other not in plan)
            self._preempt(victim)
            if victim is seq:
                return False
        self.blocks.append(seq, seq.num_tokens)
        return True

    def _admit(self, plan: StepPlan) -> None:
        """Let waiting sequences run, in serving order. One that finds no room is skipped, but only for `skip_bound_s`:
        after that nothing behind it is admitted, so that room gathers for it."""
        now, refusals = self._clock(), 0
        crowded_out: set[AdapterRef] = set()
        for seq in self._waiting.ready():
            if not plan.budget or not self._free_rows or refusals == _MAX_REFUSALS:
                return
            ref = seq.adapter
            if (
                seq.num_in_flight
                or ref in crowded_out
                or not (ref is None or self._adapters.is_ready(seq.handle, ref))
            ):
                continue
            prefix = self._matched_prefix(seq)
            if self._must_wait_for_budget(seq, prefix, plan):
                return
            if not self.blocks.can_allocate(seq, prefix, self._reserve()):
                pass
            elif self._leases.take(seq):
                self._start(seq, prefix, now)
                plan.add(seq)
                continue
            elif ref is not None:
                crowded_out.add(ref)
                if not self._adapters.fits(ref):
                    self._refuse(seq, ref)
                    continue
            refusals += 1
            if self._waiting.blocked_for(seq, now) > self.settings.skip_bound_s:
                return

    def _matched_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the prefix cache that `seq` may take up: none if every position of its prompt must be computed."""
        cache_key = "" if seq.adapter is None else self._adapters.cache_key(seq.adapter)
        if cache_key != seq.cache_key:
            seq.cache_key = cache_key
            seq.block_hashes.clear()
        return [] if seq.sampling.prompt_logprobs else self.blocks.match(seq)

    def _must_wait_for_budget(self, seq: Sequence, prefix: list[int], plan: StepPlan) -> bool:
        """Without chunked prefill: the prompt does not fit beside the decodes of this step. It then goes first in the
        next one, and the decodes take what it leaves, but not in two steps running. Only a recomputation longer than
        any step is split."""
        if self.settings.chunked_prefill:
            return False
        missing = seq.num_tokens - len(prefix) * self.settings.block_size
        if min(missing, self.settings.step_budget) <= plan.budget:
            return False
        self._prefill_turn = not plan.prefill_first
        return True

    def _reserve(self) -> int:
        """Blocks that a newcomer must leave: about what the running sequences grow by in the next few steps, so that
        it is not preempted as soon as it has started. Nothing runs: nothing to leave, so that anything can start."""
        return len(self._running) // 4 + 1 if self._running else 0

    def _start(self, seq: Sequence, prefix: list[int], now: float) -> None:
        self._waiting.remove(seq)
        self.blocks.allocate(seq, prefix)
        seq.num_computed = len(prefix) * self.settings.block_size
        seq.slot = self._free_rows.pop()
        seq.status = SequenceStatus.RUNNING
        insort(self._running, seq, key=self._waiting.key)
        if seq.first_scheduled is None:
            seq.first_scheduled = now
            seq.num_cached = seq.num_computed
            self.num_prompt_tokens += seq.prompt_len
            self.num_cached_prompt_tokens += seq.num_cached

    def _refuse(self, seq: Sequence, ref: AdapterRef) -> None:
        message = f"adapter_id: {ref} needs more room than this server's device has for all adapters"
        self._errors += self.end_with_error(seq.handle, AdapterTooLargeError(message))

    def _append(
        self,
        seq: Sequence,
        token_id: int,
        logprob: float | None,
        top_logprobs: tuple[tuple[int, float], ...] | None,
        prompt_logprobs: tuple[float, ...] | None,
    ) -> TokenOutput:
        seq.token_ids.append(token_id)
        self.num_generated_tokens += 1
        generated, sampling = seq.num_generated, seq.sampling
        reason = None
        if generated >= sampling.max_new_tokens:
            reason = FinishReason.LENGTH
        elif token_id in sampling.stop_token_ids and generated > sampling.min_new_tokens:
            reason = FinishReason.EOS
        self.blocks.register(seq)
        if reason is not None:
            self._finish(seq)
        if generated > 1 or seq.first_scheduled is None:
            return TokenOutput(seq.handle, token_id, logprob, top_logprobs, reason)
        queue_s = seq.first_scheduled - seq.arrival
        return TokenOutput(
            seq.handle,
            token_id,
            logprob,
            top_logprobs,
            reason,
            None,
            seq.num_cached,
            queue_s,
            prompt_logprobs if seq.sampling.prompt_logprobs else None,
        )

    def _finish(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self._stop_running(seq)
        else:
            self._waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        del self._sequences[seq.handle]
        self._leases.give_back(seq, over=True)

    def _preempt(self, seq: Sequence) -> None:
        self.num_preemptions += 1
        seq.num_preemptions += 1
        self._stop_running(seq)
        seq.status = SequenceStatus.WAITING
        self._waiting.add(seq)
        self._leases.give_back(seq, over=False)

    def _stop_running(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self.blocks.free(seq)
        self._free_rows.append(seq.slot)
        self._finished_rows[seq.slot] = None
        seq.slot = -1
        seq.num_computed = 0


def _awaits_last_token(seq: Sequence) -> bool:
    """The tokens under way are the last that were asked for."""
    return seq.num_tokens - seq.prompt_len >= seq.sampling.max_new_tokens
