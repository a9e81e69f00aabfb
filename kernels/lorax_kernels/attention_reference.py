"""Torch twins of the attention kernels: ground truth of the tests, and what a CPU runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorax_kernels.metadata import AttentionBatch

_VIEW_MIN_CONTEXT = 128  # from here on, products on views of the cache beat one gathered, padded batch
_GROUP_SPREAD = 1.3  # sequences whose context lengths differ by less share one padded gather


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Store k, v [T, Hkv, D] in the caches [N, block_size, Hkv, D] at `slot_mapping` int64 [T]; -1 stores nothing."""
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slot_mapping, v)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal attention of the step's rows over the paged cache, which already holds this step's keys and values.

    Args:
        q: [T, Hq, D]; query heads [g * Hq // Hkv, (g + 1) * Hq // Hkv) share key head g.
        k_cache: [N, block_size, Hkv, D].
        v_cache: like `k_cache`.
        batch: where rows and contexts lie.
        scale: factor of the scores.
        sliding_window: a row sees only the last `sliding_window` positions up to its own; None: all.

    Returns:
        [T, Hq, D], a new tensor.
    """
    out = torch.empty_like(q)
    plan = batch.cache.get(sliding_window)
    if not isinstance(plan, _DecodePlan):
        plan = batch.cache[sliding_window] = _plan_decode(batch, k_cache.shape[1], q.dtype, sliding_window)
    for view in plan.views:
        _decode_view(q, k_cache, v_cache, view, scale, out)
    for group in plan.groups:
        _decode_group(q, k_cache, v_cache, group, scale, out)
    for i, first, count, context in batch.prefills():
        _prefill(
            q[first : first + count],
            k_cache,
            v_cache,
            batch.block_tables[i],
            context,
            scale,
            sliding_window,
            out[first : first + count],
        )
    return out


@dataclass(slots=True)
class _View:
    """A decode whose context is tokens [first_token, last_token) of one run of consecutive blocks."""

    row: int
    first_block: int
    last_block: int
    first_token: int
    last_token: int


@dataclass(slots=True)
class _Group:
    """Decodes of similar context length, gathered together: blocks int64 [len(rows) * width].

    Where lengths differ, `hidden` int64 indexes the gathered positions nobody may see and `mask` [rows, 1, 1, keys] is
    added to the scores. Hidden positions are also overwritten: another sequence may have left a NaN there.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    mask: torch.Tensor | None
    hidden: torch.Tensor | None


@dataclass(slots=True)
class _DecodePlan:
    views: list[_View]
    groups: list[_Group]


def _plan_decode(
    batch: AttentionBatch, block_size: int, dtype: torch.dtype, window: int | None
) -> _DecodePlan:
    views: list[_View] = []
    rest: list[tuple[int, int, int]] = []  # blocks spanned, sequence, first block of the span
    tables = batch.block_tables_host
    for i in range(batch.num_decodes):
        context = int(batch.context_lens_host[i])
        start = max(0, context - window) if window else 0
        begin, end = start // block_size, -(-context // block_size)
        run = tables[i, begin:end]
        if context - start >= _VIEW_MIN_CONTEXT and bool((run[1:] - run[:-1] == 1).all()):
            offset = begin * block_size
            views.append(_View(i, int(run[0]), int(run[-1]) + 1, start - offset, context - offset))
        else:
            rest.append((end - begin, i, begin))
    rest.sort()
    groups: list[_Group] = []
    while rest:
        limit = max(rest[0][0] * _GROUP_SPREAD, rest[0][0] + 2)
        size = sum(1 for item in rest if item[0] <= limit)
        groups.append(_make_group(batch, rest[:size], block_size, dtype, window))
        rest = rest[size:]
    return _DecodePlan(views, groups)


def _make_group(
    batch: AttentionBatch,
    items: list[tuple[int, int, int]],
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
) -> _Group:
    width = items[-1][0]
    sequences = torch.tensor([i for _, i, _ in items])
    begins = torch.tensor([begin for _, _, begin in items])
    tables = torch.from_numpy(batch.block_tables_host)[sequences].long()
    columns = (begins[:, None] + torch.arange(width)).clamp_max(tables.shape[1] - 1)
    contexts = torch.from_numpy(batch.context_lens_host)[sequences].long()
    position = begins[:, None] * block_size + torch.arange(width * block_size)
    seen = position < contexts[:, None]
    if window:
        seen &= position >= (contexts - window)[:, None]
    mask = hidden = None
    if not bool(seen.all()):
        hidden = (~seen).flatten().nonzero()[:, 0]
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))[:, None, None]
    blocks = tables.gather(1, columns)
    used = columns * block_size < contexts[:, None]
    return _Group(sequences, torch.where(used, blocks, blocks[:, :1]).flatten(), mask, hidden)


def _decode_view(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    view: _View,
    scale: float,
    out: torch.Tensor,
) -> None:
    heads, dim = k_cache.shape[2], k_cache.shape[3]
    keys = k_cache[view.first_block : view.last_block].view(-1, heads, dim)[
        view.first_token : view.last_token
    ]
    values = v_cache[view.first_block : view.last_block].view(-1, heads, dim)[
        view.first_token : view.last_token
    ]
    # The query heads of a key head are the rows of one product: no key is repeated.
    scores = torch.bmm(q[view.row].view(heads, -1, dim) * scale, keys.permute(1, 2, 0))
    torch.bmm(torch.softmax(scores, -1), values.transpose(0, 1), out=out[view.row].view(heads, -1, dim))


def _decode_group(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    group: _Group,
    scale: float,
    out: torch.Tensor,
) -> None:
    heads, dim = k_cache.shape[2], k_cache.shape[3]
    size = group.rows.numel()
    keys = k_cache.index_select(0, group.blocks).view(-1, heads, dim)
    values = v_cache.index_select(0, group.blocks).view(-1, heads, dim)
    if group.hidden is not None:
        keys.index_fill_(0, group.hidden, 0)
        values.index_fill_(0, group.hidden, 0)
    keys = keys.view(size, -1, heads, dim).transpose(1, 2)
    values = values.view(size, -1, heads, dim).transpose(1, 2)
    rows = q.index_select(0, group.rows).view(size, heads, -1, dim)
    result = F.scaled_dot_product_attention(rows, keys, values, attn_mask=group.mask, scale=scale)
    out.index_copy_(0, group.rows, result.reshape(size, *q.shape[1:]))


def _prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    context: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    block_size, heads, dim = k_cache.shape[1:]
    rows = q.shape[0]
    offset = context - rows
    start = max(0, offset - window + 1) if window else 0
    begin, end = start // block_size, -(-context // block_size)
    blocks = table[begin:end].long()
    length = context - begin * block_size
    keys = k_cache.index_select(0, blocks).view(-1, heads, dim)[:length].transpose(0, 1)[None]
    values = v_cache.index_select(0, blocks).view(-1, heads, dim)[:length].transpose(0, 1)[None]
    mask = None
    if length != rows or window:
        row = torch.arange(offset, context)[:, None]
        column = torch.arange(begin * block_size, context)
        mask = column <= row
        if window:
            mask &= column > row - window
    result = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != heads,
    )
    out.copy_(result[0].transpose(0, 1))
