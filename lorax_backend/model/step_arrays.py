"""StepArrays: a scheduled step in numpy, as `BatchBuilder.arrays` makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorax_backend.scheduler.sequence import ScheduledSequence

IntArray = npt.NDArray[np.int32]


@dataclass(slots=True)
class StepArrays:
    """A step in numpy. T tokens, S sequences, R rows that sample, P ids that only the device knows.

    Attributes:
        items: the sequences as their rows lie: of one token first, then chunks over a cached context, then prompts that
            begin here.
        ids: int32 [T], 0 where the device knows better.
        pending: int64 [P, 2], token row and runner slot of those.
        positions: int32 [T]. query_start: int32 [S + 1]. contexts: int32 [S], this step's tokens included.
        tables: int32 [S, blocks]. slot_mapping: int64 [T].
        adapters: int32 [S], adapter slot of each sequence, -1 for none.
        num_decodes: the leading sequences that have one row each.
        sampled: the sequences that sample, in batch order; row r of the logits belongs to sampled[r].
        sampled_slots: int64 [R], their runner slots.
        logit_rows: int64 [R], their token rows; None if every token row samples.
        scored: chunks of prompts whose log probabilities are wanted, with each one's first token row.
    """

    items: list[ScheduledSequence]
    ids: IntArray
    pending: npt.NDArray[np.int64]
    positions: IntArray
    query_start: IntArray
    contexts: IntArray
    tables: IntArray
    slot_mapping: npt.NDArray[np.int64]
    adapters: IntArray
    num_decodes: int
    sampled: list[ScheduledSequence]
    sampled_slots: npt.NDArray[np.int64]
    logit_rows: npt.NDArray[np.int64] | None
    scored: list[tuple[ScheduledSequence, int]]

    @property
    def num_tokens(self) -> int:
        return int(self.ids.size)

    def prefills(self) -> Iterator[tuple[int, int, int, int]]:
        """(sequence, first row, rows, context length) of every other sequence."""
        starts, contexts = self.query_start.tolist(), self.contexts.tolist()
        for i in range(self.num_decodes, len(contexts)):
            yield i, starts[i], starts[i + 1] - starts[i], contexts[i]

    @property
    def token_adapters(self) -> IntArray:
        """int32 [T]: adapter slot of every token row."""
        if self.adapters.size == 1:
            return np.full(self.num_tokens, self.adapters[0], dtype=np.int32)
        return np.repeat(self.adapters, np.diff(self.query_start))
