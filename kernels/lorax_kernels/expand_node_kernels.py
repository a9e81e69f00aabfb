"""Nodes of the decode step that add a base layer's LoRA deltas to its output on the way to their own work.

Expand by itself reads the base layer's output, adds to it and writes it, and the node after it reads it again. Here the
node does both: one launch and two passes over the output fewer a site. What it computes is what expand and the node
after it would: the delta is added in float32 and rounded to the output's type, and only then does the node begin.

The nodes that work row by row (norms, rotary embedding) look a row's adapter up in the work list's `tokens`. SiLU and
multiplication, whose input is the widest, takes the list's row blocks, so that B is read once for up to 16 rows of one
adapter; the list's bare blocks are the rows without one. With PDL each reads the adapters' B, which no kernel of the
step writes, before it waits for the base layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorax_kernels.fused_triton import rope_and_store, rope_tables, silu_mul_block
from lorax_kernels.lora_kernels import _record, _split_shift

_LISTED = ("tokens_at", "pages_at", "plane_rows", "max_pages")


@triton.jit
def _token_record(work_ptr, tokens_at, pages_at, row):
    """A row's place in h, its pages' place in the list, their number, and the first of them."""
    entry = work_ptr + tokens_at + row * 4
    position, page_at, num_pages = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    page_list = work_ptr + pages_at + page_at
    return position.to(tl.int64), page_list, num_pages, tl.load(page_list, mask=num_pages > 0, other=0)


@triton.jit
def _sum_of_splits(h_where, seen, splits, stride_plane, MAX_SPLITS: tl.constexpr):
    """Elements of h: the sum of the planes that shrink has written. Up to eight are read at a time, so that one wait
    pays for all without a register for each."""
    AT_ONCE: tl.constexpr = MAX_SPLITS if MAX_SPLITS < 8 else 8
    h = tl.zeros(h_where.shape, dtype=tl.float32)
    for begin in range(0, splits, AT_ONCE):
        for split in tl.static_range(AT_ONCE):
            where = h_where + (begin + split) * stride_plane
            h += tl.load(where, mask=seen & (begin + split < splits), other=0.0)
    return h


@triton.jit(do_not_specialize=_LISTED)
def norm_expand_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, h_ptr, b_ptr, work_ptr, stride_x, stride_residual, eps,
    stride_page, stride_b, tokens_at, pages_at, plane_rows, max_pages,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, MAX_SHIFT: tl.constexpr, TARGET_LOG2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMS norm of (x + h B) + residual, a program a row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    seen = column < WIDTH
    rank = tl.arange(0, 8)
    position, page_list, num_pages, page = _token_record(work_ptr, tokens_at, pages_at, row)
    splits = 1 << _split_shift(tl.load(work_ptr + 3), 1, TARGET_LOG2, MAX_SHIFT)
    b_where = rank[:, None] * stride_b + column[None, :]
    b = tl.load(
        b_ptr + page.to(tl.int64) * stride_page + b_where, mask=seen[None, :] & (num_pages > 0), other=0.0
    )
    weight = tl.load(weight_ptr + column, mask=seen, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * stride_x + column, mask=seen, other=0.0)
    residual = tl.load(residual_ptr + row * stride_residual + column, mask=seen, other=0.0)
    h_row = h_ptr + position * max_pages * 8
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(num_pages):
        more = j + 1 < num_pages
        after = tl.load(page_list + j + 1, mask=more, other=0).to(tl.int64)
        b_after = tl.load(b_ptr + after * stride_page + b_where, mask=seen[None, :] & more, other=0.0)
        h = _sum_of_splits(
            h_row + j * 8 + rank, rank >= 0, splits, plane_rows * max_pages * 8, 1 << MAX_SHIFT
        )
        acc += tl.sum(h[:, None] * b.to(tl.float32), axis=0)
        b = b_after
    x = (x.to(tl.float32) + acc).to(x.dtype)
    x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    tl.store(sum_ptr + row * WIDTH + column, x, mask=seen)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    y = weight.to(tl.float32) * (wide * scale).to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + column, y.to(x.dtype), mask=seen)


@triton.jit(do_not_specialize=_LISTED)
def rope_expand_kernel(
    qkv_ptr, positions_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr,
    h_ptr, b_ptr, work_ptr, stride_qkv, stride_table, eps, stride_page, stride_b, tokens_at, pages_at, plane_rows,
    max_pages,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    QK_NORM: tl.constexpr, MAX_SHIFT: tl.constexpr, TARGET_LOG2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotary embedding and the cache's writing of qkv + h B, a program some heads of a row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)  # over half a head
    rank = tl.arange(0, 8)
    seen = (head < HEADS + 2 * KV_HEADS)[:, None] & (d < D // 2)[None, :]
    cos, sin, slot = rope_tables(positions_ptr, cos_ptr, sin_ptr, slots_ptr, row, d, stride_table, D)
    position, page_list, num_pages, page = _token_record(work_ptr, tokens_at, pages_at, row)
    splits = 1 << _split_shift(tl.load(work_ptr + 3), 3, TARGET_LOG2, MAX_SHIFT)
    slice_of_head = (head >= HEADS).to(tl.int32) + (head >= HEADS + KV_HEADS).to(tl.int32)
    inside = head[:, None] * D + d[None, :]
    b_where = (rank * stride_b)[:, None, None] + inside[None, :, :]
    b_seen = seen[None, :, :] & (num_pages > 0)
    b_page = b_ptr + page.to(tl.int64) * stride_page + b_where
    b_first = tl.load(b_page, mask=b_seen, other=0.0)
    b_second = tl.load(b_page + D // 2, mask=b_seen, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    source = qkv_ptr + row * stride_qkv + inside
    first = tl.load(source, mask=seen, other=0.0)
    second = tl.load(source + D // 2, mask=seen, other=0.0)
    stride_h = 3 * max_pages * 8
    h_heads = h_ptr + position * stride_h + rank[:, None] + (slice_of_head * max_pages * 8)[None, :]
    delta_first = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    delta_second = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    for j in range(num_pages):
        more = j + 1 < num_pages
        after = b_ptr + tl.load(page_list + j + 1, mask=more, other=0).to(tl.int64) * stride_page + b_where
        after_first = tl.load(after, mask=seen[None, :, :] & more, other=0.0)
        after_second = tl.load(after + D // 2, mask=seen[None, :, :] & more, other=0.0)
        h_seen = (head < HEADS + 2 * KV_HEADS)[None, :] & (rank >= 0)[:, None]
        h = _sum_of_splits(h_heads + j * 8, h_seen, splits, plane_rows * stride_h, 1 << MAX_SHIFT)[:, :, None]
        delta_first += tl.sum(h * b_first.to(tl.float32), axis=0)
        delta_second += tl.sum(h * b_second.to(tl.float32), axis=0)
        b_first, b_second = after_first, after_second
    first = (first.to(tl.float32) + delta_first).to(first.dtype)
    second = (second.to(tl.float32) + delta_second).to(second.dtype)
    rope_and_store(
        first, second, row, head, d, cos, sin, slot, q_norm_ptr, k_norm_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, eps,
        HEADS, KV_HEADS, D, QK_NORM,
    )  # fmt: skip


@triton.jit
def _two_tiles(b_ptr, pages, j, num_pages, column, n_seen, stride_page, stride_b, WIDTH: tl.constexpr):
    """B of both slices, [16, columns] each: of pages j and j + 1."""
    r = tl.arange(0, 16)
    where = b_ptr + (pages * stride_page + r % 8 * stride_b)[:, None] + column[None, :]
    seen = (j + r // 8 < num_pages)[:, None] & n_seen[None, :]
    return tl.load(where, mask=seen, other=0.0), tl.load(where + WIDTH, mask=seen, other=0.0)


@triton.jit
def _silu_of_row(
    source, y_where, h_ptr, b_ptr, page_list, pages, splits, num_pages, column, n_seen, max_pages, stride_page,
    stride_b, stride_plane,
    WIDTH: tl.constexpr, MAX_SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: matrix-vector products, bound by reading B."""
    r = tl.arange(0, 16)
    b_gate, b_up = _two_tiles(b_ptr, pages, 0, num_pages, column, n_seen, stride_page, stride_b, WIDTH)
    if PDL:
        tl.extra.cuda.gdc_wait()
    base_gate = tl.load(source + column, mask=n_seen, other=0.0)
    base_up = tl.load(source + WIDTH + column, mask=n_seen, other=0.0)
    gate, up = base_gate.to(tl.float32), base_up.to(tl.float32)
    for j in range(0, num_pages, 2):
        after = j + 2 + r // 8
        pages = tl.load(page_list + after, mask=after < num_pages, other=0).to(tl.int64)
        next_gate, next_up = _two_tiles(
            b_ptr, pages, j + 2, num_pages, column, n_seen, stride_page, stride_b, WIDTH
        )
        seen = j + r // 8 < num_pages
        h_gate = _sum_of_splits(h_ptr + j * 8 + r, seen, splits, stride_plane, MAX_SPLITS)
        h_up = _sum_of_splits(h_ptr + (max_pages + j) * 8 + r, seen, splits, stride_plane, MAX_SPLITS)
        gate += tl.sum(h_gate[:, None] * b_gate.to(tl.float32), axis=0)
        up += tl.sum(h_up[:, None] * b_up.to(tl.float32), axis=0)
        b_gate, b_up = next_gate, next_up
    made = silu_mul_block(gate.to(base_gate.dtype), up.to(base_up.dtype))
    tl.store(y_where + column, made, mask=n_seen)


