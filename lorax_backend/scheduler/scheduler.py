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
from collections.abc import Callable

from lorax_backend.errors import AdapterTooLargeError, LoraxError, OverloadedError
from lorax_backend.scheduler.admission import Admission
from lorax_backend.scheduler.block_manager import BlockManager
from lorax_backend.scheduler.deadlines import QueueDeadlines
from lorax_backend.scheduler.leases import AdapterRoom
from lorax_backend.scheduler.plan import StepPlan
from lorax_backend.scheduler.reclaim import RowReclaim
from lorax_backend.scheduler.rows import RunningRows
from lorax_backend.scheduler.sequence import (
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
    StepResult,
)
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.scheduler.step_size import StepSize
from lorax_backend.scheduler.waiting import WaitingQueues, queue_of
from lorax_backend.types import FinishReason, TokenOutput

_new_tuple = tuple.__new__


class Scheduler:
    """Owns every sequence from `add` to its end: its place in line, its row, its blocks. The engine thread's alone."""

    def __init__(
        self, settings: SchedulerSettings, adapters: AdapterRoom, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings
        self.blocks = BlockManager(settings.num_blocks, settings.block_size, settings.prefix_caching)
        self.num_preemptions = 0
        self.num_generated_tokens = 0
        self._adapters = adapters
        self._clock = clock
        self._sequences: dict[int, Sequence] = {}
        self._waiting = WaitingQueues(settings)
        self._deadlines = QueueDeadlines()
        self._rows = RunningRows(settings.num_rows)
        self._running = self._rows.sequences
        self._admission = Admission(settings, adapters, self._waiting, self._rows, self.blocks)
        self._leases = self._admission.leases
        self._reclaim = RowReclaim(
            settings,
            adapters,
            self._waiting,
            self._rows,
            self._admission.rotation,
            self._admission.is_held_for_prefix,
        )
        self._errors: list[TokenOutput] = []
        self._step_size = StepSize(settings, self._waiting, self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_started(self) -> int:
        """How often a sequence has been given a row, also anew after it was set back."""
        return self._admission.num_started

    @property
    def num_max_tokens(self) -> int:
        """Tokens that all running sequences have when each has as many as it may."""
        return sum([seq.max_total for seq in self._running])

    @property
    def num_prompt_tokens(self) -> int:
        return self._admission.num_prompt_tokens

    @property
    def num_cached_prompt_tokens(self) -> int:
        return self._admission.num_cached_prompt_tokens

    @property
    def has_work(self) -> bool:
        """True if a sequence runs or waits for nothing but room."""
        self._waiting.promote(self._adapters.is_ready, self._clock(), at_most=None)
        return bool(self._running or self._waiting.has_backlog)

    @property
    def next_deadline(self) -> float | None:
        """When a request gives up waiting, on the scheduler's clock; None if none will."""
        return self._deadlines.next()

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. Its adapter, if any, has been acquired; the scheduler releases it in the end.

        Raises:
            ValidationError: it could not run even alone.
            OverloadedError: too many wait for its adapter.
            ValueError: the handle is in use.
        """
        self.settings.check_fits(seq.prompt_len, seq.sampling.max_new_tokens)
        if seq.handle in self._sequences:
            raise ValueError(f"handle {seq.handle} is in use")
        queue = self._waiting.register(seq)
        cap = self.settings.max_queued_per_adapter
        # Those that were started already do not count: they were let in, and must not cost others their place.
        num_queued = queue.num_waiting - queue.preempted
        if cap and num_queued >= cap:
            raise OverloadedError(
                f"{num_queued} requests wait for {queue.name} already, and this server queues "
                f"max_queued_per_adapter={cap}; try again later"
            )
        self._sequences[seq.handle] = seq
        self._waiting.add(seq)
        self._deadlines.add(seq)

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
        now = self._clock()
        self._give_up(now)
        # While something runs, the adapters under way are looked at in turn; else the engine goes to sleep after this.
        limit = {} if self._running else {"at_most": None}
        self._waiting.promote(self._adapters.is_ready, now, **limit)
        for seq in self._reclaim.victims(now):
            self._preempt(seq)
        plan = StepPlan(self._step_size.budget(), prefill_first=self._admission.prefill_turn)
        self._admission.prefill_turn = False
        if plan.prefill_first:
            self._admission.fill(plan, self._prefilling(), now)
            self._decode(plan)
        else:
            self._admission.fill(plan, self._decode(plan), now)
        self._refuse_too_large()
        if not plan:
            return None
        self._note_prompts(plan)
        batch = plan.batch(self._rows.take_finished())
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
        outputs: list[TokenOutput] = []
        block_size, finished = self.settings.block_size, SequenceStatus.FINISHED
        sampled = [item.seq for item in batch.sequences if item.sample]
        drawn = zip(sampled, result.token_ids, result.logprobs, result.top_logprobs, strict=True)
        for entry, (seq, token, logprob, top) in enumerate(drawn):
            seq.num_in_flight -= 1
            if seq.status is finished:
                continue
            seq.token_ids.append(token)
            if seq.num_computed // block_size > seq.num_registered:
                self.blocks.register(seq)
            length, reason = len(seq.token_ids), None
            if length >= seq.max_total or token in seq.stop_token_ids:
                reason = _end(seq)
                if reason is not None:
                    self._finish(seq)
            # The tuple itself, since TokenOutput's own constructor takes twice as long.
            output = _new_tuple(
                TokenOutput, (seq.handle, token, logprob, top, reason, None, None, None, None)
            )
            if length == seq.prompt_len + 1:
                output = _with_first_token(output, seq, result.prompt_logprobs.get(entry))
            outputs.append(output)
        self.num_generated_tokens += len(outputs)
        self._leases.step_done()
        return outputs

    def fail(self, batch: ScheduledBatch, error: LoraxError, launched: bool) -> list[TokenOutput]:
        """End every sequence of a step that raised. `launched` is False if the newest step failed to start, True if
        the oldest one failed on the way. Nothing that it may have left in the prefix cache is kept."""
        outputs = []
        for item in batch.sequences:
            item.seq.num_in_flight -= item.sample
            item.seq.num_tokens -= item.sample
            outputs += self.end_with_error(item.seq.handle, error)
        self.blocks.reset_prefix_cache()
        if launched:
            self._leases.step_done()
        else:
            self._leases.step_not_launched()
            self._rows.finished.update(dict.fromkeys(batch.finished_slots))
        return outputs

    def abandon(self, batch: ScheduledBatch) -> None:
        """Drop the result of a step launched after one that failed, since it may have read what that one wrote. The
        step must have come to its end. Its sequences are preempted, so they lose time but nothing else."""
        for item in batch.sequences:
            item.seq.num_in_flight -= item.sample
            item.seq.num_tokens -= item.sample
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
        rows = sorted(self._rows.free + [seq.slot for seq in self._running])
        if rows != list(range(self.settings.num_rows)):
            raise RuntimeError(
                f"row accounting is off: {len(self._rows.free)} free, {len(self._running)} running"
            )
        if len(self._running) + len(self._waiting) != len(self._sequences):
            raise RuntimeError(
                f"sequence accounting is off: {len(self._running)} running + {len(self._waiting)} waiting are not "
                f"{len(self._sequences)}"
            )

    def _decode(self, plan: StepPlan) -> list[Sequence]:
        """Schedule the next token of sequences whose prompt has been computed; the other running ones."""
        prefilling: list[Sequence] = []
        add, running = plan.decodes.append, SequenceStatus.RUNNING
        room, planned = plan.budget, plan.handles if plan.prefill_first else ()
        for seq in self._running[:]:  # a copy: preemption shortens the list
            num_tokens = seq.num_tokens
            if num_tokens - seq.num_computed != 1:
                prefilling.append(seq)
            elif (
                room
                and num_tokens < seq.max_total  # or its last token is under way
                and seq.status is running
                and seq.handle not in planned
                and (num_tokens <= seq.capacity or self._make_room(seq, plan))
            ):
                add(ScheduledSequence(seq, num_tokens - 1, 1, True, num_tokens - seq.prompt_len))
                # Nothing takes the sequence out of the plan again. Its blocks are registered by `update`: the step
                # that is put together here may not share what it writes itself.
                seq.num_computed = num_tokens
                seq.num_in_flight += 1
                seq.num_tokens += 1
                seq.queue.counter += seq.token_cost  # type: ignore[union-attr]
                room -= 1
        plan.budget = room
        return prefilling

    def _note_prompts(self, plan: StepPlan) -> None:
        """The step is complete: what it computes of prompts may be shared by the next."""
        self._step_size.note(plan)
        for item in plan.prompts:
            seq = item.seq
            seq.num_computed = item.start + item.count
            seq.num_in_flight += item.sample
            seq.num_tokens += item.sample
            if seq.num_computed // self.settings.block_size > seq.num_registered:
                self.blocks.register(seq)

    def _prefilling(self) -> list[Sequence]:
        """Running sequences whose prompt, or what must be computed again, is not computed to its end."""
        return [seq for seq in self._running if seq.num_tokens - seq.num_computed != 1]

    def _make_room(self, seq: Sequence, plan: StepPlan) -> bool:
        """Get the block of the next token of `seq`, preempting others while there is none; False if `seq` itself had
        to be preempted. A victim is never in the plan, since `seq` at least is not in it yet."""
        while not self.blocks.can_append(seq, seq.num_tokens):
            victim = self._rows.victim(plan)
            self._preempt(victim)
            if victim is seq:
                return False
        self.blocks.append(seq, seq.num_tokens)
        return True

    def _give_up(self, now: float) -> None:
        for seq in self._deadlines.take_expired(now):
            message = (
                f"the request waited {now - seq.arrival:.1f} s in the queue without being started "
                f"(queue_timeout_s={seq.queue_timeout_s:g}); try again later"
            )
            self._errors += self.end_with_error(seq.handle, OverloadedError(message))

    def _refuse_too_large(self) -> None:
        refused, self._admission.too_large = self._admission.too_large, []
        for seq in refused:
            message = (
                f"adapter_id: {seq.adapter} needs more room than this server's device has for all adapters"
            )
            self._errors += self.end_with_error(seq.handle, AdapterTooLargeError(message))

    def _finish(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self._stop_running(seq)
        else:
            self._waiting.remove(seq)
            if not queue_of(seq).ready:
                self._admission.rotation.withdraw(queue_of(seq))
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
        self._rows.stop(seq)
        self.blocks.free(seq)
        seq.num_computed = 0
        queue = queue_of(seq)
        queue.running -= 1
        if not queue.running:
            queue.served_at = self._clock()
            self._admission.rotation.stop(queue)
            self._waiting.note_stopped(queue)


def _end(seq: Sequence) -> FinishReason | None:
    """Why the last known token is the last of all, if it is."""
    generated, sampling = len(seq.token_ids) - seq.prompt_len, seq.sampling
    if generated >= sampling.max_new_tokens:
        return FinishReason.LENGTH
    if seq.token_ids[-1] in sampling.stop_token_ids and generated > sampling.min_new_tokens:
        return FinishReason.EOS
    return None


def _with_first_token(
    output: TokenOutput, seq: Sequence, prompt_logprobs: tuple[float, ...] | None
) -> TokenOutput:
    """What is told once for each sequence."""
    assert seq.first_scheduled is not None
    return output._replace(
        cached_tokens=seq.num_cached,
        queue_s=seq.first_scheduled - seq.arrival,
        prompt_logprobs=prompt_logprobs if seq.sampling.prompt_logprobs else None,
    )
