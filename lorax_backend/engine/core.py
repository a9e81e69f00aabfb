"""The engine's core: requests in, one step at a time, tokens out. Knows neither torch nor threads nor Triton."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from lorax_backend.engine.protocols import ADAPTER_COMMANDS, AdapterProvider, ModelRunner, StepHandle
from lorax_backend.engine.step_counters import StepCounters
from lorax_backend.errors import EngineDeadError, GenerationError, LoraxError, ValidationError
from lorax_backend.scheduler.scheduler import Scheduler
from lorax_backend.scheduler.sequence import ScheduledBatch, Sequence
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.types import EngineRequest, EngineStats, TokenOutput

_log = logging.getLogger(__name__)

COMMANDS = ("stats", "adapters", "check", "reset_prefix_cache")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`depth` is the number of steps launched before the oldest is read: 1, or 2 to overlap the host's work with the
    device's. After `max_failures` failed steps in a row the engine gives up. Token ids of a prompt are checked against
    `vocab_size` unless it is None: one that no embedding has would fail the step, and with it everyone else in it."""

    scheduler: SchedulerSettings
    depth: int = 1
    max_failures: int = 3
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.depth not in (
            1,
            2,
        ):  # a step knows its input token or takes the last one drawn; no more is kept
            raise ValueError(f"depth must be 1 or 2, not {self.depth}")


