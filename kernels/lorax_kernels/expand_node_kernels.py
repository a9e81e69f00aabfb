"""Nodes of the decode step that add a base layer's LoRA deltas to its output on the way to their own work.

Expand by itself reads the base layer's output, adds to it and writes it, and the node after it reads it again. Here the
node does both: one launch and two passes over the output fewer a site. What it computes is what expand and the node
after it would: the delta is added in float32 and rounded to the output's type, and only then does the node begin.

A norm works row by row and looks a row's adapter up in the work list's `tokens`. SiLU and multiplication, whose input
is the widest, takes the list's row blocks, so that B is read once for up to 16 rows of one adapter; the list's bare
blocks are the rows without one. With PDL each reads the adapters' B, which no kernel of the step writes, before it
waits for the base layer. The rotary embedding (`rope_expand_kernels`) reads B again for every row, as norms do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorax_kernels.fused_triton import silu_mul_block, store_normed, sum_of_planes
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


@triton.jit
def delta_of_row(
    b, b_ptr, b_where, seen, page_list, num_pages, stride_page, h_row, splits, stride_plane, MAX_SPLITS: tl.constexpr
):  # fmt: skip
    """h B of one row, [columns]. `b` is B of its first page, [8, columns], and `b_where` where it lies in a page;
    `h_row` is where h of the columns' slice begins."""
    rank = tl.arange(0, 8)
    delta = tl.zeros((b.shape[1],), dtype=tl.float32)
    for j in range(num_pages):
        # The next page's B is on its way while this one is multiplied.
        more = j + 1 < num_pages
        after = tl.load(page_list + j + 1, mask=more, other=0).to(tl.int64)
        b_after = tl.load(b_ptr + after * stride_page + b_where, mask=seen[None, :] & more, other=0.0)
        h = _sum_of_splits(h_row + j * 8 + rank, rank >= 0, splits, stride_plane, MAX_SPLITS)
        delta += tl.sum(h[:, None] * b.to(tl.float32), axis=0)
        b = b_after
    return delta


@triton.jit(do_not_specialize=_LISTED)
def norm_expand_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, h_ptr, b_ptr, work_ptr, stride_x, stride_residual, eps,
    stride_page, stride_b, tokens_at, pages_at, plane_rows, max_pages,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, MAX_SHIFT: tl.constexpr, TARGET_LOG2: tl.constexpr,
    PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMS norm of (x + h B) + residual, a program a row. With `PLANES` x is their sum."""
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
    residual = tl.load(residual_ptr + row * stride_residual + column, mask=seen, other=0.0)
    if PLANES > 0:
        x = sum_of_planes(x_ptr, row, column, seen, WIDTH, PLANES).to(residual.dtype)
    else:
        x = tl.load(x_ptr + row * stride_x + column, mask=seen, other=0.0)
    delta = delta_of_row(
        b, b_ptr, b_where, seen, page_list, num_pages, stride_page, h_ptr + position * max_pages * 8, splits,
        plane_rows * max_pages * 8, 1 << MAX_SHIFT,
    )  # fmt: skip
    x = (x.to(tl.float32) + delta).to(x.dtype)
    x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    tl.store(sum_ptr + row * WIDTH + column, x, mask=seen)
    store_normed(x, weight, y_ptr, row, column, seen, eps, WIDTH)


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
    gate = tl.zeros((column.shape[0],), dtype=tl.float32)
    up = tl.zeros((column.shape[0],), dtype=tl.float32)
    for j in range(0, num_pages, 2):
        b_gate, b_up = _two_tiles(b_ptr, pages, j, num_pages, column, n_seen, stride_page, stride_b, WIDTH)
        after = j + 2 + r // 8
        pages = tl.load(page_list + after, mask=after < num_pages, other=0).to(tl.int64)
        if PDL:
            tl.extra.cuda.gdc_wait()
        seen = j + r // 8 < num_pages
        h_gate = _sum_of_splits(h_ptr + j * 8 + r, seen, splits, stride_plane, MAX_SPLITS)
        h_up = _sum_of_splits(h_ptr + (max_pages + j) * 8 + r, seen, splits, stride_plane, MAX_SPLITS)
        gate += tl.sum(h_gate[:, None] * b_gate.to(tl.float32), axis=0)
        up += tl.sum(h_up[:, None] * b_up.to(tl.float32), axis=0)
    base_gate = tl.load(source + column, mask=n_seen, other=0.0)
    base_up = tl.load(source + WIDTH + column, mask=n_seen, other=0.0)
    made = silu_mul_block(
        (base_gate.to(tl.float32) + gate).to(base_gate.dtype), (base_up.to(tl.float32) + up).to(base_up.dtype)
    )
    tl.store(y_where + column, made, mask=n_seen)


@triton.jit
def _two_columns(x_ptr, rows, m_seen, column, n_seen, stride_x, WIDTH: tl.constexpr):
    """The base layer's output of some rows: columns of both slices."""
    source = x_ptr + rows[:, None] * stride_x + column[None, :]
    seen = m_seen[:, None] & n_seen[None, :]
    return tl.load(source, mask=seen, other=0.0), tl.load(source + WIDTH, mask=seen, other=0.0)