@triton.jit
def _silu_of_rows(
    x_ptr, y_ptr, h_ptr, b_ptr, row_list, page_list, pages, splits, count, num_pages, column, n_seen, max_pages,
    stride_x, stride_page, stride_b, stride_plane, stride_h,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, MAX_SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_M rows of one adapter on the tensor cores, or as many without one."""
    r = tl.arange(0, 16)
    m = tl.arange(0, BLOCK_M)
    rows = tl.load(row_list + m, mask=m < count, other=0).to(tl.int64)
    b_gate, b_up = _two_tiles(b_ptr, pages, 0, num_pages, column, n_seen, stride_page, stride_b, WIDTH)
    if PDL:
        tl.extra.cuda.gdc_wait()
    source = x_ptr + rows[:, None] * stride_x + column[None, :]
    seen = (m < count)[:, None] & n_seen[None, :]
    base_gate = tl.load(source, mask=seen, other=0.0)
    base_up = tl.load(source + WIDTH, mask=seen, other=0.0)
    gate = tl.zeros((BLOCK_M, column.shape[0]), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, column.shape[0]), dtype=tl.float32)
    for j in range(0, num_pages, 2):
        after = j + 2 + r // 8
        pages = tl.load(page_list + after, mask=after < num_pages, other=0).to(tl.int64)
        next_gate, next_up = _two_tiles(
            b_ptr, pages, j + 2, num_pages, column, n_seen, stride_page, stride_b, WIDTH
        )
        h_where = h_ptr + m[:, None] * stride_h + (j * 8 + r)[None, :]
        h_seen = (m < count)[:, None] & (j + r // 8 < num_pages)[None, :]
        h_gate = _sum_of_splits(h_where, h_seen, splits, stride_plane, MAX_SPLITS)
        h_up = _sum_of_splits(h_where + max_pages * 8, h_seen, splits, stride_plane, MAX_SPLITS)
        gate = tl.dot(h_gate.to(b_gate.dtype), b_gate, gate, input_precision="ieee")
        up = tl.dot(h_up.to(b_up.dtype), b_up, up, input_precision="ieee")
        b_gate, b_up = next_gate, next_up
    made = silu_mul_block(
        (base_gate.to(tl.float32) + gate).to(base_gate.dtype), (base_up.to(tl.float32) + up).to(base_up.dtype)
    )
    tl.store(y_ptr + rows[:, None] * WIDTH + column[None, :], made, mask=seen)


@triton.jit(do_not_specialize=("blocks_at", "rows_at", *_LISTED[1:]))
def silu_expand_kernel(
    x_ptr, y_ptr, h_ptr, b_ptr, work_ptr, stride_x, stride_page, stride_b, blocks_at, rows_at, pages_at, plane_rows,
    max_pages,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MAX_SHIFT: tl.constexpr,
    TARGET_LOG2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of (gate, up) + h B: persistent programs over tiles of row blocks, as in `bgmv_expand_kernel`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    blocks = work_ptr + blocks_at
    num_single = tl.load(work_ptr + 4)
    total = (tl.load(work_ptr) + tl.load(work_ptr + 6)) * TILES
    splits = 1 << _split_shift(tl.load(work_ptr + 3), 2, TARGET_LOG2, MAX_SHIFT)
    r = tl.arange(0, 16)
    stride_h = 2 * max_pages * 8
    stride_plane = plane_rows * stride_h
    item = tl.program_id(0)
    first, count, page_at, num_pages, row, page0, page1 = _record(blocks + item // TILES * 8, item < total)
    for _ in range(tl.program_id(0), total, tl.num_programs(0)):
        after = item + tl.num_programs(0)
        next_first, next_count, next_page_at, next_num_pages, next_row, next_page0, next_page1 = _record(
            blocks + after // TILES * 8, after < total
        )
        pages = tl.where(r < 8, page0, page1).to(tl.int64)
        page_list = work_ptr + pages_at + page_at
        h_base = h_ptr + first.to(tl.int64) * stride_h
        column = item % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        n_seen = column < WIDTH
        if item // TILES < num_single:
            _silu_of_row(
                x_ptr + row.to(tl.int64) * stride_x, y_ptr + row.to(tl.int64) * WIDTH, h_base, b_ptr, page_list, pages,
                splits, num_pages, column, n_seen, max_pages, stride_page, stride_b, stride_plane, WIDTH,
                1 << MAX_SHIFT, PDL,
            )  # fmt: skip
        else:
            _silu_of_rows(
                x_ptr, y_ptr, h_base, b_ptr, work_ptr + rows_at + first, page_list, pages, splits, count, num_pages,
                column, n_seen, max_pages, stride_x, stride_page, stride_b, stride_plane, stride_h, WIDTH, BLOCK_M,
                1 << MAX_SHIFT, PDL,
            )  # fmt: skip
        first, count, page_at, num_pages = next_first, next_count, next_page_at, next_num_pages
        row, page0, page1 = next_row, next_page0, next_page1
        item = after
    if PDL:
        # A program without work waits too: that this launch is over must mean that the one before it is.
        tl.extra.cuda.gdc_wait()
