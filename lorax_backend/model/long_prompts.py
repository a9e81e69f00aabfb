"""Attention of long prompts by cuDNN, which computes sequences of one length.

cuDNN makes a plan for each shape, in tens of milliseconds, so only shapes of a short list are ever asked of it, and all
of these before the first request. The rows of a prompt are cut to fit, not padded: with a causal mask the first n rows
of a prompt see nothing behind them, so they are a whole problem of length n, and the rows that are left over see a
cached context like those of any chunk. Nothing outside a prompt's own rows is read, so a neighbour's numbers, whatever
they are, cannot get in.

torch keeps plans by thread: the thread that calls `LongPrompts.attend` first is the one that must go on calling it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lorax_backend.model.head_layout import HeadLayout
from lorax_kernels import AttentionBatch, paged_attention

DenseFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Causal attention of sequences of one length: q [B, Hq, L, D], k and v [B, Hkv, L, D], factor of the scores ->
[B, Hq, L, D]. The last dimension of each is contiguous."""
Shape = tuple[int, int]
"""Sequences and rows of each."""

SHORTEST = 1024
"""Rows from which on a prompt is worth a call of its own: fewer leave half of a large GPU idle."""
_TOGETHER = {512: (4, 6, 8, 12, 16), 1024: (2, 3, 4, 6, 8), 2048: (2, 3, 4)}
"""Numbers of prompts of exactly one length that go into one call, by that length."""
_STEPS_AN_OCTAVE = 8
_SPLIT = "long prompts"


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows `first` to `last` of a step: `shape` of cuDNN's, or, without, rows for the paged kernel."""

    first: int
    last: int
    shape: Shape | None = None


@dataclass(frozen=True, slots=True)
class _Split:
    """How the rows of a step are shared out.

    Attributes:
        runs: all rows, in order.
        first: the first row of cuDNN's.
        slots: int64 on the device, where the keys of the rows from `first` to the last of cuDNN's lie in the cache.
        rest: the rows of the paged kernel one after another, as a batch; None if there are none.
    """

    runs: tuple[_Run, ...]
    first: int
    slots: torch.Tensor
    rest: AttentionBatch | None


