"""What the products of many rows add to a tile before they write it: h B of the adapters that have rows in it.

The work list says for every 128 token rows which pages these meet, two by two (`tile_listing`). Groups of two pages are
a chain, whose first is found by the number of the tile alone, and the record of the next one is read beside the work on
one: a tile waits for memory twice, and a tile without adapters once.

The tensor cores multiply here as they did before Hopper (`mma`), 16 rows at a time, which is why everything has three
dimensions: with a second use of `wgmma` on the sums of a tile the assembler no longer lets those of the main loop
overlap (C7515). The sums of both lie in the same registers.

A row of another adapter has zeros for h. That is nothing added as long as B is finite, which a loaded adapter's is.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of `_VARYING` in lora_kernels, what is passed here: a kernel compiled anew for a number divisible by 16 would stall.
DELTA_VARYING = ("tiles_at", "plane_rows", "max_pages")


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile [BLOCK_M, BLOCK_N]."""
    apart = tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    return tl.split(apart)


@triton.jit
def _group(group_ptr):
    """A record: page, first and last token row (exclusive), row of h less token row, and page of the adapter, of two
    pages each, and the next group, 0 if there is none."""
    side = tl.arange(0, 2)
    return (
        tl.load(group_ptr + side), tl.load(group_ptr + 2 + side), tl.load(group_ptr + 4 + side),
        tl.load(group_ptr + 6 + side), tl.load(group_ptr + 8 + side), tl.load(group_ptr + 10),
    )  # fmt: skip


@triton.jit
def _read_h(
    h_ptr, first, stop, shift, ordinal, row, which, plane_rows, max_pages,
    BLOCK_M: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """h [BLOCK_M, 2, 8] of the tile's rows, zero where a row's adapter does not have the page."""
    m = (row + tl.arange(0, BLOCK_M))[:, None]
    stride_h = S * max_pages * 8
    begins = (m + shift[None, :]) * stride_h + (which * max_pages + ordinal[None, :]) * 8
    where = h_ptr + begins[:, :, None] + tl.arange(0, 8)[None, None, :]
    seen = ((m >= first[None, :]) & (m < stop[None, :]))[:, :, None]
    h = tl.load(where, mask=seen, other=0.0)
    for split in tl.static_range(1, SPLITS):
        h += tl.load(where + split * plane_rows * stride_h, mask=seen, other=0.0)
    return h


@triton.jit
def _read_b(b_ptr, pages, seen, column, column_seen, stride_page, stride_b):
    """Columns [2, 8, N] of two pages of B."""
    begins = (pages.to(tl.int64) * stride_page)[:, None] + (tl.arange(0, 8) * stride_b)[None, :]
    where = b_ptr + begins[:, :, None] + column[None, None, :]
    return tl.load(where, mask=seen[:, None, None] & column_seen[None, None, :], other=0.0)


@triton.jit
def _add(acc, h, b, BLOCK_M: tl.constexpr, N: tl.constexpr):
    """acc [BLOCK_M / 16, 16, N] + h [BLOCK_M, 2, 8], rounded to the type of b, times b [2, 8, N]."""
    h = tl.reshape(h.to(b.dtype), (BLOCK_M // 16, 16, 16))
    b = tl.broadcast_to(tl.reshape(b, (1, 16, N)), (BLOCK_M // 16, 16, N))
    return tl.dot(h, b, acc, input_precision="ieee")


@triton.jit
def add_deltas(
    left, right, row, left_column, right_column, h_ptr, b_ptr, work_ptr, tiles_at, plane_rows, max_pages, stride_page,
    stride_b, SILU: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, S: tl.constexpr,
    SPLITS: tl.constexpr, LIST_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Two halves [BLOCK_M, HALF] of a tile with the deltas of their rows, the first of which is `row`. The halves begin
    at `left_column` and `right_column` of the site's output; with SILU at the same column of its two slices, else one
    after the other in any of its S slices.

    h_ptr: planes [SPLITS, plane_rows, S * max_pages * 8] in float32. b_ptr: [P, 8, W0 + W1 + W2].
    """
    WHOLE: tl.constexpr = 2 * HALF
    STRADDLES: tl.constexpr = S > 1 and (W0 % WHOLE != 0 or (S > 2 and W1 % WHOLE != 0))
    c0 = left_column + tl.arange(0, HALF)
    c1 = right_column + tl.arange(0, HALF)
    groups = work_ptr + tiles_at
    group = groups + row // LIST_ROWS * 16
    page, first, stop, shift, ordinal, after = _group(group)
    more = tl.load(group + 4) > 0
    left = tl.reshape(left, (BLOCK_M // 16, 16, HALF))
    right = tl.reshape(right, (BLOCK_M // 16, 16, HALF))
    while more:
        # h before B, which goes through shared memory: nothing is read before a barrier that waits for a read.
        next_page, next_first, next_stop, next_shift, next_ordinal, next_after = _group(groups + after * 16)
        seen = stop > 0
        if SILU:
            h0 = _read_h(
                h_ptr, first, stop, shift, ordinal, row, 0, plane_rows, max_pages, BLOCK_M, S, SPLITS
            )
            h1 = _read_h(
                h_ptr, first, stop, shift, ordinal, row, 1, plane_rows, max_pages, BLOCK_M, S, SPLITS
            )
            b0 = _read_b(b_ptr, page, seen, c0, c0 < W0, stride_page, stride_b)
            b1 = _read_b(b_ptr, page, seen, c1, c1 < W0 + W1, stride_page, stride_b)
            left = _add(left, h0, b0, BLOCK_M, HALF)
            right = _add(right, h1, b1, BLOCK_M, HALF)
        elif STRADDLES:
            for which in tl.static_range(S):
                begin = 0 if which == 0 else (W0 if which == 1 else W0 + W1)
                end = W0 if which == 0 else (W0 + W1 if which == 1 else W0 + W1 + W2)
                if (left_column < end) & (left_column + WHOLE > begin):
                    in0, in1 = (c0 >= begin) & (c0 < end), (c1 >= begin) & (c1 < end)
                    b0 = _read_b(b_ptr, page, seen, c0, in0, stride_page, stride_b)
                    b1 = _read_b(b_ptr, page, seen, c1, in1, stride_page, stride_b)
                    h = _read_h(
                        h_ptr, first, stop, shift, ordinal, row, which, plane_rows, max_pages, BLOCK_M, S, SPLITS
                    )  # fmt: skip
                    left = _add(left, h, b0, BLOCK_M, HALF)
                    right = _add(right, h, b1, BLOCK_M, HALF)
        else:
            # With fewer slices than three no tile begins where the next one would.
            which = (left_column >= W0).to(tl.int32) + (left_column >= W0 + W1).to(tl.int32)
            h = _read_h(
                h_ptr, first, stop, shift, ordinal, row, which, plane_rows, max_pages, BLOCK_M, S, SPLITS
            )
            b0 = _read_b(b_ptr, page, seen, c0, c0 < W0 + W1 + W2, stride_page, stride_b)
            b1 = _read_b(b_ptr, page, seen, c1, c1 < W0 + W1 + W2, stride_page, stride_b)
            left = _add(left, h, b0, BLOCK_M, HALF)
            right = _add(right, h, b1, BLOCK_M, HALF)
        more = after > 0
        page, first, stop, shift, ordinal, after = (
            next_page, next_first, next_stop, next_shift, next_ordinal, next_after,
        )  # fmt: skip
    return tl.reshape(left, (BLOCK_M, HALF)), tl.reshape(right, (BLOCK_M, HALF))
