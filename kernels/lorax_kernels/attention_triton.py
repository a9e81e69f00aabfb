"""Attention over the paged KV cache in Triton: what a CUDA device runs.

Decode splits the context of every sequence over programs (Flash-Decoding, Dao et al. 2023), and the last program of a
sequence to finish combines the parts, so that one launch does it whatever the lengths. Prefill is the tiled online
softmax of Flash Attention (Dao 2023) over blocks found through the block table. Both pack the query heads that share a
key head into the rows of one matrix product, so that every key is read once for its group.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch
import triton
import triton.language as tl

from lorax_kernels.configs import AttentionConfig, launch_options
from lorax_kernels.metadata import AttentionBatch, IntArray
from lorax_kernels.sizes import cdiv, next_power_of_2
from lorax_kernels.tuning import attention_config, node_config

_LOG2E = 1.4426950408889634
_MAX_SPLITS = 32


@triton.jit
def _write_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    stride_k,
    stride_v,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = (column < WIDTH) & (slot >= 0)
    k = tl.load(k_ptr + row * stride_k + column, mask=seen)
    v = tl.load(v_ptr + row * stride_v + column, mask=seen)
    tl.store(k_cache_ptr + slot * WIDTH + column, k, mask=seen)
    tl.store(v_cache_ptr + slot * WIDTH + column, v, mask=seen)


@triton.jit
def _blocks_of(table_ptr, start, last, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Cache blocks of the positions [start, start + BLOCK_N), 0 from `last` on."""
    position = start + tl.arange(0, BLOCK_N)
    return tl.load(table_ptr + position // BLOCK_SIZE, mask=position < last, other=0)


@triton.jit
def _attend_block(
    q, k_base, v_base, block, start, last, row_position, acc, row_max, row_sum,
    stride_block, stride_token, qk_scale,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Keys [start, start + BLOCK_N) of one key head against the rows of q; positions from `last` on do not exist."""
    position = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    exists = position < last
    token = block.to(tl.int64) * stride_block + (position % BLOCK_SIZE) * stride_token
    if D == BLOCK_D:
        k = tl.load(k_base + token[None, :] + d[:, None], mask=exists[None, :], other=0.0)
        v = tl.load(v_base + token[:, None] + d[None, :], mask=exists[:, None], other=0.0)
    else:
        k = tl.load(k_base + token[None, :] + d[:, None], mask=exists[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(v_base + token[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)
    scores = tl.dot(q, k, input_precision="ieee") * qk_scale
    if MASKED:
        seen = exists[None, :] & (position[None, :] <= row_position[:, None])
        if WINDOW > 0:
            seen &= position[None, :] > row_position[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # A row that has seen no key yet has a maximum of -inf, and -inf - -inf is no number.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores - safe_max[:, None])
    shrink = tl.exp2(row_max - safe_max)
    row_sum = row_sum * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=("stride_table",))
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, stat_ptr, counter_ptr, table_ptr, context_ptr,
    stride_q, stride_q_head, stride_block, stride_token, stride_head, stride_out, stride_table, qk_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
    WINDOW: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_ptr + sequence)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context - WINDOW, 0) // BLOCK_N * BLOCK_N
    length = context - begin
    each = tl.cdiv(tl.maximum(tl.cdiv(length, SPLITS), MIN_SPLIT), BLOCK_N) * BLOCK_N
    active = tl.cdiv(length, each)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    inside = (g < GROUP)[:, None] & (d < D)[None, :]
    where_out = sequence.to(tl.int64) * stride_out + (head * GROUP + g)[:, None] * D + d[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()  # what comes before reads only what no kernel of the step writes
    if split < active:
        where_q = sequence.to(tl.int64) * stride_q + (head * GROUP + g)[:, None] * stride_q_head + d[None, :]
        q = tl.load(q_ptr + where_q, mask=inside, other=0.0)
        acc = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
        row_max = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros((BLOCK_G,), dtype=tl.float32)
        row_position = tl.zeros((BLOCK_G,), dtype=tl.int32) + (context - 1)
        first = begin + split * each
        last = tl.minimum(first + each, context)
        table = table_ptr + sequence.to(tl.int64) * stride_table
        block = _blocks_of(table, first, last, BLOCK_N, BLOCK_SIZE)
        for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
            here = block
            block = _blocks_of(table, start + BLOCK_N, last, BLOCK_N, BLOCK_SIZE)
            acc, row_max, row_sum = _attend_block(
                q, k_ptr + head * stride_head, v_ptr + head * stride_head, here, start, last, row_position,
                acc, row_max, row_sum, stride_block, stride_token, qk_scale,
                BLOCK_SIZE, D, BLOCK_D, BLOCK_N, True, WINDOW,
            )  # fmt: skip
        if active == 1:
            result = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + where_out, result, mask=inside)
        else:
            cell = (sequence * HEADS + head) * SPLITS
            part = part_ptr + (cell + split).to(tl.int64) * BLOCK_G * BLOCK_D
            tl.store(part + g[:, None] * BLOCK_D + d[None, :], acc)
            tl.store(stat_ptr + (cell + split) * 2 * BLOCK_G + g, row_max)
            tl.store(stat_ptr + (cell + split) * 2 * BLOCK_G + BLOCK_G + g, row_sum)
            # All threads' stores come before the count that publishes them.
            tl.debug_barrier()
            arrived = tl.atomic_add(counter_ptr + sequence * HEADS + head, 1, sem="acq_rel")
            if arrived == active - 1:
                total = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
                best = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
                denominator = tl.zeros((BLOCK_G,), dtype=tl.float32)
                for other in range(active):
                    stat = stat_ptr + (cell + other) * 2 * BLOCK_G + g
                    part_max = tl.load(stat, cache_modifier=".cg")
                    part_sum = tl.load(stat + BLOCK_G, cache_modifier=".cg")
                    part = part_ptr + (cell + other).to(tl.int64) * BLOCK_G * BLOCK_D
                    values = tl.load(part + g[:, None] * BLOCK_D + d[None, :], cache_modifier=".cg")
                    new_best = tl.maximum(best, part_max)
                    safe = tl.where(new_best == float("-inf"), 0.0, new_best)
                    old_share = tl.exp2(best - safe)
                    share = tl.exp2(part_max - safe)
                    total = total * old_share[:, None] + values * share[:, None]
                    denominator = denominator * old_share + part_sum * share
                    best = new_best
                result = (total / denominator[:, None]).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + where_out, result, mask=inside)
                tl.store(counter_ptr + sequence * HEADS + head, 0)


@triton.jit(do_not_specialize=("stride_table",))
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, tile_ptr, table_ptr, context_ptr, query_start_ptr,
    stride_q, stride_q_head, stride_block, stride_token, stride_head, stride_out, stride_table, qk_scale,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sequence = tl.load(tile_ptr + tl.program_id(0) * 2)
    tile_start = tl.load(tile_ptr + tl.program_id(0) * 2 + 1)
    head = tl.program_id(1)
    context = tl.load(context_ptr + sequence)
    first = tl.load(query_start_ptr + sequence)
    count = tl.load(query_start_ptr + sequence + 1) - first
    # Rows are (token, query head of the group) pairs, token by token.
    packed = tile_start + tl.arange(0, BLOCK_M)
    token = packed // GROUP
    query_head = head * GROUP + packed % GROUP
    d = tl.arange(0, BLOCK_D)
    inside = (token < count)[:, None] & (d < D)[None, :]
    row = (first + token).to(tl.int64)
    q = tl.load(
        q_ptr + row[:, None] * stride_q + query_head[:, None] * stride_q_head + d[None, :],
        mask=inside,
        other=0.0,
    )
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    offset = context - count
    row_position = offset + token
    first_position = offset + tile_start // GROUP
    last = tl.minimum(offset + (tile_start + BLOCK_M - 1) // GROUP + 1, context)
    begin = 0
    plain_end = (first_position + 1) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        plain_end = begin
    table = table_ptr + sequence.to(tl.int64) * stride_table
    k_base = k_ptr + head * stride_head
    v_base = v_ptr + head * stride_head
    block = _blocks_of(table, begin, last, BLOCK_N, BLOCK_SIZE)
    for start in tl.range(begin, plain_end, BLOCK_N, num_stages=STAGES):
        here = block
        block = _blocks_of(table, start + BLOCK_N, last, BLOCK_N, BLOCK_SIZE)
        acc, row_max, row_sum = _attend_block(
            q, k_base, v_base, here, start, last, row_position, acc, row_max, row_sum,
            stride_block, stride_token, qk_scale, BLOCK_SIZE, D, BLOCK_D, BLOCK_N, False, WINDOW,
        )  # fmt: skip
    for start in tl.range(plain_end, last, BLOCK_N, num_stages=STAGES):
        here = block
        block = _blocks_of(table, start + BLOCK_N, last, BLOCK_N, BLOCK_SIZE)
        acc, row_max, row_sum = _attend_block(
            q, k_base, v_base, here, start, last, row_position, acc, row_max, row_sum,
            stride_block, stride_token, qk_scale, BLOCK_SIZE, D, BLOCK_D, BLOCK_N, True, WINDOW,
        )  # fmt: skip
    acc = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]  # rows past the last token saw nothing
    where = row[:, None] * stride_out + query_head[:, None] * D + d[None, :]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=inside)


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """`lorax_kernels.write_kv` on a device. Heads of a row must be contiguous in k, v and the caches."""
    width = k.shape[1] * k.shape[2]
    for tensor in (k, v):
        if tensor.stride(2) != 1 or tensor.stride(1) != k.shape[2]:
            raise ValueError("write_kv: the heads of one token must be contiguous")
    block = min(1024, next_power_of_2(width))
    _write_kv_kernel[(k.shape[0], cdiv(width, block))](
        k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0), WIDTH=width, BLOCK=block, num_warps=2
    )


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
    config: AttentionConfig | None = None,
) -> torch.Tensor:
    """`lorax_kernels.paged_attention` on a device."""
    config = config or attention_config(_padded(batch.num_decodes), q.device.index)
    if q.stride(2) != 1 or k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError("paged_attention: head_dim must be contiguous and both caches laid out alike")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch.num_decodes:
        _decode(q, (k_cache, v_cache), batch, scale * _LOG2E, sliding_window or 0, out, config)
    if batch.fixed is not None or batch.num_decodes < batch.num_sequences:
        _prefill(q, (k_cache, v_cache), batch, scale * _LOG2E, sliding_window or 0, out, config)
    return out


def _decode(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    batch: AttentionBatch,
    qk_scale: float,
    window: int,
    out: torch.Tensor,
    config: AttentionConfig,
) -> None:
    k_cache, v_cache = caches
    heads, dim = k_cache.shape[2], k_cache.shape[3]
    group = q.shape[1] // heads
    block_g, block_d = max(16, next_power_of_2(group)), next_power_of_2(dim)
    splits = _decode_splits(_padded(batch.num_decodes) * heads, config.waves * _num_sms(q.device.index))
    space = _workspace(q.device, batch.num_decodes * heads, splits, block_g, block_d)
    pdl = node_config(q.device.index).pdl
    contexts = batch.context_lens if batch.fixed is None else batch.fixed.decode_contexts
    _decode_kernel[(batch.num_decodes, heads, splits)](
        q, k_cache, v_cache, out, *space, batch.block_tables, contexts,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), out.stride(0),
        batch.block_tables.stride(0), qk_scale,
        HEADS=heads, GROUP=group, BLOCK_G=block_g, BLOCK_SIZE=k_cache.shape[1], D=dim, BLOCK_D=block_d,
        BLOCK_N=_block_n(config.block_n, block_d, q.dtype), SPLITS=splits, MIN_SPLIT=config.min_split, WINDOW=window,
        STAGES=config.stages, PDL=pdl, num_warps=config.warps, num_stages=1, **launch_options(pdl),
    )  # fmt: skip


def _prefill(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    batch: AttentionBatch,
    qk_scale: float,
    window: int,
    out: torch.Tensor,
    config: AttentionConfig,
) -> None:
    k_cache, v_cache = caches
    heads, dim = k_cache.shape[2], k_cache.shape[3]
    group = q.shape[1] // heads
    block_d = next_power_of_2(dim)
    wide = _is_wide(block_d, q.dtype)
    block_m = 64 if wide else config.prefill_block_m
    tiles = _prefill_tiles(batch, group, block_m, q.device) if batch.fixed is None else batch.fixed.tiles
    _prefill_kernel[(tiles.shape[0], heads)](
        q, k_cache, v_cache, out, tiles, batch.block_tables, batch.context_lens, batch.query_start,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), out.stride(0),
        batch.block_tables.stride(0), qk_scale,
        GROUP=group, BLOCK_M=block_m, BLOCK_SIZE=k_cache.shape[1], D=dim, BLOCK_D=block_d,
        BLOCK_N=_block_n(config.prefill_block_n, block_d, q.dtype), WINDOW=window,
        STAGES=2 if wide else config.prefill_stages, num_warps=4 if wide else config.prefill_warps, num_stages=1,
    )  # fmt: skip


def _block_n(wanted: int, block_d: int, dtype: torch.dtype) -> int:
    """Keys of a tile, so that the pipelined tiles of K and V fit in shared memory."""
    return max(16, min(wanted, wanted * 128 * 2 // (block_d * dtype.itemsize)))


def _padded(num_decodes: int) -> int:
    """The number of decodes that the launch is chosen for: one that graphs are captured for, so that a step beside
    them needs no kernel that has not been compiled."""
    return next_power_of_2(num_decodes) if num_decodes <= 8 else cdiv(num_decodes, 8) * 8


def _decode_splits(cells: int, programs: int) -> int:
    """Programs a (sequence, key head) pair's context may be split over: a power of two, about `programs` in all."""
    wanted = max(1, programs // max(cells, 1))
    return max(2, min(_MAX_SPLITS, next_power_of_2(wanted)))


def _is_wide(block_d: int, dtype: torch.dtype) -> bool:
    return block_d > 128 or dtype == torch.float32


def tile_rows(num_decodes: int, head_dim: int, dtype: torch.dtype, device: int | None) -> int:
    """Packed rows, (token, query head of the group) pairs, of a prefill tile in a batch of `num_decodes` decodes."""
    if _is_wide(next_power_of_2(head_dim), dtype):
        return 64
    return attention_config(_padded(num_decodes), device).prefill_block_m


def list_tiles(prefills: Iterable[tuple[int, int, int, int]], group: int, block_m: int) -> IntArray:
    """int32 [tiles, 2]: sequence and first packed row of every tile of `AttentionBatch.prefills`, the ones with most
    keys first."""
    prefills = list(prefills)
    if len(prefills) == 1 and group <= block_m:  # each tile sees more keys than the one before
        ((i, _, count, _),) = prefills
        starts = np.arange(0, count * group, block_m, dtype=np.int32)[::-1]
        tiles = np.full((starts.size, 2), i, dtype=np.int32)
        tiles[:, 1] = starts
        return tiles
    listed = []
    for i, _, count, context in prefills:
        starts = np.arange(0, count * group, block_m, dtype=np.int64)
        listed.append(np.stack((np.full_like(starts, i), starts, context - count + starts // group), axis=1))
    if not listed:
        return np.zeros((0, 2), dtype=np.int32)
    table = np.concatenate(listed)
    return np.ascontiguousarray(table[np.argsort(-table[:, 2], kind="stable"), :2].astype(np.int32))


def _prefill_tiles(batch: AttentionBatch, group: int, block_m: int, device: torch.device) -> torch.Tensor:
    key = ("tiles", group, block_m)
    tiles = batch.cache.get(key)
    if not isinstance(tiles, torch.Tensor):
        tiles = torch.from_numpy(list_tiles(batch.prefills(), group, block_m))
        if device.type == "cuda":
            tiles = tiles.pin_memory().to(device, non_blocking=True)
        batch.cache[key] = tiles
    return tiles


_spaces: dict[tuple[torch.device, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}


def _workspace(
    device: torch.device, cells: int, splits: int, block_g: int, block_d: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parts, their statistics, and arrival counters that every launch leaves at zero. Kept, because a captured graph
    holds the addresses; launches on one stream may share them."""
    key = (device, block_g, block_d)
    space = _spaces.get(key)
    needed = cells * splits * block_g * block_d
    if space is None or space[0].numel() < needed or space[2].numel() < cells:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("paged_attention: run the largest batch once before capturing a graph")
        cells = max(cells, 0 if space is None else space[2].numel())
        parts = max(needed, 0 if space is None else space[0].numel())
        space = (
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.empty(2 * parts // block_d, dtype=torch.float32, device=device),
            torch.zeros(cells, dtype=torch.int32, device=device),
        )
        _retired.append(_spaces.get(key))
        _spaces[key] = space
    return space


_retired: list[object] = []  # graphs captured with a smaller space still point at it


@functools.cache
def _num_sms(index: int | None) -> int:
    if index is None:
        return 4
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
