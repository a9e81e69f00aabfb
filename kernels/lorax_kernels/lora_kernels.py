"""LoRA shrink as Triton kernels; `lora_triton` launches them, and `expand_kernels` has the other half.

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
    if PDL:
        # A program without work waits too: that this launch is over must mean that the one before it is.
        tl.extra.cuda.gdc_wait()


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
