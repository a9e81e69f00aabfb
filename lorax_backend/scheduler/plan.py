"""A step while it is being put together."""

from __future__ import annotations

from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence, Sequence


class StepPlan:
    """Which sequences compute what, and how many tokens may still be added (`budget`).

    `decodes` are the sequences that compute one token and draw the next, `prefills` all others; `prompts`
    are those of both that `add` put there. `prefill_first` says that newcomers are given tokens before running
    sequences.
    """

    def __init__(self, budget: int, prefill_first: bool = False) -> None:
        self.budget = budget
        self.prefill_first = prefill_first
        self._total = budget
        self.decodes: list[ScheduledSequence] = []
        self.prefills: list[ScheduledSequence] = []
        self.prompts: list[ScheduledSequence] = []

    def __len__(self) -> int:
        return len(self.decodes) + len(self.prefills)

    @property
    def handles(self) -> set[int]:
        """Of the sequences in it. Asked for seldom, so it is made then and not kept up to date."""
        return {item.seq.handle for items in (self.decodes, self.prefills) for item in items}

    def add(self, seq: Sequence, at_most: int | None = None) -> int:
        """Compute as many of the sequence's missing tokens as the budget and `at_most` allow, at least one; how
        many."""
        start, end = seq.num_computed, seq.num_tokens
        count = min(end - start, self.budget if at_most is None else min(self.budget, at_most))
        sample = start + count == end
        item = ScheduledSequence(seq, start, count, sample, end - seq.prompt_len if sample else 0)
        (self.decodes if sample and count == 1 else self.prefills).append(item)
        self.prompts.append(item)
        self.budget -= count
        return count

    def batch(self, finished_slots: list[int]) -> ScheduledBatch:
        return ScheduledBatch(self.decodes + self.prefills, self._total - self.budget, finished_slots)
