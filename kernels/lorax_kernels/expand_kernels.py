"""LoRA expand as Triton kernels, out += h B; `lora_triton` launches them, and `lora_kernels` has the other half."""

from __future__ import annotations

import triton
import triton.language as tl

from lorax_kernels.lora_kernels import _VARYING, _record, _split_shift


@triton.jit
def _tile(tile, W0: tl.constexpr, W1: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slice of a tile of the output, first column of the slice, and first column of the tile within it."""
    tiles0: tl.constexpr = (W0 + BLOCK_N - 1) // BLOCK_N
    tiles1: tl.constexpr = (W1 + BLOCK_N - 1) // BLOCK_N
    in1 = (tile >= tiles0).to(tl.int32)
    in2 = (tile >= tiles0 + tiles1).to(tl.int32)
    return in1 + in2, in1 * W0 + in2 * W1, (tile - in1 * tiles0 - in2 * tiles1) * BLOCK_N


@triton.jit
def _expand_row(
    h_ptr, b_ptr, out_ptr, page_list, pages, splits, num_pages, columns, n_seen,
    stride_page, stride_b, stride_plane, MAX_SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: a matrix-vector product, bound by reading B."""
    if not PDL:
        base = tl.load(out_ptr + columns, mask=n_seen, other=0.0)
    r = tl.arange(0, 16)
    plane = tl.arange(0, MAX_SPLITS)
    acc = tl.zeros((columns.shape[0],), dtype=tl.float32)
    for j in range(0, num_pages, 2):
        seen = j + r // 8 < num_pages
        where = (pages * stride_page + r % 8 * stride_b)[:, None] + columns[None, :]
        b = tl.load(b_ptr + where, mask=seen[:, None] & n_seen[None, :], other=0.0)
        after = j + 2 + r // 8
        pages = tl.load(page_list + after, mask=after < num_pages, other=0).to(tl.int64)
        if PDL:
            tl.extra.cuda.gdc_wait()
        h_seen = (plane < splits)[:, None] & seen[None, :]
        h = tl.load(h_ptr + plane[:, None] * stride_plane + (j * 8 + r)[None, :], mask=h_seen, other=0.0)
        acc += tl.sum(tl.sum(h, axis=0)[:, None] * b.to(tl.float32), axis=0)
    if PDL:
        base = tl.load(out_ptr + columns, mask=n_seen, other=0.0)
    tl.store(out_ptr + columns, (base.to(tl.float32) + acc).to(base.dtype), mask=n_seen)


@triton.jit
def _expand_rows(
    h_ptr, b_ptr, out_ptr, row_list, page_list, pages, splits, count, num_pages, columns, n_seen,
    stride_out, stride_page, stride_b, stride_plane, stride_h,
    BLOCK_M: tl.constexpr, MAX_SPLITS: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_M rows of one adapter on the tensor cores. EARLY reads the output beside B, for more registers."""
    r = tl.arange(0, 16)
    m = tl.arange(0, BLOCK_M)
    m_seen = m < count
    rows = tl.load(row_list + m, mask=m_seen, other=0).to(tl.int64)
    where_out = out_ptr + rows[:, None] * stride_out + columns[None, :]
    out_seen = m_seen[:, None] & n_seen[None, :]
    if EARLY:
        base = tl.load(where_out, mask=out_seen, other=0.0)
    acc = tl.zeros((BLOCK_M, columns.shape[0]), dtype=tl.float32)
    for j in range(0, num_pages, 2):
        seen = j + r // 8 < num_pages
        where = (pages * stride_page + r % 8 * stride_b)[:, None] + columns[None, :]
        b = tl.load(b_ptr + where, mask=seen[:, None] & n_seen[None, :], other=0.0)
        after = j + 2 + r // 8
        pages = tl.load(page_list + after, mask=after < num_pages, other=0).to(tl.int64)
        if PDL:
            tl.extra.cuda.gdc_wait()
        h_rows = h_ptr + m[:, None] * stride_h + (j * 8 + r)[None, :]
        h_seen = m_seen[:, None] & seen[None, :]
        h = tl.load(h_rows, mask=h_seen, other=0.0)
        for split in tl.static_range(1, MAX_SPLITS):
            h += tl.load(h_rows + split * stride_plane, mask=h_seen & (split < splits), other=0.0)
        acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
    if not EARLY:
        base = tl.load(where_out, mask=out_seen, other=0.0)
    tl.store(where_out, (base.to(tl.float32) + acc).to(base.dtype), mask=out_seen)


@triton.jit
def _block_of(item, row_items, num_single, ROW_TILES: tl.constexpr, TILES: tl.constexpr):
    """The row block an item belongs to."""
    return tl.where(item < row_items, item // ROW_TILES, num_single + (item - row_items) // TILES)


@triton.jit(do_not_specialize=("blocks_at", *_VARYING[2:]))
def bgmv_expand_kernel(
    h_ptr,
    b_ptr,
    out_ptr,
    work_ptr,
    stride_out,
    stride_page,
    stride_b,
    blocks_at,
    rows_at,
    pages_at,
    plane_rows,
    max_pages,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROW_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_SHIFT: tl.constexpr,
    TARGET_LOG2: tl.constexpr,
    PDL: tl.constexpr,
):
    ROW_TILES: tl.constexpr = (
        (W0 + ROW_N - 1) // ROW_N + (W1 + ROW_N - 1) // ROW_N + (W2 + ROW_N - 1) // ROW_N
    )
    TILES: tl.constexpr = (
        (W0 + BLOCK_N - 1) // BLOCK_N + (W1 + BLOCK_N - 1) // BLOCK_N + (W2 + BLOCK_N - 1) // BLOCK_N
    )
    blocks = work_ptr + blocks_at
    num_single = tl.load(work_ptr + 4)
    row_items = num_single * ROW_TILES
    splits = 1 << _split_shift(tl.load(work_ptr + 3), S, TARGET_LOG2, MAX_SHIFT)
    total = row_items + (tl.load(work_ptr) - num_single) * TILES
    r = tl.arange(0, 16)
    stride_h = S * max_pages * 8
    stride_plane = plane_rows * stride_h
    item = tl.program_id(0)
    where = _block_of(item, row_items, num_single, ROW_TILES, TILES)
    first, count, page_at, num_pages, row, page0, page1 = _record(blocks + where * 8, item < total)
    for _ in range(tl.program_id(0), total, tl.num_programs(0)):
        after = item + tl.num_programs(0)
        where = _block_of(after, row_items, num_single, ROW_TILES, TILES)
        next_first, next_count, next_page_at, next_num_pages, next_row, next_page0, next_page1 = _record(
            blocks + where * 8, after < total
        )
        pages = tl.where(r < 8, page0, page1).to(tl.int64)
        page_list = work_ptr + pages_at + page_at
        h_base = h_ptr + first * stride_h
        if item < row_items:
            which, begin, start = _tile(item % ROW_TILES, W0, W1, ROW_N)
            n_row = start + tl.arange(0, ROW_N)
            _expand_row(
                h_base + which * max_pages * 8, b_ptr, out_ptr + row.to(tl.int64) * stride_out, page_list, pages,
                splits, num_pages, begin + n_row, n_row < tl.where(which == 0, W0, tl.where(which == 1, W1, W2)),
                stride_page, stride_b, stride_plane, 1 << MAX_SHIFT, PDL,
            )  # fmt: skip
        else:
            which, begin, start = _tile((item - row_items) % TILES, W0, W1, BLOCK_N)
            n = start + tl.arange(0, BLOCK_N)
            _expand_rows(
                h_base + which * max_pages * 8, b_ptr, out_ptr, work_ptr + rows_at + first, page_list, pages, splits,
                count, num_pages, begin + n, n < tl.where(which == 0, W0, tl.where(which == 1, W1, W2)),
                stride_out, stride_page, stride_b, stride_plane, stride_h, BLOCK_M, 1 << MAX_SHIFT, PDL, not PDL,
            )  # fmt: skip
        first, count, page_at, num_pages = next_first, next_count, next_page_at, next_num_pages
        row, page0, page1 = next_row, next_page0, next_page1
        item = after
    if PDL:
        # A program without work waits too: that this launch is over must mean that the one before it is.
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=("blocks_at", *_VARYING[2:]))
def sgmv_expand_kernel(
    h_ptr,
    b_ptr,
    out_ptr,
    work_ptr,
    stride_out,
    stride_page,
    stride_b,
    blocks_at,
    rows_at,
    pages_at,
    plane_rows,
    max_pages,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    first, count, page_at, num_pages, _, page0, page1 = _record(
        work_ptr + blocks_at + tl.program_id(1) * 8, True
    )
    pages = tl.where(tl.arange(0, 16) < 8, page0, page1).to(tl.int64)
    which, begin, start = _tile(tl.program_id(0), W0, W1, BLOCK_N)
    n = start + tl.arange(0, BLOCK_N)
    stride_h = S * max_pages * 8
    _expand_rows(
        h_ptr + first * stride_h + which * max_pages * 8, b_ptr, out_ptr, work_ptr + rows_at + first,
        work_ptr + pages_at + page_at, pages, SPLITS, count, num_pages, begin + n,
        n < tl.where(which == 0, W0, tl.where(which == 1, W1, W2)),
        stride_out, stride_page, stride_b, plane_rows * stride_h, stride_h, BLOCK_M, SPLITS, False, False,
    )  # fmt: skip
