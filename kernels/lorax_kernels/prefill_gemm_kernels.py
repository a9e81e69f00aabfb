"""Products of many rows with a layer's weight as Triton kernels for Hopper; `prefill_gemm` launches them.

Tiles come by TMA (tensor descriptors) and are multiplied by warp groups straight from shared memory. What lies beyond
the edge of x, the weight or the result is read as zeros and not written, which TMA does by itself. A program goes from
tile to tile of the result; with `FLATTEN` the first reads of a tile run beside the end of the one before.

Sums go along the inner dimension in the order in which it lies, in float32, and are rounded once: a row's result
depends neither on the other rows nor on the sizes of tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorax_kernels.fused_triton import silu_mul_block
from lorax_kernels.prefill_delta_kernels import DELTA_VARYING, add_deltas, halves


@triton.jit
def _place(tile, num_m, num_n, GROUP: tl.constexpr):
    """Row and column of a tile. `GROUP` rows of tiles are gone through column by column, so that the tiles at work at
    one time share what they read in L2."""
    first = tile // (GROUP * num_n) * GROUP
    rows = tl.minimum(num_m - first, GROUP)
    inside = tile % (GROUP * num_n)
    return first + inside % rows, inside // rows


@triton.jit
def _store_parts(
    out_desc, tile, row, column, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Write a tile in `PARTS` (1, 2 or 4) pieces side by side, which take as much less shared memory."""
    if PARTS == 1:
        out_desc.store([row, column], tile.to(out_desc.dtype))
    else:
        left, right = halves(tile, BLOCK_M, COLUMNS)
        _store_parts(out_desc, left, row, column, BLOCK_M, COLUMNS // 2, PARTS // 2)
        _store_parts(out_desc, right, row, column + COLUMNS // 2, BLOCK_M, COLUMNS // 2, PARTS // 2)


_VARYING = ("tokens", "columns", *DELTA_VARYING)


@triton.jit(do_not_specialize=_VARYING)
def prefill_gemm_kernel(
    x_desc, w_desc, out_desc, bias_ptr, tokens, columns, h_ptr, b_ptr, work_ptr, tiles_at, plane_rows, max_pages,
    stride_page, stride_b,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, FLATTEN: tl.constexpr, HAS_BIAS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    W2: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr, LIST_ROWS: tl.constexpr,
):  # fmt: skip
    """x [tokens, K] times the weight [columns, K], all tensor descriptors, with the deltas of adapters if S > 0
    (`prefill_delta_kernels`); the result is written in `PARTS` (1, 2 or 4) pieces a tile, with deltas 2 or 4."""
    num_m, num_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _place(tile, num_m, num_n, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(STEPS):
            a = x_desc.load([tile_m * BLOCK_M, step * BLOCK_K])
            w = w_desc.load([tile_n * BLOCK_N, step * BLOCK_K])
            acc = tl.dot(a, w.T, acc, input_precision="ieee")
        if HAS_BIAS:
            n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        if S == 0:
            _store_parts(out_desc, acc, row, column, BLOCK_M, BLOCK_N, PARTS)
        else:
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = halves(acc, BLOCK_M, BLOCK_N)
            left, right = add_deltas(
                left, right, row, column, column + HALF, h_ptr, b_ptr, work_ptr, tiles_at, plane_rows, max_pages,
                stride_page, stride_b, False, W0, W1, W2, S, SPLITS, LIST_ROWS, BLOCK_M, HALF,
            )  # fmt: skip
            _store_parts(out_desc, left, row, column, BLOCK_M, HALF, PARTS // 2)
            _store_parts(out_desc, right, row, column + HALF, BLOCK_M, HALF, PARTS // 2)


@triton.jit(do_not_specialize=_VARYING)
def prefill_silu_kernel(
    x_desc, w_desc, out_desc, tokens, columns, h_ptr, b_ptr, work_ptr, tiles_at, plane_rows, max_pages, stride_page,
    stride_b,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, FLATTEN: tl.constexpr, W0: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr,
    LIST_ROWS: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of x [tokens, K] times the weight [2, columns, K], gate first, all tensor descriptors, with
    the deltas of adapters if S > 0; written in `PARTS` (1, 2 or 4) pieces a tile.

    A tile is BLOCK_N columns of gate and the same of up, whose weights lie below each other in shared memory and are
    one product.
    """
    num_m, num_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _place(tile, num_m, num_n, GROUP)
        both = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
        for step in range(STEPS):
            a = x_desc.load([tile_m * BLOCK_M, step * BLOCK_K])
            w = tl.reshape(w_desc.load([0, tile_n * BLOCK_N, step * BLOCK_K]), (2 * BLOCK_N, BLOCK_K))
            both = tl.dot(a, w.T, both, input_precision="ieee")
        gate, up = halves(both, BLOCK_M, 2 * BLOCK_N)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        if S > 0:
            gate, up = add_deltas(
                gate, up, row, column, column + W0, h_ptr, b_ptr, work_ptr, tiles_at, plane_rows, max_pages,
                stride_page, stride_b, True, W0, W0, 0, S, SPLITS, LIST_ROWS,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        # Rounded where the product alone would be, so that both ways give the same numbers.
        active = silu_mul_block(gate.to(out_desc.dtype), up.to(out_desc.dtype))
        _store_parts(out_desc, active, row, column, BLOCK_M, BLOCK_N, PARTS)