class LongPrompts:
    """Sends the long prompts that begin in a step through a function for sequences of one length, and all other rows
    through the paged kernel. `shapes` are those the function is called with."""

    def __init__(self, function: DenseFunction, refusal: Callable[[torch.Tensor, int], str | None]) -> None:
        """Nothing is called yet.

        Args:
            refusal: given queries [1, Hq, L, D] and a number of key heads, why the function cannot take such; None if
                it can.
        """
        self._function = function
        self._refusal = refusal
        self._row = 0
        self.shapes: frozenset[Shape] = frozenset()
        self._lengths: list[int] = []

    def fit(self, layout: HeadLayout, max_tokens: int) -> None:
        """Choose the shapes for a model and steps of up to `max_tokens`.

        Raises:
            ValueError: this is not for such a model or such steps.
        """
        if any(window is not None for window in layout.windows):
            raise ValueError("it has no sliding windows")
        if max_tokens < SHORTEST:
            raise ValueError(
                f"max_batch_tokens is {max_tokens}, and it gains with prompts of {SHORTEST} or more"
            )
        q = torch.empty(
            1, layout.num_heads, SHORTEST, layout.head_dim, dtype=layout.dtype, device=layout.device
        )
        reason = self._refusal(q, layout.num_kv_heads)
        if reason is not None:
            raise ValueError(reason)
        self._row = (layout.num_heads + 2 * layout.num_kv_heads) * layout.head_dim
        self.keep(_shapes(max_tokens))

    def keep(self, shapes: frozenset[Shape]) -> None:
        """Call the function with these alone."""
        self.shapes = shapes
        self._lengths = sorted(length for count, length in shapes if count == 1)

    def attend(
        self,
        queries: torch.Tensor,
        values: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        batch: AttentionBatch,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """`lorax_backend.model.attention.attend`."""
        # Other strides would be another shape to cuDNN. The model's values are the end of a row of q, k and v.
        split = self._split(batch) if window is None and values.stride(0) == self._row else None
        if split is None:
            return paged_attention(queries, *cache, batch, scale, window)
        # Keys were rotated on their way to the cache and are nowhere else.
        keys = cache[0].view(-1, *cache[0].shape[2:]).index_select(0, split.slots)
        rest = None
        if split.rest is not None:
            own = _joined([queries[run.first : run.last] for run in split.runs if run.shape is None])
            rest = paged_attention(own, *cache, split.rest, scale, None)
        parts, at = [], 0
        for run in split.runs:
            rows = run.last - run.first
            if run.shape is not None:
                mine = slice(run.first - split.first, run.last - split.first)
                parts.append(
                    self._dense(
                        run.shape,
                        queries[run.first : run.last],
                        keys[mine],
                        values[run.first : run.last],
                        scale,
                    )
                )
            elif rest is not None:
                parts.append(rest[at : at + rows])
                at += rows
        return _joined(parts)

    def _dense(
        self, shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q [B * L, Hq, D], k and v [B * L, Hkv, D] of B sequences of L rows -> [B * L, Hq, D]."""

        def heads_first(rows: torch.Tensor) -> torch.Tensor:
            return rows.view(*shape, *rows.shape[1:]).transpose(1, 2)

        out = self._function(heads_first(q), heads_first(k), heads_first(v), scale)
        return out.transpose(1, 2).reshape(q.shape)

    def _split(self, batch: AttentionBatch) -> _Split | None:
        """Worked out once a step; None if no prompt is long enough."""
        if _SPLIT not in batch.cache:
            batch.cache[_SPLIT] = self._find_split(batch)
        split = batch.cache[_SPLIT]
        assert split is None or isinstance(split, _Split)
        return split

    def _find_split(self, batch: AttentionBatch) -> _Split | None:
        starts, contexts = batch.query_start_host, batch.context_lens_host
        counts = np.diff(starts)
        lengths = np.where(counts == contexts, counts, 0).tolist()  # of prompts that begin here
        if max(lengths, default=0) < min(length for _, length in self.shapes or {(1, 1 << 62)}):
            return None
        left = counts.copy()  # rows of each sequence that the paged kernel computes: its last
        calls: list[_Run] = []
        for index, shape in self._calls(lengths):
            first = int(starts[index])
            calls.append(_Run(first, first + shape[0] * shape[1], shape))
            left[index : index + shape[0]] -= shape[1]
        if not calls:
            return None
        first, last = calls[0].first, calls[-1].last
        return _Split(
            runs=tuple(_all_rows(calls, int(starts[-1]))),
            first=first,
            slots=batch.slot_mapping[first:last].clamp_min(0),  # rows in between may store nothing
            rest=_rest(batch, left),
        )

    def _calls(self, lengths: list[int]) -> Iterator[tuple[int, Shape]]:
        """(first sequence, shape) of every call, for the lengths of a step's prompts, 0 for what is none."""
        index = 0
        for length, group in itertools.groupby(lengths):
            count = len(list(group))
            fitting = [number for number in _TOGETHER.get(length, ()) if (number, length) in self.shapes]
            for number in sorted(fitting, reverse=True):
                while count >= number:
                    yield index, (number, length)
                    index, count = index + number, count - number
            place = bisect.bisect_right(self._lengths, length)
            for _ in range(count):
                if place:
                    yield index, (1, self._lengths[place - 1])
                index += 1


def _shapes(max_tokens: int) -> frozenset[Shape]:
    """What can be asked for in steps of up to `max_tokens`. Between a power of two and the next there are eight
    lengths, so that at most an eighth of a prompt is left over."""
    shapes = {(count, length) for length, counts in _TOGETHER.items() for count in counts}
    octave = SHORTEST
    while octave <= max_tokens:
        shapes |= {(1, length) for length in range(octave, 2 * octave, octave // _STEPS_AN_OCTAVE)}
        octave *= 2
    return frozenset((count, length) for count, length in shapes if count * length <= max_tokens)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _all_rows(calls: list[_Run], rows: int) -> Iterator[_Run]:
    """`calls` and the runs of rows before, between and behind them."""
    at = 0
    for call in (*calls, _Run(rows, rows)):
        if call.first > at:
            yield _Run(at, call.first)
        if call.shape is not None:
            yield call
        at = call.last


def _rest(batch: AttentionBatch, left: np.ndarray[tuple[int], np.dtype[np.int32]]) -> AttentionBatch | None:
    """The last `left[i]` rows of every sequence i, packed. It stores nothing: that has been done."""
    kept = np.flatnonzero(left)
    if not kept.size:
        return None
    starts = np.concatenate(([0], np.cumsum(left[kept]))).astype(np.int32)
    return AttentionBatch.build(
        starts,
        batch.context_lens_host[kept],
        batch.block_tables_host[kept],
        np.full(starts[-1], -1, dtype=np.int64),
        batch.query_start.device,
    )
