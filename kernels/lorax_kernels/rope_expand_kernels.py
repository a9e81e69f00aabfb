"""The rotary embedding and the cache's writing of queries, keys and values, adding their LoRA deltas on the way: as the
nodes of `expand_node_kernels`, for the product before attention."""

from __future__ import annotations

import triton
import triton.language as tl

from lorax_kernels.expand_node_kernels import _LISTED, _sum_of_splits, _token_record
from lorax_kernels.fused_triton import rope_and_store, rope_tables, sum_of_planes
from lorax_kernels.lora_kernels import _split_shift


@triton.jit(do_not_specialize=_LISTED)
def rope_expand_kernel(
    qkv_ptr, positions_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr,
    h_ptr, b_ptr, work_ptr, stride_qkv, stride_table, eps, stride_page, stride_b, tokens_at, pages_at, plane_rows,
    max_pages,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    QK_NORM: tl.constexpr, MAX_SHIFT: tl.constexpr, TARGET_LOG2: tl.constexpr, PLANES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Of qkv + h B, a program some heads of a row. With `PLANES` qkv is their sum."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)  # over half a head
    rank = tl.arange(0, 8)
    head_seen = head < HEADS + 2 * KV_HEADS
    seen = head_seen[:, None] & (d < D // 2)[None, :]
    cos, sin, slot = rope_tables(positions_ptr, cos_ptr, sin_ptr, slots_ptr, row, d, stride_table, D)
    position, page_list, num_pages, page = _token_record(work_ptr, tokens_at, pages_at, row)
    splits = 1 << _split_shift(tl.load(work_ptr + 3), 3, TARGET_LOG2, MAX_SHIFT)
    slice_of_head = (head >= HEADS).to(tl.int32) + (head >= HEADS + KV_HEADS).to(tl.int32)
    inside = head[:, None] * D + d[None, :]
    b_where = (rank * stride_b)[:, None, None] + inside[None, :, :]
    b_page = b_ptr + page.to(tl.int64) * stride_page + b_where
    b_seen = seen[None, :, :] & (num_pages > 0)
    b_first = tl.load(b_page, mask=b_seen, other=0.0)
    b_second = tl.load(b_page + D // 2, mask=b_seen, other=0.0)
    dtype = q_out_ptr.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PLANES > 0:
        first = sum_of_planes(qkv_ptr, row, inside, seen, (HEADS + 2 * KV_HEADS) * D, PLANES).to(dtype)
        second = sum_of_planes(qkv_ptr, row, inside + D // 2, seen, (HEADS + 2 * KV_HEADS) * D, PLANES).to(
            dtype
        )
    else:
        first = tl.load(qkv_ptr + row * stride_qkv + inside, mask=seen, other=0.0)
        second = tl.load(qkv_ptr + row * stride_qkv + inside + D // 2, mask=seen, other=0.0)
    stride_h = 3 * max_pages * 8
    h_heads = h_ptr + position * stride_h + rank[:, None] + (slice_of_head * max_pages * 8)[None, :]
    h_seen = head_seen[None, :] & (rank >= 0)[:, None]
    delta_first = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    delta_second = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    for j in range(num_pages):
        # The next page's B is on its way while this one is multiplied.
        more = j + 1 < num_pages
        after = b_ptr + tl.load(page_list + j + 1, mask=more, other=0).to(tl.int64) * stride_page + b_where
        after_first = tl.load(after, mask=seen[None, :, :] & more, other=0.0)
        after_second = tl.load(after + D // 2, mask=seen[None, :, :] & more, other=0.0)
        h = _sum_of_splits(h_heads + j * 8, h_seen, splits, plane_rows * stride_h, 1 << MAX_SHIFT)[:, :, None]
        delta_first += tl.sum(h * b_first.to(tl.float32), axis=0)
        delta_second += tl.sum(h * b_second.to(tl.float32), axis=0)
        b_first, b_second = after_first, after_second
    first = (first.to(tl.float32) + delta_first).to(dtype)
    second = (second.to(tl.float32) + delta_second).to(dtype)
    rope_and_store(
        first, second, row, head, d, cos, sin, slot, q_norm_ptr, k_norm_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, eps,
        HEADS, KV_HEADS, D, QK_NORM,
    )  # fmt: skip
