"""Attention of a step: which kernel sees which rows.

Rows over a cached context, decodes and chunks alike, go through `lorax_kernels.paged_attention`. Prompts that begin in
this step (*fresh*: all their keys are the step's own) may go through another implementation: one that takes packed
sequences of different lengths, or `LongPrompts`, which takes some of their rows. `varlen` finds one and proves it.
`BatchBuilder` puts the fresh sequences last, so that the parts of a mixed step are two runs of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lorax_backend.model.long_prompts import LongPrompts
from lorax_kernels import AttentionBatch, paged_attention

VarlenFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float, "int | None"], torch.Tensor
]
"""Causal attention of packed sequences: q [T, Hq, D], k and v [T, Hkv, D], first row of each sequence and T as int32
[S + 1] on the device, length of the longest, factor of the scores, sliding window in tokens or None -> [T, Hq, D]. The
last dimension of each is contiguous; k and v may have other strides."""
FreshFunction = VarlenFunction | LongPrompts

_PLAN = "fresh"


@dataclass(frozen=True, slots=True)
class FreshRows:
    """The fresh sequences of a step, which are its last.

    Attributes:
        first_row: the first token row that belongs to them.
        starts: int32 [fresh sequences + 1] on the device, counted from `first_row`.
        slots: int64 [fresh rows] on the device, where their keys lie in the cache.
        longest: rows of the longest.
        rest: the batch of all rows before `first_row`; None if there are none.
    """

    first_row: int
    starts: torch.Tensor
    slots: torch.Tensor
    longest: int
    rest: AttentionBatch | None


def fresh_rows(batch: AttentionBatch) -> FreshRows | None:
    """The trailing sequences of `batch` that see only their own rows; None if there are none.

    Worked out once a step. A sequence of one row counts as a decode, also if it is all of a prompt.
    """
    if _PLAN not in batch.cache:
        batch.cache[_PLAN] = _find_fresh(batch)
    plan = batch.cache[_PLAN]
    assert plan is None or isinstance(plan, FreshRows)
    return plan


def attend(
    queries: torch.Tensor,
    values: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    function: FreshFunction | None,
) -> torch.Tensor:
    """Causal attention of the step's rows, whose keys and values are in the cache already.

    Args:
        queries: [T, Hq, D].
        values: [T, Hkv, D], those of the step's rows, with any strides but a contiguous last dimension.
        cache: keys and values of the layer, each [N, block_size, Hkv, D].
        function: for fresh sequences; None sends them through the paged kernel like all others. It takes no part in
            what is captured as a graph.

    Returns:
        [T, Hq, D].
    """
    if function is None or batch.fixed is not None:
        return paged_attention(queries, *cache, batch, scale, window)
    if isinstance(function, LongPrompts):
        return function.attend(queries, values, cache, batch, scale, window)
    fresh = fresh_rows(batch)
    if fresh is None:
        return paged_attention(queries, *cache, batch, scale, window)
    first = fresh.first_row
    # Keys were rotated on their way to the cache and are nowhere else.
    keys = cache[0].view(-1, *cache[0].shape[2:]).index_select(0, fresh.slots)
    out = function(queries[first:], keys, values[first:], fresh.starts, fresh.longest, scale, window)
    if fresh.rest is None:
        return out
    return torch.cat((paged_attention(queries[:first], *cache, fresh.rest, scale, window), out))


def _find_fresh(batch: AttentionBatch) -> FreshRows | None:
    starts = batch.query_start_host
    counts = np.diff(starts)
    others = np.flatnonzero((counts <= 1) | (counts != batch.context_lens_host))
    first = int(others[-1]) + 1 if others.size else 0
    if first == counts.size:
        return None
    row = int(starts[first])
    return FreshRows(
        first_row=row,
        starts=batch.query_start[first:] - row if row else batch.query_start,
        slots=batch.slot_mapping[row:].clamp_min(0),  # a row that stores nothing has no key to see
        longest=int(counts[first:].max()),
        rest=_leading(batch, first, row) if first else None,
    )


def _leading(batch: AttentionBatch, count: int, rows: int) -> AttentionBatch:
    """The first `count` sequences of a batch."""
    host_starts, host_contexts = batch.query_start_host[: count + 1], batch.context_lens_host[:count]
    return AttentionBatch(
        query_start=batch.query_start[: count + 1],
        context_lens=batch.context_lens[:count],
        block_tables=batch.block_tables[:count],
        slot_mapping=batch.slot_mapping[:rows],
        num_decodes=batch.num_decodes,
        max_query=int(np.diff(host_starts).max()),
        max_context=int(host_contexts.max()),
        query_start_host=host_starts,
        context_lens_host=host_contexts,
        block_tables_host=batch.block_tables_host[:count],
    )
