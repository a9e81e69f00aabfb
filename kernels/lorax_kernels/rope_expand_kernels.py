"""The rotary embedding and the cache's writing of queries, keys and values, adding their LoRA deltas on the way: as the
nodes of `expand_node_kernels`, for the product before attention."""

from __future__ import annotations

import triton
import triton.language as tl

from lorax_kernels.expand_node_kernels import _LISTED, _token_record, delta_of_row
from lorax_kernels.fused_triton import rope_and_store, rope_tables, sum_of_planes
from lorax_kernels.lora_kernels import _split_shift


@triton.jit(do_not_specialize=_LISTED)
def rope_expand_kernel(
    qkv_ptr, positions_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr,
    h_ptr, b_ptr, work_ptr, stride_qkv, stride_table, eps, stride_page, stride_b, tokens_at, pages_at, plane_rows,
    max_pages,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, QK_NORM: tl.constexpr,
    MAX_SHIFT: tl.constexpr, TARGET_LOG2: tl.constexpr, PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of qkv + h B, a program up to BLOCK_H heads of one of the three slices of a row; D is a power of two. With
    `PLANES` qkv is their sum.

    All columns of the heads lie side by side until the delta is added: B, [8, columns], is then summed over its ranks
    inside threads, where 256 columns are a warp's.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    Q_TILES: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    KV_TILES: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    which = (tile >= Q_TILES).to(tl.int32) + (tile >= Q_TILES + KV_TILES).to(tl.int32)
    end = HEADS + which * KV_HEADS
    begin = tl.where(which == 0, 0, end - KV_HEADS)
    begin += (tile - tl.where(which == 0, 0, Q_TILES + (which - 1) * KV_TILES)) * BLOCK_H
    column = begin * D + tl.arange(0, BLOCK_H * D)
    seen = column < end * D
    d = tl.arange(0, D // 2)
    rank = tl.arange(0, 8)
    cos, sin, slot = rope_tables(positions_ptr, cos_ptr, sin_ptr, slots_ptr, row, d, stride_table, D)
    position, page_list, num_pages, page = _token_record(work_ptr, tokens_at, pages_at, row)
    splits = 1 << _split_shift(tl.load(work_ptr + 3), 3, TARGET_LOG2, MAX_SHIFT)
    b_where = rank[:, None] * stride_b + column[None, :]
    b = tl.load(
        b_ptr + page.to(tl.int64) * stride_page + b_where, mask=seen[None, :] & (num_pages > 0), other=0.0
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PLANES > 0:
        x = sum_of_planes(qkv_ptr, row, column, seen, (HEADS + 2 * KV_HEADS) * D, PLANES)
        x = x.to(q_out_ptr.dtype.element_ty)
    else:
        x = tl.load(qkv_ptr + row * stride_qkv + column, mask=seen, other=0.0)
    delta = delta_of_row(
        b, b_ptr, b_where, seen, page_list, num_pages, stride_page, h_ptr + (position * 3 + which) * max_pages * 8,
        splits, plane_rows * 3 * max_pages * 8, 1 << MAX_SHIFT,
    )  # fmt: skip
    x = (x.to(tl.float32) + delta).to(x.dtype)
    first, second = tl.split(tl.permute(tl.reshape(x, (BLOCK_H, 2, D // 2)), (0, 2, 1)))
    head = begin + tl.arange(0, BLOCK_H)
    # Beyond its slice a program has nothing to store: those heads are another's.
    head = tl.where(head < end, head, HEADS + 2 * KV_HEADS)
    rope_and_store(
        first, second, row, head, d, cos, sin, slot, q_norm_ptr, k_norm_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, eps,
        HEADS, KV_HEADS, D, QK_NORM,
    )  # fmt: skip