@triton.jit
def _two_products(
    h_gate, h_up, b_gate, b_up, h_ptr, b_ptr, page_list, splits, num_pages, m_seen, column, n_seen, max_pages,
    stride_page, stride_b, stride_plane, stride_h,
    WIDTH: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """h B of both slices in float32; of the first two pages h and B are given, which is all of the common ranks."""
    r = tl.arange(0, 16)
    m = tl.arange(0, m_seen.shape[0])
    gate = tl.dot(h_gate, b_gate, input_precision="ieee")
    up = tl.dot(h_up, b_up, input_precision="ieee")
    for j in range(2, num_pages, 2):
        seen = j + r // 8 < num_pages
        pages = tl.load(page_list + j + r // 8, mask=seen, other=0).to(tl.int64)
        more_gate, more_up = _two_tiles(
            b_ptr, pages, j, num_pages, column, n_seen, stride_page, stride_b, WIDTH
        )
        h_where = h_ptr + m[:, None] * stride_h + (j * 8 + r)[None, :]
        h_seen = m_seen[:, None] & seen[None, :]
        more_h = _sum_of_splits(h_where, h_seen, splits, stride_plane, MAX_SPLITS).to(b_gate.dtype)
        gate = tl.dot(more_h, more_gate, gate, input_precision="ieee")
        more_h = _sum_of_splits(h_where + max_pages * 8, h_seen, splits, stride_plane, MAX_SPLITS)
        up = tl.dot(more_h.to(b_up.dtype), more_up, up, input_precision="ieee")
    return gate, up


@triton.jit(do_not_specialize=("blocks_at", "rows_at", *_LISTED[1:]))
def silu_expand_kernel(
    x_ptr, y_ptr, h_ptr, b_ptr, work_ptr, stride_x, stride_page, stride_b, blocks_at, rows_at, pages_at, plane_rows,
    max_pages,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, ROW_N: tl.constexpr, BLOCK_N: tl.constexpr, MAX_SHIFT: tl.constexpr,
    TARGET_LOG2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of (gate, up) + h B, by persistent programs. Blocks of a single row are cut into tiles, which
    programs take in turn. Of the tiles of all other blocks a program has a run, mostly of one block: it reads the
    block's record and h once, and the next tile while it works on one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    ROW_TILES: tl.constexpr = (WIDTH + ROW_N - 1) // ROW_N
    TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    blocks = work_ptr + blocks_at
    num_single = tl.load(work_ptr + 4)
    splits = 1 << _split_shift(tl.load(work_ptr + 3), 2, TARGET_LOG2, MAX_SHIFT)
    num_blocks = tl.load(work_ptr) + tl.load(work_ptr + 6) - num_single
    r = tl.arange(0, 16)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    stride_h = 2 * max_pages * 8
    stride_plane = plane_rows * stride_h
    for item in range(tl.program_id(0), num_single * ROW_TILES, tl.num_programs(0)):
        first, _, page_at, num_pages, row, page0, page1 = _record(blocks + item // ROW_TILES * 8, True)
        column = item % ROW_TILES * ROW_N + tl.arange(0, ROW_N)
        _silu_of_row(
            x_ptr + row.to(tl.int64) * stride_x, y_ptr + row.to(tl.int64) * WIDTH,
            h_ptr + first.to(tl.int64) * stride_h, b_ptr, work_ptr + pages_at + page_at,
            tl.where(r < 8, page0, page1).to(tl.int64), splits, num_pages, column, column < WIDTH, max_pages,
            stride_page, stride_b, stride_plane, WIDTH, 1 << MAX_SHIFT, PDL,
        )  # fmt: skip
    run = tl.cdiv(num_blocks * TILES, tl.num_programs(0))
    begin = tl.program_id(0) * run
    end = tl.minimum(begin + run, num_blocks * TILES)
    for block in range(begin // TILES, tl.cdiv(end, TILES)):
        first, count, page_at, num_pages, _, page0, page1 = _record(blocks + (num_single + block) * 8, True)
        tile_begin = tl.maximum(begin - block * TILES, 0)
        tile_end = tl.minimum(end - block * TILES, TILES)
        m_seen = m < count
        rows = tl.load(work_ptr + rows_at + first + m, mask=m_seen, other=0).to(tl.int64)
        pages = tl.where(r < 8, page0, page1).to(tl.int64)
        column = tile_begin * BLOCK_N + n
        b_gate, b_up = _two_tiles(
            b_ptr, pages, 0, num_pages, column, column < WIDTH, stride_page, stride_b, WIDTH
        )
        if PDL:
            tl.extra.cuda.gdc_wait()
        base_gate, base_up = _two_columns(x_ptr, rows, m_seen, column, column < WIDTH, stride_x, WIDTH)
        h_base = h_ptr + first.to(tl.int64) * stride_h
        h_where = h_base + m[:, None] * stride_h + r[None, :]
        h_seen = m_seen[:, None] & (r // 8 < num_pages)[None, :]
        h_gate = _sum_of_splits(h_where, h_seen, splits, stride_plane, 1 << MAX_SHIFT).to(b_gate.dtype)
        h_up = _sum_of_splits(h_where + max_pages * 8, h_seen, splits, stride_plane, 1 << MAX_SHIFT).to(
            b_up.dtype
        )
        for tile in range(tile_begin, tile_end):
            column = tile * BLOCK_N + n
            after = column + BLOCK_N
            after_seen = (after < WIDTH) & (tile + 1 < tile_end)
            next_b_gate, next_b_up = _two_tiles(
                b_ptr, pages, 0, num_pages, after, after_seen, stride_page, stride_b, WIDTH
            )
            next_gate, next_up = _two_columns(x_ptr, rows, m_seen, after, after_seen, stride_x, WIDTH)
            gate, up = _two_products(
                h_gate, h_up, b_gate, b_up, h_base, b_ptr, work_ptr + pages_at + page_at, splits, num_pages, m_seen,
                column, column < WIDTH, max_pages, stride_page, stride_b, stride_plane, stride_h, WIDTH,
                1 << MAX_SHIFT,
            )  # fmt: skip
            made = silu_mul_block(
                (base_gate.to(tl.float32) + gate).to(base_gate.dtype),
                (base_up.to(tl.float32) + up).to(base_up.dtype),
            )
            seen = m_seen[:, None] & (column < WIDTH)[None, :]
            tl.store(y_ptr + rows[:, None] * WIDTH + column[None, :], made, mask=seen)
            b_gate, b_up, base_gate, base_up = next_b_gate, next_b_up, next_gate, next_up
    if PDL:
        # A program without work waits too: that this launch is over must mean that the one before it is.
        tl.extra.cuda.gdc_wait()
