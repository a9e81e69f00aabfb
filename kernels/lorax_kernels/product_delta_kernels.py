"""The LoRA delta h B inside a product of a few rows: what `skinny_gemm_kernels` does with it, as Triton functions.

The work list says which adapter's pages belong to which rows. A single row is a matrix-vector product of its own pages.
Of several rows each adapter's pages meet those of h that belong to its rows, and zeros for all others: `GROUP` row
blocks of two pages each are one product on the tensor cores, so that a batch of one adapter costs one such product and
a batch of many costs what reading their B costs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorax_kernels.expand_node_kernels import _sum_of_splits, _token_record
from lorax_kernels.lora_kernels import _split_shift


@triton.jit
def row_delta_record(
    work_ptr, tokens_at, pages_at, plane_rows, max_pages,
    S: tl.constexpr, MAX_SHIFT: tl.constexpr, TARGET_LOG2: tl.constexpr,
):  # fmt: skip
    """Of a single row: its pages, their number, the planes of h, and how far apart these are."""
    _, page_list, num_pages, _ = _token_record(work_ptr, tokens_at, pages_at, 0)
    splits = 1 << _split_shift(tl.load(work_ptr + 3), S, TARGET_LOG2, MAX_SHIFT)
    return page_list, num_pages, splits, plane_rows * S * max_pages * 8


@triton.jit
def two_pages(b_ptr, page_list, j, num_pages, n, n_seen, stride_page, stride_b):
    """B of pages j and j + 1, [16, columns]."""
    r = tl.arange(0, 16)
    seen = j + r // 8 < num_pages
    pages = tl.load(page_list + j + r // 8, mask=seen, other=0).to(tl.int64)
    where = (pages * stride_page + r % 8 * stride_b)[:, None] + n[None, :]
    return tl.load(b_ptr + where, mask=seen[:, None] & n_seen[None, :], other=0.0)


@triton.jit
def delta_of_pages(h_where, b, j, num_pages, n_seen, splits, stride_plane, MAX_SPLITS: tl.constexpr):
    """h B of pages j and j + 1; `h_where` is where h of every column's slice begins, [columns]."""
    r = tl.arange(0, 16)
    seen = (j + r // 8 < num_pages)[:, None] & n_seen[None, :]
    h = tl.zeros(b.shape, dtype=tl.float32)
    for split in tl.static_range(MAX_SPLITS):
        where = h_where[None, :] + split * stride_plane + (j * 8 + r)[:, None]
        h += tl.load(where, mask=seen & (split < splits), other=0.0)
    return tl.sum(h * b.to(tl.float32), axis=0)


@triton.jit
def rows_of_adapters(work_ptr, tokens_at, tokens, m):
    """Places in h of some rows, -1 for those without an adapter, and their adapters' numbers of pages."""
    entry = work_ptr + tokens_at + m * 4
    seen = m < tokens
    return tl.load(entry, mask=seen, other=-1), tl.load(entry + 2, mask=seen, other=0)


@triton.jit
def _pages_of_blocks(work_ptr, blocks_at, pages_at, g, j, num_blocks, GROUP: tl.constexpr):
    """Pages j and j + 1 of `GROUP` row blocks from g on, for each of their 16 rows of B, and which there are."""
    k = tl.arange(0, GROUP * 16)
    listed = g + k // 16 < num_blocks
    record = work_ptr + blocks_at + (g + k // 16) * 8
    which = j + k % 16 // 8
    seen = listed & (which < tl.load(record + 3, mask=listed, other=0))
    # A record holds the first two pages itself; more are a read further away.
    here = record + 5 + k % 16 // 8
    if j > 0:
        here = work_ptr + pages_at + tl.load(record + 2, mask=listed, other=0) + which
    return tl.load(here, mask=seen, other=0).to(tl.int64), seen


@triton.jit
def _tile_of_pages(b_ptr, pages, seen, n, n_seen, stride_page, stride_b):
    """B of the pages that `_pages_of_blocks` gives, [16 * GROUP, columns]."""
    k = tl.arange(0, pages.shape[0])
    where = (pages * stride_page + k % 8 * stride_b)[:, None] + n[None, :]
    return tl.load(b_ptr + where, mask=seen[:, None] & n_seen[None, :], other=0.0)


@triton.jit
def _rows_of_blocks(h, position, work_ptr, blocks_at, g, num_blocks, GROUP: tl.constexpr):
    """h [rows, 16] -> [rows, 16 * GROUP]: in the part of its own row block, and zeros elsewhere."""
    block = g + tl.arange(0, GROUP)
    listed = block < num_blocks
    first = tl.load(work_ptr + blocks_at + block * 8, mask=listed, other=0)
    count = tl.load(work_ptr + blocks_at + block * 8 + 1, mask=listed, other=0)
    mine = (position[:, None] >= first[None, :]) & (position[:, None] < (first + count)[None, :])
    return tl.reshape(tl.where(mine[:, :, None], h[:, None, :], 0.0), (h.shape[0], 16 * GROUP))


@triton.jit
def add_delta_of_rows(
    acc, h_ptr, b_ptr, work_ptr, position, own_pages, n, n_seen, first_slice, last_slice, part, stride_page, stride_b,
    blocks_at, pages_at, plane_rows, max_pages,
    OUT: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr,
    MAX_SHIFT: tl.constexpr, TARGET_LOG2: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """acc [rows, columns] in float32 plus h B of part `part` of `PARTS` of the row blocks. The columns `n` lie in
    slices `first_slice` to `last_slice`; `position` and `own_pages` are of `rows_of_adapters`."""
    r = tl.arange(0, 16)
    num_blocks = tl.load(work_ptr)
    splits = 1 << _split_shift(tl.load(work_ptr + 3), S, TARGET_LOG2, MAX_SHIFT)
    stride_h = S * max_pages * 8
    most = tl.max(own_pages, axis=0)
    for which in range(first_slice, last_slice + 1):
        begin = tl.where(which == 0, 0, tl.where(which == 1, W0, W0 + W1))
        end = tl.where(which == S - 1, OUT, tl.where(which == 0, W0, W0 + W1))
        n_mine = n_seen & (n >= begin) & (n < end)
        for j in range(0, most, 2):
            g = part * GROUP
            pages, seen = _pages_of_blocks(work_ptr, blocks_at, pages_at, g, j, num_blocks, GROUP)
            b = _tile_of_pages(b_ptr, pages, seen, n, n_mine, stride_page, stride_b)
            h_where = h_ptr + (position * stride_h + (which * max_pages + j) * 8)[:, None] + r[None, :]
            h_seen = (j + r // 8)[None, :] < own_pages[:, None]
            h = _sum_of_splits(h_where, h_seen, splits, plane_rows * stride_h, 1 << MAX_SHIFT)
            for g in range(part * GROUP, num_blocks, PARTS * GROUP):
                # The next pages' B is on its way while this one is multiplied.
                after, after_seen = _pages_of_blocks(
                    work_ptr, blocks_at, pages_at, g + PARTS * GROUP, j, num_blocks, GROUP
                )
                next_b = _tile_of_pages(b_ptr, after, after_seen, n, n_mine, stride_page, stride_b)
                h_block = _rows_of_blocks(h, position, work_ptr, blocks_at, g, num_blocks, GROUP)
                acc = tl.dot(h_block.to(b.dtype), b, acc, input_precision="ieee")
                b = next_b
    return acc
