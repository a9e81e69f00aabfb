"""Paged attention and the cache's writing as Triton kernels; `attention_triton` launches them and says how they go."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_kv_kernel(
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
def decode_kernel(
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
def prefill_kernel(
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
