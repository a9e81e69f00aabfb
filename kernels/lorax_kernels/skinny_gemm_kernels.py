"""Products of a few rows with a large weight as Triton kernels; `skinny_gemm` launches them.

Reading the weight is all that such a product costs. With PDL a program asks for the begin of its share of the weight,
which no kernel writes, while the launch before it still runs, and waits for that launch only before it reads x: the
device then reads from memory through the gaps between launches. The launch after it may begin at once for the same
reason; it waits in its turn.

A product of one row may add the row's LoRA delta h B as well. Shrink is then the launch before it, beside which its
first reads run, and expand is no launch. What is added to what, and where it is rounded, is as expand does it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorax_kernels.expand_node_kernels import _LISTED, _token_record
from lorax_kernels.fused_triton import silu_mul_block
from lorax_kernels.lora_kernels import _split_shift


@triton.jit
def _columns(tile, lane, OUT: tl.constexpr, BLOCK_N: tl.constexpr, SILU: tl.constexpr):
    """The columns of a program's lanes, and which exist: a half of gate and the same of up if it is for SiLU."""
    if SILU:
        half = tile * (BLOCK_N // 2) + lane % (BLOCK_N // 2)
        n = half + lane // (BLOCK_N // 2) * (OUT // 2)
        seen = half < OUT // 2
    else:
        n = tile * BLOCK_N + lane
        seen = n < OUT
    return n, seen


@triton.jit
def _ask_l2(
    ptr, tile, k_begin, OUT: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Have L2 read `COLUMNS` columns of BLOCK_N rows, in `PIECES` requests a row. Nothing is asked for at the edge of
    the weight: a request must stay inside."""
    EACH: tl.constexpr = COLUMNS // PIECES
    SIZE: tl.constexpr = EACH * (ptr.dtype.element_ty.primitive_bitwidth // 8)
    if k_begin + COLUMNS <= K:
        piece = tl.arange(0, BLOCK_N * PIECES)
        n, _ = _columns(tile, piece // PIECES, OUT, BLOCK_N, SILU)
        row = tl.minimum(n, OUT - 1).to(tl.int64)
        where = ptr + row * K + k_begin + piece % PIECES * EACH
        tl.inline_asm_elementwise(
            "{ .reg .u64 g; cvta.to.global.u64 g, $1; cp.async.bulk.prefetch.L2.global [g], $2; mov.u32 $0, 0; }",
            "=r,l,r",
            [where, SIZE],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _weight_tile(
    w_rows, k_begin, step, K: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr
):
    """BLOCK_N rows and BLOCK_K columns; zeros after the last step."""
    k = k_begin + step * BLOCK_K + tl.arange(0, BLOCK_K)
    seen = step < STEPS if EVEN else (step < STEPS) & (k < K)[None, :]
    return tl.load(w_rows[:, None] + k[None, :], mask=seen, other=0.0, eviction_policy="evict_first")


@triton.jit
def _two_pages(b_ptr, page_list, j, num_pages, n, n_seen, stride_page, stride_b):
    """B of pages j and j + 1, [16, columns]."""
    r = tl.arange(0, 16)
    seen = j + r // 8 < num_pages
    pages = tl.load(page_list + j + r // 8, mask=seen, other=0).to(tl.int64)
    where = (pages * stride_page + r % 8 * stride_b)[:, None] + n[None, :]
    return tl.load(b_ptr + where, mask=seen[:, None] & n_seen[None, :], other=0.0)


@triton.jit
def _delta_of_pages(h_where, b, j, num_pages, n_seen, splits, stride_plane, MAX_SPLITS: tl.constexpr):
    """h B of pages j and j + 1; `h_where` is where h of every column's slice begins, [columns]."""
    r = tl.arange(0, 16)
    seen = (j + r // 8 < num_pages)[:, None] & n_seen[None, :]
    h = tl.zeros(b.shape, dtype=tl.float32)
    for split in tl.static_range(MAX_SPLITS):
        where = h_where[None, :] + split * stride_plane + (j * 8 + r)[:, None]
        h += tl.load(where, mask=seen & (split < splits), other=0.0)
    return tl.sum(h * b.to(tl.float32), axis=0)


@triton.jit(do_not_specialize=_LISTED)
def skinny_row_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, h_ptr, b_ptr, work_ptr, stride_page, stride_b, tokens_at, pages_at, plane_rows,
    max_pages,
    OUT: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, S: tl.constexpr,
    MAX_SHIFT: tl.constexpr, TARGET_LOG2: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One row times the weight: a program has BLOCK_N columns of the result, and `STAGES` (1 or 2) tiles of the
    weight in registers on their way while it uses another. With S slices, of which the first are W0 and W1 wide, the
    row's delta is added; with none, what is about h and B is ignored. With `SILU` the result is that of SiLU and
    multiplication, [OUT / 2]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EVEN: tl.constexpr = K % BLOCK_K == 0
    n, n_seen = _columns(tl.program_id(0), tl.arange(0, BLOCK_N), OUT, BLOCK_N, SILU)
    # Rows after the last are read as the last again: cheaper than a mask.
    w_rows = w_ptr + tl.minimum(n, OUT - 1).to(tl.int64) * K
    near = _weight_tile(w_rows, 0, 0, K, STEPS, BLOCK_K, EVEN)
    far = near
    if STAGES > 1:
        far = _weight_tile(w_rows, 0, 1, K, STEPS, BLOCK_K, EVEN)
    if S > 0:
        # The list says where B is, and no read of the weight may come after waiting for that.
        tl.debug_barrier()
        _, page_list, num_pages, _ = _token_record(work_ptr, tokens_at, pages_at, 0)
        splits = 1 << _split_shift(tl.load(work_ptr + 3), S, TARGET_LOG2, MAX_SHIFT)
        stride_plane = plane_rows * S * max_pages * 8
        which = (n >= W0).to(tl.int32) + (n >= W0 + W1).to(tl.int32)
        h_where = h_ptr + which * max_pages * 8  # an only row with an adapter is h's first
        b = _two_pages(b_ptr, page_list, 0, num_pages, n, n_seen, stride_page, stride_b)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_K // 8), dtype=tl.float32)
    for step in range(STEPS):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
        after = near
        if STEPS > STAGES:
            after = _weight_tile(w_rows, 0, step + STAGES, K, STEPS, BLOCK_K, EVEN)
        # Eight elements that lie together are one thread's: summing them first needs no other thread.
        product = tl.reshape(near.to(tl.float32) * x[None, :], (BLOCK_N, BLOCK_K // 8, 8))
        acc += tl.sum(product, axis=2)
        if STAGES > 1:
            near = far
            far = after
        else:
            near = after
    total = tl.sum(acc, axis=1)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n_seen, other=0.0).to(tl.float32)
    made = total.to(out_ptr.dtype.element_ty)
    if S > 0:
        # Not before: h on its way would take registers from tiles of the weight.
        delta = _delta_of_pages(h_where, b, 0, num_pages, n_seen, splits, stride_plane, 1 << MAX_SHIFT)
        for j in range(2, num_pages, 2):
            b = _two_pages(b_ptr, page_list, j, num_pages, n, n_seen, stride_page, stride_b)
            delta += _delta_of_pages(h_where, b, j, num_pages, n_seen, splits, stride_plane, 1 << MAX_SHIFT)
        made = (made.to(tl.float32) + delta).to(made.dtype)
    if SILU:
        gate, up = tl.split(tl.trans(tl.reshape(made, (2, BLOCK_N // 2))))
        half = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        tl.store(out_ptr + half, silu_mul_block(gate, up), mask=half < OUT // 2)
    else:
        tl.store(out_ptr + n, made, mask=n_seen)


@triton.jit(do_not_specialize=("tokens",))
def skinny_rows_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, tokens, stride_x,
    OUT: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PIECES: tl.constexpr, HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr, SILU: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_M rows times the weight: a program has BLOCK_N columns of the result and one of `SPLITS` parts of K.
    `AHEAD` blocks of K are asked of L2 before the wait. With splits `out_ptr` are planes [SPLITS, tokens, OUT]; with
    `SILU`, and no splits, it is the result of SiLU and multiplication, [tokens, OUT / 2].

    With `SWAP` the weight's tile is the left operand. On compute capability 9.0, with BLOCK_N a multiple of 64 and
    `num_warps` of 4, tensor cores then read both operands from shared memory, and not through registers."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    STEPS: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    EVEN: tl.constexpr = K % (SPLITS * BLOCK_K) == 0
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    k_begin = split * STEPS * BLOCK_K
    n, n_seen = _columns(tile, tl.arange(0, BLOCK_N), OUT, BLOCK_N, SILU)
    if PDL:
        if AHEAD > 0:
            COLUMNS: tl.constexpr = (AHEAD if AHEAD < STEPS else STEPS) * BLOCK_K
            _ask_l2(w_ptr, tile, k_begin, OUT, K, BLOCK_N, COLUMNS, PIECES, SILU)
        tl.extra.cuda.gdc_wait()
    m = tl.arange(0, BLOCK_M)
    x_rows = x_ptr + m.to(tl.int64) * stride_x
    w_rows = w_ptr + tl.minimum(n, OUT - 1).to(tl.int64) * K
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        k = k_begin + step * BLOCK_K + tl.arange(0, BLOCK_K)
        x_where = x_rows[:, None] + k[None, :]
        w_where = w_rows[:, None] + k[None, :]
        if EVEN:
            x = tl.load(x_where, mask=(m < tokens)[:, None], other=0.0, eviction_policy="evict_last")
            w = tl.load(w_where, eviction_policy="evict_first")
        else:
            x_seen = (m < tokens)[:, None] & (k < K)[None, :]
            x = tl.load(x_where, mask=x_seen, other=0.0, eviction_policy="evict_last")
            w = tl.load(w_where, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
        if SWAP:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if SWAP:
        acc = tl.trans(acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_seen, other=0.0).to(tl.float32)[None, :]
    made = acc.to(out_ptr.dtype.element_ty)
    if SILU:
        gate, up = tl.split(tl.permute(tl.reshape(made, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        half = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        where = out_ptr + m.to(tl.int64)[:, None] * (OUT // 2) + half[None, :]
        tl.store(where, silu_mul_block(gate, up), mask=(m < tokens)[:, None] & (half < OUT // 2)[None, :])
    else:
        where = out_ptr + (split * tokens + m).to(tl.int64)[:, None] * OUT + n[None, :]
        tl.store(where, made, mask=(m < tokens)[:, None] & n_seen[None, :])


@triton.jit(do_not_specialize=("tokens",))
def sum_planes_kernel(
    planes_ptr, bias_ptr, out_ptr, tokens,
    OUT: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [tokens, OUT] from planes [SPLITS, tokens, OUT], summed in their order."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = n < OUT
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        where = planes_ptr + (split * tokens + row).to(tl.int64) * OUT + n
        total += tl.load(where, mask=seen, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=seen, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * OUT + n, total.to(out_ptr.dtype.element_ty), mask=seen)