class EngineCore:
    """Owns the scheduler and the steps in flight. All methods are called from one thread."""

    def __init__(
        self,
        runner: ModelRunner,
        adapters: AdapterProvider,
        settings: EngineSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.adapters = adapters
        self.scheduler = Scheduler(settings.scheduler, adapters, clock)
        self._runner = runner
        self._settings = settings
        self._clock = clock
        self._in_flight: deque[tuple[ScheduledBatch, StepHandle, float]] = deque()
        self._counters = StepCounters(clock)
        self._num_failures = 0
        self._stalled = False

    def add(self, request: EngineRequest) -> list[TokenOutput]:
        """Queue a request; an output only if it is refused at once."""
        seq = Sequence.from_request(request, self._clock())
        if seq.adapter is not None:
            seq.adapter = self.adapters.resolve(seq.adapter)
        try:
            self._check_token_ids(request.prompt_ids)
            self.scheduler.add(seq)
        except LoraxError as error:
            return [TokenOutput(request.handle, None, error=error.to_dict())]
        if seq.adapter is not None:
            try:
                self.adapters.acquire(request.handle, seq.adapter, request.api_token)
            except LoraxError as error:
                return self.scheduler.end_with_error(request.handle, error)
        return []

    def cancel(self, handle: int) -> None:
        """End a request without outputs; unknown handles are ignored."""
        self.scheduler.cancel(handle)

    @property
    def stalled(self) -> bool:
        """True if the last `step` found nothing to launch and nothing to read."""
        return self._stalled

    @property
    def has_work(self) -> bool:
        """True if a sequence runs or could; False if only a new request or a loaded adapter can help."""
        return bool(self._in_flight) or self.scheduler.has_work

    @property
    def patience_s(self) -> float | None:
        """Seconds until a request gives up waiting in the queue; None if none will."""
        deadline = self.scheduler.next_deadline
        return None if deadline is None else max(0.0, deadline - self._clock())

    def step(self) -> list[TokenOutput]:
        """Compute one step, or read one: the new tokens, and ends of sequences.

        Raises:
            EngineDeadError: too many steps in a row failed, or the device was lost.
        """
        outputs = self._end_requests_without_adapter()
        started = self.scheduler.num_started
        batch = self.scheduler.schedule()
        outputs += self.scheduler.take_errors()
        self._stalled = batch is None and not self._in_flight
        if batch is not None:
            outputs += self._launch(batch, self.scheduler.num_started - started)
        if self._in_flight and (batch is None or len(self._in_flight) >= self._settings.depth):
            outputs += self._read()
        return outputs

    def control(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run a control command between two steps.

        Raises:
            ValidationError: unknown command or arguments.
            GenerationError: `check` found accounting that is off.
        """
        if command.startswith("adapter_"):
            return self.adapters.control(command, arguments)
        if command not in COMMANDS:
            known = ", ".join((*COMMANDS, *ADAPTER_COMMANDS))
            raise ValidationError(f"command: {command!r} is not one of {known}")
        if arguments:
            raise ValidationError(f"{command}: takes no arguments, got {', '.join(map(str, arguments))}")
        if command == "stats":
            return asdict(self.stats())
        if command == "adapters":
            return {"adapters": self.adapters.describe()}
        if command == "check":
            self.check_integrity()
        else:
            self.scheduler.blocks.reset_prefix_cache()
        return {"ok": True}

    def check_integrity(self) -> None:
        """Check that every block, row and adapter is accounted for.

        Raises:
            GenerationError: naming everything that is wrong.
        """
        try:
            self.scheduler.check_integrity()
            self.adapters.check()
        except RuntimeError as error:
            raise GenerationError(str(error)) from error

    def stats(self) -> EngineStats:
        scheduler, blocks, adapters = self.scheduler, self.scheduler.blocks, self.adapters.stats()
        return EngineStats(
            waiting=scheduler.num_waiting,
            running=scheduler.num_running,
            blocks_total=blocks.num_blocks,
            blocks_used=blocks.num_used,
            blocks_cached=blocks.num_cached,
            adapter_pages_total=adapters["pages_total"],
            adapter_pages_used=adapters["pages_used"],
            adapters_on_device=adapters["on_device"],
            adapters_loading=adapters["loading"],
            adapter_loads=adapters["loads"],
            adapter_evictions=adapters["evictions"],
            adapter_tiers=adapters,
            steps=self._counters.num_succeeded,
            step_counts=self._counters.as_dict(),
            max_tokens=scheduler.num_max_tokens,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_prompt_tokens=scheduler.num_cached_prompt_tokens,
            generated_tokens=scheduler.num_generated_tokens,
        )

    def close(self) -> None:
        """Stop the adapters' threads and free the device memory."""
        self._drain()
        try:
            self.adapters.close()
        finally:
            self._runner.close()

    def _check_token_ids(self, token_ids: list[int]) -> None:
        size = self._settings.vocab_size
        if size is not None and token_ids and not 0 <= min(token_ids) <= max(token_ids) < size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < size)
            raise ValidationError(
                f"input_ids: {wrong} is not a token of this model; its ids are 0 to {size - 1}"
            )

    def _end_requests_without_adapter(self) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        for failure in self.adapters.poll():
            outputs += self.scheduler.end_with_error(failure.handle, failure.error)
        return outputs

    def _launch(self, batch: ScheduledBatch, num_started: int) -> list[TokenOutput]:
        launched_at = self._counters.launch(batch, num_started)
        try:
            handle = self._runner.launch(batch)
        except Exception as error:
            return self.scheduler.fail(batch, self._step_failed(error, batch), launched=False)
        self._in_flight.append((batch, handle, launched_at))
        return []

    def _read(self) -> list[TokenOutput]:
        batch, handle, launched_at = self._in_flight.popleft()
        try:
            outputs = self.scheduler.update(batch, handle.result())
        except Exception as error:
            later = self._drain()
            outputs = self.scheduler.fail(batch, self._step_failed(error, batch), launched=True)
            for abandoned in later:
                self.scheduler.abandon(abandoned)
            return outputs
        self._counters.end(batch, launched_at)
        self._num_failures = 0
        return outputs

    def _drain(self) -> list[ScheduledBatch]:
        """Wait until the device has nothing left to do; the results are dropped."""
        batches = []
        while self._in_flight:
            batch, handle, _ = self._in_flight.popleft()
            with suppress(Exception):
                handle.result()
            batches.append(batch)
        return batches

    def _check_device(self, reason: str) -> None:
        try:
            self._runner.check_device()
        except Exception as error:
            raise EngineDeadError(
                f"the device cannot be used any more ({type(error).__name__}: {error}), since a step failed with "
                f"{reason}"
            ) from error

    def _step_failed(self, error: Exception, batch: ScheduledBatch) -> LoraxError:
        self._num_failures += 1
        self._counters.fail(batch)
        _log.exception("step of %d sequences and %d tokens failed", len(batch.sequences), batch.num_tokens)
        reason = f"{type(error).__name__}: {error}"
        if self._num_failures >= self._settings.max_failures:
            raise EngineDeadError(
                f"{self._num_failures} steps in a row failed, the last with {reason}"
            ) from error
        if not self._in_flight:
            self._check_device(reason)
        return GenerationError(f"the step that computed this request failed: {reason}")
