"""A step while it is being put together."""

from __future__ import annotations

from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence, Sequence


class StepPlan:
    """Which sequences compute what, and how many tokens may still be added (`budget`).

    `prefill_first` says that newcomers are given tokens before running sequences.
    """

    def __init__(self, budget: int, prefill_first: bool = False) -> None:
        self.budget = budget
        self.prefill_first = prefill_first
        self._total = budget
        self._decodes: list[ScheduledSequence] = []
        self._prefills: list[ScheduledSequence] = []
        self._handles: set[int] = set()

    def __contains__(self, seq: Sequence) -> bool:
        return seq.handle in self._handles

    def __len__(self) -> int:
        return len(self._handles)

    def add(self, seq: Sequence, at_most: int | None = None) -> int:
        """Compute as many of the sequence's missing tokens as the budget and `at_most` allow, at least one; how
        many."""
        start, end = seq.num_computed, seq.num_tokens
        count = min(end - start, self.budget if at_most is None else min(self.budget, at_most))
        sample = start + count == end
        item = ScheduledSequence(seq, start, count, sample, end - seq.prompt_len if sample else 0)
        (self._decodes if sample and count == 1 else self._prefills).append(item)
        self._handles.add(seq.handle)
        self.budget -= count
        return count

    def add_decode(self, seq: Sequence, num_tokens: int) -> None:
        """Compute the one missing token of a sequence of `num_tokens`: `add` for what a step mostly consists of."""
        self._decodes.append(ScheduledSequence(seq, num_tokens - 1, 1, True, num_tokens - seq.prompt_len))
        self._handles.add(seq.handle)
        self.budget -= 1

    def batch(self, finished_slots: list[int]) -> ScheduledBatch:
        return ScheduledBatch(self._decodes + self._prefills, self._total - self.budget, finished_slots)
