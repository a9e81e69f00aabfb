"""How many tokens a step may compute."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from lorax_backend.scheduler.plan import StepPlan
from lorax_backend.scheduler.sequence import Sequence
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.scheduler.waiting import WaitingQueues


class StepSize:
    """Of a few prompts, those that decode meanwhile feel less if they come in small steps than all at once."""

    def __init__(
        self, settings: SchedulerSettings, waiting: WaitingQueues, running: SequenceOf[Sequence]
    ) -> None:
        """`running` is the scheduler's own list."""
        self._settings = settings
        self._waiting = waiting
        self._running = running
        self._has_chunks = False  # the last step left some prompt unfinished

    def budget(self) -> int:
        """Tokens of the next step; see `SchedulerSettings.small_step_tokens`."""
        settings, running = self._settings, len(self._running)
        small = min(settings.small_step_tokens, settings.step_budget)
        if (
            not settings.chunked_prefill
            or not 0 < running <= small // 2
            or not (self._has_chunks or self._waiting.has_backlog)
        ):
            return settings.step_budget
        tokens = sum([seq.num_tokens - seq.num_computed for seq in self._running])
        tokens += self._waiting.backlog_tokens(2 * small)
        return small if small < tokens <= 2 * small + running else settings.step_budget

    def note(self, plan: StepPlan) -> None:
        """This step is going to be launched."""
        self._has_chunks = not all(item.sample for item in plan.prompts)
