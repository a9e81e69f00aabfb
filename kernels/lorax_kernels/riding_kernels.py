"""LoRA shrink inside the node that makes a base layer's input, for decode: one launch fewer a site.

Beside a norm, or SiLU and multiplication, a launch has two kinds of programs that do not wait for each other. Some do
the node's own work, row by row. The others walk the work list like `bgmv_shrink_kernel`, but read what the node reads
and not what it writes, and repeat the element-wise part on the way: a product of the norm's input and weight costs them
nothing beside reading A. The norm's factor 1/rms needs the whole row, which no split of it has; h is stored without it,
the norm's programs store the factor, and expand applies it: (x w) A^T / rms = (x w / rms) A^T. Nothing is added
atomically, and a row's h does not depend on the other rows of the batch.

After attention the whole row is nowhere in one program either: there the program that finishes a key head's queries
adds a plane of h for their columns (`ride_heads`).

What to expect on an H100 for a layer of the 8B shape, by counting and not by measurement. A launch costs 1.42 us, and
one that waits for its input then takes 1.4 us of latencies one after another: header and record of the work list 0.5,
weights from memory 0.7, sums and stores 0.2. Riding takes away one launch of the two a site has, and its latencies run
beside the node's own 0.9 us, so that about 0.7 us of it stays. Where launches may start early (`pdl`), expand does all
but add to the output while the product ends, and 1.6 us of its 2.8 stay. Bytes come on top at 3 TB/s, and the output at
L2's 5.5. Microseconds of LoRA a layer, all four sites:

    rows, adapters, rank    shrink apart, measured    riding    riding, pdl    goal
    1, 1, 16                          14.6              14           9          8
    32, 1, 16                         24.4              18          13         12
    32, 32, 16                        46.6              43          38         42
    128, 1, 16                        44.1              27          22         25
    128, 32, 16                       78.4              50          45         55
    128, 128, 16                      153               146         140        150
    32, 32, 8 to 64                   71.9              64          58         80
    128, 128, 64                      487               480         475        490

The first column has shrink on a second stream beside the product, which hides it where the product is long; one after
the other, 1 row took 26 us, 3.3 us a launch where this counts 2.8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorax_kernels.fused_triton import norm_row, silu_mul_block
from lorax_kernels.lora_kernels import _VARYING, _record, _split_shift

NORM = tl.constexpr(0)
RESIDUAL_NORM = tl.constexpr(1)
SILU = tl.constexpr(2)


@triton.jit
def _source(x_ptr, other_ptr, weight, where, where_other, seen, K: tl.constexpr, SOURCE: tl.constexpr):
    """Elements of the base layer's input, the norm's factor apart: float32 from a norm, else as they are stored."""
    x = tl.load(x_ptr + where, mask=seen, other=0.0)
    if SOURCE == SILU:
        up = tl.load(x_ptr + where + K, mask=seen, other=0.0)
        value = silu_mul_block(x, up)
    else:
        if SOURCE == RESIDUAL_NORM:
            other = tl.load(other_ptr + where_other, mask=seen, other=0.0)
            x = (x.to(tl.float32) + other.to(tl.float32)).to(x.dtype)
        value = x.to(tl.float32) * weight.to(tl.float32)
    return value


@triton.jit
def _norm_weight(weight_ptr, k, inside, SOURCE: tl.constexpr):
    if SOURCE == SILU:
        weight = k  # not looked at
    else:
        weight = tl.load(weight_ptr + k, mask=inside, other=0.0)
    return weight


@triton.jit
def _ride(
    program, programs, x_ptr, other_ptr, weight_ptr, a_ptr, h_ptr, work_ptr, stride_x, stride_other, stride_page,
    units_at, rows_at, plane_rows, max_pages,
    K: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, MAX_SHIFT: tl.constexpr,
    TARGET_LOG2: tl.constexpr, STAGES: tl.constexpr, SOURCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h of `program`'s items, of `programs`: an item is a split of a unit's input, of one slice where the unit is of a
    single row, of all slices where it is of more, so that their input is read once."""
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    DOT_K: tl.constexpr = BLOCK_K if BLOCK_K < 128 else 128
    N: tl.constexpr = 16 if S < 3 else 32
    rank = tl.arange(0, 8)
    n = tl.arange(0, N)
    m = tl.arange(0, BLOCK_M)
    stride_h = S * max_pages * 8
    shift = _split_shift(tl.load(work_ptr + 3), S, TARGET_LOG2, MAX_SHIFT)
    blocks_each = (K_BLOCKS + (1 << shift) - 1) >> shift
    single_units = tl.load(work_ptr + 5)
    singles = (single_units * S) << shift
    total = singles + ((tl.load(work_ptr + 1) - single_units) << shift)
    for item in range(program, total, programs):
        split = item & ((1 << shift) - 1)
        index = tl.where(item < singles, (item >> shift) // S, single_units + ((item - singles) >> shift))
        page, first, count, ordinal, row, _, _ = _record(work_ptr + units_at + index * 8, True)
        a_base = a_ptr + page.to(tl.int64) * stride_page
        h_base = h_ptr + split * plane_rows * stride_h + first * stride_h + ordinal * 8
        k_begin = split * blocks_each * BLOCK_K
        k_end = tl.minimum(k_begin + blocks_each * BLOCK_K, K)
        if item < singles:
            which = (item >> shift) % S
            total_h = tl.zeros((8,), dtype=tl.float32)
            for k0 in range(k_begin, k_end, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                inside = k < K
                a = tl.load(
                    a_base + (which * 8 + rank)[:, None] * K + k[None, :], mask=inside[None, :], other=0.0
                )
                weight = _norm_weight(weight_ptr, k, inside, SOURCE)
                if PDL:
                    tl.extra.cuda.gdc_wait()
                x = _source(
                    x_ptr, other_ptr, weight, row.to(tl.int64) * stride_x + k, row.to(tl.int64) * stride_other + k,
                    inside, K, SOURCE,
                )  # fmt: skip
                total_h += tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
            tl.store(h_base + which * max_pages * 8 + rank, total_h)
        else:
            m_seen = m < count
            rows = tl.load(work_ptr + rows_at + first + m, mask=m_seen, other=0).to(tl.int64)
            if PDL:
                tl.extra.cuda.gdc_wait()
            acc = tl.zeros((BLOCK_M, N), dtype=tl.float32)
            for k0 in tl.range(k_begin, k_end, DOT_K, num_stages=STAGES):
                k = k0 + tl.arange(0, DOT_K)
                inside = k < K
                a_seen = (n < 8 * S)[None, :] & inside[:, None]
                a = tl.load(a_base + n[None, :] * K + k[:, None], mask=a_seen, other=0.0)
                weight = _norm_weight(weight_ptr, k, inside, SOURCE)[None, :]
                x = _source(
                    x_ptr, other_ptr, weight, rows[:, None] * stride_x + k[None, :],
                    rows[:, None] * stride_other + k[None, :], m_seen[:, None] & inside[None, :], K, SOURCE,
                )  # fmt: skip
                if x.dtype == a.dtype:
                    acc = tl.dot(x, a, acc, input_precision="ieee")
                elif a.dtype == tl.float16:
                    # Without its factor a norm's input may be beyond float16. TF32 has as many digits, and more range.
                    acc = tl.dot(x, a.to(tl.float32), acc, input_precision="tf32")
                else:
                    acc = tl.dot(x.to(a.dtype), a, acc, input_precision="ieee")
            where = h_base + m[:, None] * stride_h + (n // 8 * max_pages * 8 + n % 8)[None, :]
            tl.store(where, acc, mask=m_seen[:, None] & (n < 8 * S)[None, :])


@triton.jit
def ride_heads(
    result, row, head, a_ptr, h_ptr, work_ptr, stride_page, tokens_at, pages_at, plane_rows, max_pages,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The part of a row's h that comes from the query heads of one key head: `result` [BLOCK_G, BLOCK_D] is attention's
    for them, and the key head's number is that of the plane.

    Every query head meets A's columns of all heads of its group in one matrix product, whose diagonal is what is
    wanted: the others cost nothing, because attention pads the heads of a group to 16 rows anyway."""
    PADDED: tl.constexpr = 2 if GROUP <= 2 else (4 if GROUP <= 4 else (8 if GROUP <= 8 else 16))
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    column = tl.arange(0, 8 * PADDED)
    other = column % PADDED
    entry = work_ptr + tokens_at + row * 4
    position = tl.load(entry)
    page_list = work_ptr + pages_at + tl.load(entry + 1)
    num_pages = tl.load(entry + 2)
    h_row = h_ptr + (head * plane_rows + position) * max_pages * 8
    where = column // PADDED * HEADS * GROUP * D + (head * GROUP + other) * D
    seen = (other < GROUP)[None, :] & (d < D)[:, None]
    for j in range(num_pages):
        page = tl.load(page_list + j).to(tl.int64)
        a = tl.load(a_ptr + page * stride_page + where[None, :] + d[:, None], mask=seen, other=0.0)
        product = tl.dot(result.to(a.dtype), a, input_precision="ieee")
        own = tl.where(g[:, None] == other[None, :], product, 0.0)
        h = tl.sum(tl.reshape(tl.sum(own, axis=0), (8, PADDED)), axis=1)
        tl.store(h_row + j * 8 + tl.arange(0, 8), h)


@triton.jit(do_not_specialize=("riders", *_VARYING[1:3], *_VARYING[4:]))
def norm_shrink_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, scale_ptr, a_ptr, h_ptr, work_ptr, stride_x, stride_residual, eps,
    riders, stride_page, units_at, rows_at, plane_rows, max_pages,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, MAX_SHIFT: tl.constexpr, TARGET_LOG2: tl.constexpr, STAGES: tl.constexpr,
    SOURCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMS norm, and x A^T of the rows with an adapter but for the norm's factor. The first `riders` programs, which
    have more to wait for, are those of shrink."""
    program = tl.program_id(0)
    if program < riders:
        _ride(
            program, riders, x_ptr, residual_ptr, weight_ptr, a_ptr, h_ptr, work_ptr, stride_x, stride_residual,
            stride_page, units_at, rows_at, plane_rows, max_pages,
            WIDTH, S, BLOCK_M, BLOCK_K, MAX_SHIFT, TARGET_LOG2, STAGES, SOURCE, PDL,
        )  # fmt: skip
    else:
        row = program - riders
        scale = norm_row(
            x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, row.to(tl.int64), stride_x, stride_residual, eps,
            WIDTH, BLOCK, HAS_RESIDUAL, PDL,
        )  # fmt: skip
        tl.store(scale_ptr + row, scale)
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=("riders", *_VARYING[1:3], *_VARYING[4:]))
def silu_shrink_kernel(
    x_ptr, y_ptr, a_ptr, h_ptr, work_ptr, stride_x, riders, stride_page, units_at, rows_at, plane_rows, max_pages,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    MAX_SHIFT: tl.constexpr, TARGET_LOG2: tl.constexpr, STAGES: tl.constexpr, SOURCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up, and its product with A^T for the rows with an adapter."""
    program = tl.program_id(0)
    if program < riders:
        _ride(
            program, riders, x_ptr, x_ptr, x_ptr, a_ptr, h_ptr, work_ptr, stride_x, stride_x, stride_page, units_at,
            rows_at, plane_rows, max_pages,
            WIDTH, S, BLOCK_M, BLOCK_K, MAX_SHIFT, TARGET_LOG2, STAGES, SOURCE, PDL,
        )  # fmt: skip
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
        COLUMN_BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
        piece = program - riders
        row = (piece // COLUMN_BLOCKS).to(tl.int64)
        column = piece % COLUMN_BLOCKS * BLOCK + tl.arange(0, BLOCK)
        seen = column < WIDTH
        gate = tl.load(x_ptr + row * stride_x + column, mask=seen, other=0.0)
        up = tl.load(x_ptr + row * stride_x + WIDTH + column, mask=seen, other=0.0)
        tl.store(y_ptr + row * WIDTH + column, silu_mul_block(gate, up), mask=seen)
    if PDL:
        tl.extra.cuda.gdc_wait()
