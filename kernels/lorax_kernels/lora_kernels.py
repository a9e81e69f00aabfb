"""LoRA shrink and expand as Triton kernels; `lora_triton` launches them.

A program finds its work in records of the step's work list (see `worklist` for their fields) and reads the next record
while it works on one. bgmv kernels are for decode: persistent, their loop bounds come from device memory, so that one
captured graph runs any batch. sgmv kernels are for prefill: one program a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from batch to batch: a kernel compiled anew for each that happens to divide by 16 would stall.
_VARYING = ("blocks_at", "units_at", "rows_at", "pages_at", "plane_rows", "max_pages")


@triton.jit
def _split_shift(log2_units, S: tl.constexpr, TARGET_LOG2: tl.constexpr, MAX_SHIFT: tl.constexpr):
    """log2 of the splits of K, the same in shrink and expand: about 2**TARGET_LOG2 pieces, to fill the device."""
    slices_log2: tl.constexpr = 0 if S == 1 else 1
    return tl.minimum(tl.maximum(TARGET_LOG2 - slices_log2 - log2_units, 0), MAX_SHIFT)


@triton.jit
def _record(record_ptr, seen):
    """The seven fields of a block or unit record of the work list."""
    return (
        tl.load(record_ptr, mask=seen, other=0),
        tl.load(record_ptr + 1, mask=seen, other=0),
        tl.load(record_ptr + 2, mask=seen, other=0),
        tl.load(record_ptr + 3, mask=seen, other=0),
        tl.load(record_ptr + 4, mask=seen, other=0),
        tl.load(record_ptr + 5, mask=seen, other=0),
        tl.load(record_ptr + 6, mask=seen, other=0),
    )


@triton.jit(do_not_specialize=_VARYING[1:])
def bgmv_shrink_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    work_ptr,
    stride_x,
    stride_page,
    units_at,
    rows_at,
    pages_at,
    plane_rows,
    max_pages,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MAX_SHIFT: tl.constexpr,
    TARGET_LOG2: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    EVEN: tl.constexpr = K % BLOCK_K == 0
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    DOT_K: tl.constexpr = BLOCK_K if BLOCK_K < 256 else 256
    rank = tl.arange(0, 8)
    stride_h = S * max_pages * 8
    shift = _split_shift(tl.load(work_ptr + 3), S, TARGET_LOG2, MAX_SHIFT)
    blocks_each = (K_BLOCKS + (1 << shift) - 1) >> shift
    singles = (tl.load(work_ptr + 5) * S) << shift
    total = (tl.load(work_ptr + 1) * S) << shift
    item = tl.program_id(0)
    page, first, count, ordinal, row, _, _ = _record(
        work_ptr + units_at + (item >> shift) // S * 8, item < total
    )
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        split = item & ((1 << shift) - 1)
        which = (item >> shift) % S
        a_base = a_ptr + page.to(tl.int64) * stride_page + which * 8 * K
        h_base = h_ptr + split * plane_rows * stride_h + (which * max_pages + ordinal) * 8
        k_begin = split * blocks_each * BLOCK_K
        # The next item's record is on its way while this item's weights are read.
        after = item + tl.num_programs(0)
        next_page, next_first, next_count, next_ordinal, next_row, _, _ = _record(
            work_ptr + units_at + (after >> shift) // S * 8, after < total
        )
        if item < singles:
            total_h = tl.zeros((8,), dtype=tl.float32)
            for step in range(blocks_each):
                k = k_begin + step * BLOCK_K + tl.arange(0, BLOCK_K)
                if EVEN:
                    inside = k_begin + step * BLOCK_K < K
                else:
                    inside = k < K
                a = tl.load(a_base + rank[:, None] * K + k[None, :], mask=inside, other=0.0)
                if PDL:
                    tl.extra.cuda.gdc_wait()
                x = tl.load(x_ptr + row.to(tl.int64) * stride_x + k, mask=inside, other=0.0)
                total_h += tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
            tl.store(h_base + first * stride_h + rank, total_h)
        else:
            m = tl.arange(0, BLOCK_M)
            rows = tl.load(work_ptr + rows_at + first + m, mask=m < count, other=0).to(tl.int64)
            if PDL:
                tl.extra.cuda.gdc_wait()
            acc = tl.zeros((BLOCK_M, 8), dtype=tl.float32)
            k_end = tl.minimum(k_begin + blocks_each * BLOCK_K, K)
            for k0 in tl.range(k_begin, k_end, DOT_K, num_stages=STAGES):
                kd = k0 + tl.arange(0, DOT_K)
                where = x_ptr + rows[:, None] * stride_x + kd[None, :]
                if EVEN:
                    x_block = tl.load(where, mask=(m < count)[:, None], other=0.0)
                    a_block = tl.load(a_base + rank[None, :] * K + kd[:, None])
                else:
                    x_block = tl.load(where, mask=(m < count)[:, None] & (kd < K)[None, :], other=0.0)
                    a_block = tl.load(
                        a_base + rank[None, :] * K + kd[:, None], mask=(kd < K)[:, None], other=0.0
                    )
                acc = tl.dot(x_block, a_block, acc, input_precision="ieee")
            tl.store(h_base + (first + m)[:, None] * stride_h + rank[None, :], acc, mask=(m < count)[:, None])
        page, first, count, ordinal, row = next_page, next_first, next_count, next_ordinal, next_row


@triton.jit(do_not_specialize=_VARYING[1:])
def sgmv_shrink_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    work_ptr,
    stride_x,
    stride_page,
    units_at,
    rows_at,
    pages_at,
    plane_rows,
    max_pages,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT_PAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0) % SPLITS
    unit = work_ptr + units_at + (tl.program_id(0) // SPLITS) * 8
    _, first, count, ordinal, _, page_at, num_pages = _record(unit, True)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    rows = tl.load(work_ptr + rows_at + first + m, mask=m < count, other=0).to(tl.int64)
    has_page = (ordinal + n // COLUMNS < num_pages) & (n < UNIT_PAGES * COLUMNS)
    page_list = work_ptr + pages_at + page_at + ordinal
    pages = tl.load(page_list + n // COLUMNS, mask=has_page, other=0).to(tl.int64)
    a_rows = a_ptr + pages * stride_page + (n % COLUMNS) * K
    x_rows = x_ptr + rows * stride_x
    EACH: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = K % (SPLITS * BLOCK_K) == 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in tl.range(0, EACH // BLOCK_K, num_stages=STAGES):
        k = split * EACH + step * BLOCK_K + tl.arange(0, BLOCK_K)
        if EVEN:
            x = tl.load(x_rows[:, None] + k[None, :], mask=(m < count)[:, None], other=0.0)
            a = tl.load(a_rows[None, :] + k[:, None], mask=has_page[None, :], other=0.0)
        else:
            x = tl.load(x_rows[:, None] + k[None, :], mask=(m < count)[:, None] & (k < K)[None, :], other=0.0)
            a = tl.load(a_rows[None, :] + k[:, None], mask=has_page[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(x, a, acc, input_precision="ieee")
    stride_h = COLUMNS * max_pages
    column = n % COLUMNS // 8 * max_pages * 8 + (ordinal + n // COLUMNS) * 8 + n % 8
    where = h_ptr + split * plane_rows * stride_h + (first + m)[:, None] * stride_h + column[None, :]
    tl.store(where, acc, mask=(m < count)[:, None] & has_page[None, :])


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
    where = tl.where(item < row_items, item // ROW_TILES, num_single + (item - row_items) // TILES)
    first, count, page_at, num_pages, row, page0, page1 = _record(blocks + where * 8, item < total)
    for _ in range(tl.program_id(0), total, tl.num_programs(0)):
        after = item + tl.num_programs(0)
        where = tl.where(after < row_items, after // ROW_TILES, num_single + (after - row_items) // TILES)
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
