"""LoRA shrink and expand in Triton: what a CUDA device runs.

A site costs two launches: shrink, h = x A^T, and expand, out += h B. Both walk the work list of the step
(`worklist`), so their cost follows active rows, adapters and true ranks. Shrink splits the long input dimension over
programs; each split writes a plane of h of its own and expand sums the planes, so that nothing is zeroed and nothing
is added atomically, and a result does not depend on the order in which programs run.

Two forms of shrink. bgmv, for decode: a unit is one page and one slice of a block of up to 16 rows; a block of one row,
the rule when every sequence has its own adapter, is a matrix-vector product without tensor cores, bound by reading A.
sgmv, for prefill: a unit is 64 rows and two pages with all slices, so that x is read once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from lorax_kernels.layout import PAGE_RANK
from lorax_kernels.metadata import LoraBatch
from lorax_kernels.tuning import LoraConfig, lora_config
from lorax_kernels.worklist import LoraWork

MAX_SLICES = 3
_INTERPRETER_SMS = 3
# Numbers that change from batch to batch: a kernel compiled anew for each that happens to divide by 16 would stall.
_VARYING = ("blocks_at", "units_at", "rows_at", "pages_at", "stride_plane", "stride_h")


@triton.jit
def _num_splits(
    pieces, K: tl.constexpr, BLOCK_K: tl.constexpr, MAX_SPLITS: tl.constexpr, TARGET: tl.constexpr
):
    """Splits of K and BLOCK_K blocks in each, the same in shrink and expand: enough programs to fill the device."""
    k_blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    wanted = tl.minimum(tl.cdiv(TARGET, tl.maximum(pieces, 1)), MAX_SPLITS)
    blocks_each = tl.cdiv(k_blocks, wanted)
    return tl.cdiv(k_blocks, blocks_each), blocks_each


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
def _bgmv_shrink_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    work_ptr,
    stride_x,
    stride_page,
    units_at,
    rows_at,
    pages_at,
    stride_plane,
    stride_h,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    TARGET: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    EVEN: tl.constexpr = K % BLOCK_K == 0
    DOT_K: tl.constexpr = BLOCK_K if BLOCK_K < 256 else 256
    rank = tl.arange(0, 8)
    pieces = tl.load(work_ptr + 1) * S
    splits, blocks_each = _num_splits(pieces, K, BLOCK_K, MAX_SPLITS, TARGET)
    total = pieces * splits
    item = tl.program_id(0)
    page, first, count, ordinal, row, _, _ = _record(
        work_ptr + units_at + item // splits // S * 8, item < total
    )
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        split = item % splits
        which = item // splits % S
        a_base = a_ptr + page.to(tl.int64) * stride_page + which * 8 * K
        h_base = h_ptr + split * stride_plane + (ordinal * S + which) * 8
        k_begin = split * blocks_each * BLOCK_K
        # The next item's record is on its way while this item's weights are read.
        after = item + tl.num_programs(0)
        next_page, next_first, next_count, next_ordinal, next_row, _, _ = _record(
            work_ptr + units_at + after // splits // S * 8, after < total
        )
        if count == 1:
            wide = tl.zeros((8, BLOCK_K), dtype=tl.float32)
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
                wide += a.to(tl.float32) * x.to(tl.float32)[None, :]
            tl.store(h_base + first * stride_h + rank, tl.sum(wide, axis=1))
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
def _sgmv_shrink_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    work_ptr,
    stride_x,
    stride_page,
    units_at,
    rows_at,
    pages_at,
    stride_plane,
    stride_h,
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
    where = h_ptr + split * stride_plane + (first + m)[:, None] * stride_h + (ordinal * COLUMNS + n)[None, :]
    tl.store(where, acc, mask=(m < count)[:, None] & has_page[None, :])


@triton.jit
def _sum_planes(h_ptr, splits, stride_plane, where, seen, MAX_SPLITS: tl.constexpr):
    """Sum of the planes of h at the offsets `where`."""
    total = tl.load(h_ptr + where, mask=seen, other=0.0)
    for split in tl.static_range(1, MAX_SPLITS):
        total += tl.load(h_ptr + split * stride_plane + where, mask=seen & (split < splits), other=0.0)
    return total


@triton.jit(do_not_specialize=("blocks_at", *_VARYING[2:]))
def _expand_kernel(
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
    stride_plane,
    stride_h,
    W0,
    W1,
    W2,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    TARGET: tl.constexpr,
    DECODE: tl.constexpr,
    PDL: tl.constexpr,
):
    splits = MAX_SPLITS
    if DECODE:
        splits, _ = _num_splits(tl.load(work_ptr + 1) * S, K, BLOCK_K, MAX_SPLITS, TARGET)
    tiles0 = tl.cdiv(W0, BLOCK_N)
    tiles1 = tl.cdiv(W1, BLOCK_N)
    tiles = tiles0 + tiles1 + tl.cdiv(W2, BLOCK_N)
    total = tl.load(work_ptr) * tiles
    r = tl.arange(0, 16)
    item = tl.program_id(0)
    first, count, page_at, num_pages, row, page0, page1 = _record(
        work_ptr + blocks_at + item // tiles * 8, item < total
    )
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        tile = item % tiles
        # Which slice the tile is of, its first column, and the width the slice ends at.
        in1 = (tile >= tiles0).to(tl.int32)
        in2 = (tile >= tiles0 + tiles1).to(tl.int32)
        which = in1 + in2
        width = tl.where(which == 0, W0, tl.where(which == 1, W1, W2))
        n = (tile - in1 * tiles0 - in2 * tiles1) * BLOCK_N + tl.arange(0, BLOCK_N)
        n_seen = n < width
        columns = in1 * W0 + in2 * W1 + n
        after = item + tl.num_programs(0)
        next_first, next_count, next_page_at, next_num_pages, next_row, next_page0, next_page1 = _record(
            work_ptr + blocks_at + after // tiles * 8, after < total
        )
        pages = tl.where(r < 8, page0, page1).to(tl.int64)
        seen = r // 8 < num_pages
        where_b = (r % 8 * stride_b)[:, None] + columns[None, :]
        b = tl.load(
            b_ptr + (pages * stride_page)[:, None] + where_b, mask=seen[:, None] & n_seen[None, :], other=0.0
        )
        if PDL:
            tl.extra.cuda.gdc_wait()
        where_h = (r // 8 * S + which) * 8 + r % 8
        if DECODE:
            single = count == 1
        else:
            single = False
        if single:
            where_out = out_ptr + row.to(tl.int64) * stride_out + columns
            base = tl.load(where_out, mask=n_seen, other=0.0)
            h = _sum_planes(h_ptr, splits, stride_plane, first * stride_h + where_h, seen, MAX_SPLITS)
            acc = tl.sum(h[:, None] * b.to(tl.float32), axis=0)
            for j in range(2, num_pages, 2):
                seen_j = j + r // 8 < num_pages
                pages_j = tl.load(work_ptr + pages_at + page_at + j + r // 8, mask=seen_j, other=0).to(
                    tl.int64
                )
                b_j = tl.load(
                    b_ptr + (pages_j * stride_page)[:, None] + where_b,
                    mask=seen_j[:, None] & n_seen[None, :],
                    other=0.0,
                )
                h_j = _sum_planes(
                    h_ptr, splits, stride_plane, first * stride_h + j * S * 8 + where_h, seen_j, MAX_SPLITS
                )
                acc += tl.sum(h_j[:, None] * b_j.to(tl.float32), axis=0)
            tl.store(where_out, (base.to(tl.float32) + acc).to(base.dtype), mask=n_seen)
        else:
            m = tl.arange(0, BLOCK_M)
            m_seen = m < count
            rows = tl.load(work_ptr + rows_at + first + m, mask=m_seen, other=0).to(tl.int64)
            where_m = out_ptr + rows[:, None] * stride_out + columns[None, :]
            base_m = tl.load(where_m, mask=m_seen[:, None] & n_seen[None, :], other=0.0)
            h_rows = (first + m)[:, None] * stride_h + where_h[None, :]
            h_m = _sum_planes(
                h_ptr, splits, stride_plane, h_rows, m_seen[:, None] & seen[None, :], MAX_SPLITS
            )
            acc_m = tl.dot(h_m.to(b.dtype), b, input_precision="ieee")
            for j in range(2, num_pages, 2):
                seen_m = j + r // 8 < num_pages
                pages_m = tl.load(work_ptr + pages_at + page_at + j + r // 8, mask=seen_m, other=0).to(
                    tl.int64
                )
                b_m = tl.load(
                    b_ptr + (pages_m * stride_page)[:, None] + where_b,
                    mask=seen_m[:, None] & n_seen[None, :],
                    other=0.0,
                )
                h_n = _sum_planes(
                    h_ptr,
                    splits,
                    stride_plane,
                    h_rows + j * S * 8,
                    m_seen[:, None] & seen_m[None, :],
                    MAX_SPLITS,
                )
                acc_m = tl.dot(h_n.to(b.dtype), b_m, acc_m, input_precision="ieee")
            tl.store(
                where_m,
                (base_m.to(tl.float32) + acc_m).to(base_m.dtype),
                mask=m_seen[:, None] & n_seen[None, :],
            )
        first, count, page_at, num_pages = next_first, next_count, next_page_at, next_num_pages
        row, page0, page1 = next_row, next_page0, next_page1


@dataclass(slots=True)
class Shrunk:
    """h of one site, as planes [splits, rows, max_pages * S * 8] in float32, and how it was made."""

    planes: torch.Tensor
    in_features: int
    slices: int
    config: LoraConfig


@functools.cache
def _num_sms(index: int | None) -> int:
    if index is None:
        return _INTERPRETER_SMS
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def allocate_planes(a: torch.Tensor, work: LoraWork, config: LoraConfig) -> torch.Tensor:
    """Memory for h of a site with `a` [P, S, 8, in]; every element that expand reads is written by shrink."""
    splits = config.max_splits if work.shape.decode else config.prefill_splits
    width = work.max_pages * a.shape[1] * PAGE_RANK
    return torch.empty(splits, work.capacity.rows, width, dtype=torch.float32, device=a.device)


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    work: LoraWork,
    config: LoraConfig | None = None,
    planes: torch.Tensor | None = None,
) -> Shrunk:
    """h = x A^T for every row with an adapter: x [T, in], a [P, S, 8, in].

    `planes` comes from `allocate_planes`, where the stream that runs shrink is not the one that frees the result.

    Raises:
        ValueError: the rows of x or a are not contiguous, or there are more slices than `MAX_SLICES`.
    """
    slices, in_features = a.shape[1], a.shape[3]
    if x.stride(1) != 1 or a.stride(3) != 1 or slices > MAX_SLICES or x.shape[1] != in_features:
        raise ValueError(
            f"shrink: x {tuple(x.shape)} and a {tuple(a.shape)} do not fit or are not contiguous in rows"
        )
    config = config or lora_config(work.num_tokens, work.shape.decode)
    columns = slices * PAGE_RANK
    at = work.capacity
    if planes is None:
        planes = allocate_planes(a, work, config)
    splits = planes.shape[0]
    arguments = (
        x, a, planes, work.data, x.stride(0), a.stride(0), at.units_at, at.rows_at, at.pages_at,
        planes.stride(0), planes.stride(1),
    )  # fmt: skip
    if work.shape.decode:
        sms = _num_sms(x.device.index)
        pieces = (at.units if work.fixed else work.num_units) * slices
        grid = (max(1, min(sms * config.shrink_waves, pieces * splits)),)
        _bgmv_shrink_kernel[grid](
            *arguments, K=in_features, S=slices, BLOCK_M=work.shape.block_rows, BLOCK_K=config.block_k,
            MAX_SPLITS=splits, TARGET=sms * config.shrink_waves, STAGES=config.stages, PDL=config.pdl,
            num_warps=config.shrink_warps, num_stages=1, **_pdl(config),
        )  # fmt: skip
    else:
        unit_columns = work.shape.unit_pages * columns
        _sgmv_shrink_kernel[(work.num_units * splits,)](
            *arguments, K=in_features, COLUMNS=columns, UNIT_PAGES=work.shape.unit_pages,
            BLOCK_M=work.shape.block_rows, BLOCK_N=max(16, triton.next_power_of_2(unit_columns)),
            BLOCK_K=config.prefill_block_k, SPLITS=splits, STAGES=config.prefill_stages,
            num_warps=config.prefill_shrink_warps, num_stages=1,
        )  # fmt: skip
    return Shrunk(planes, in_features, slices, config)


def expand(
    h: Shrunk, b: torch.Tensor, work: LoraWork, out: torch.Tensor, out_slices: tuple[int, ...]
) -> None:
    """out [T, out] += h B for every row with an adapter: b [P, 8, out].

    Raises:
        ValueError: shapes do not fit, or rows are not contiguous.
    """
    if out.stride(1) != 1 or b.stride(2) != 1 or len(out_slices) != h.slices or sum(out_slices) != b.shape[2]:
        raise ValueError(
            f"expand: b {tuple(b.shape)}, out {tuple(out.shape)} and slices {out_slices} do not fit"
        )
    config, at, decode = h.config, work.capacity, work.shape.decode
    block_n = config.block_n if decode else config.prefill_block_n
    tiles = sum(triton.cdiv(width, block_n) for width in out_slices)
    items = (at.blocks if work.fixed else work.num_blocks) * tiles
    sms = _num_sms(out.device.index)
    widths = (*out_slices, 0, 0, 0)[:MAX_SLICES]
    grid = (max(1, min(sms * config.expand_waves, items) if decode else items),)
    _expand_kernel[grid](
        h.planes, b, out, work.data, out.stride(0), b.stride(0), b.stride(1), at.blocks_at, at.rows_at, at.pages_at,
        h.planes.stride(0), h.planes.stride(1), *widths, K=h.in_features, S=h.slices,
        BLOCK_M=work.shape.block_rows, BLOCK_N=block_n, BLOCK_K=config.block_k, MAX_SPLITS=h.planes.shape[0],
        TARGET=sms * config.shrink_waves if decode else 0, DECODE=decode,
        PDL=config.pdl and decode, num_stages=1,
        num_warps=config.expand_warps if decode else config.prefill_expand_warps,
        **(_pdl(config) if decode else {}),
    )  # fmt: skip


def add_lora(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    batch: LoraBatch,
    out: torch.Tensor,
    out_slices: tuple[int, ...],
    config: LoraConfig | None = None,
) -> None:
    """`lorax_kernels.add_lora` on a device; `batch` must have its work list there."""
    work = _work_of(batch)
    expand(shrink(x, a, work, config), b, work, out, out_slices)


def linear(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor | None],
    weights: tuple[torch.Tensor, torch.Tensor],
    batch: LoraBatch,
    out_slices: tuple[int, ...],
    config: LoraConfig | None = None,
) -> torch.Tensor:
    """`lorax_kernels.lora_linear` on a device. Where the configuration says so, shrink runs beside the base layer's
    product on a stream of its own: both wait for x only."""
    work = _work_of(batch)
    config = config or lora_config(work.num_tokens, work.shape.decode)
    if not config.overlap:
        out = F.linear(x, *layer)
        h = shrink(x, weights[0], work, config)
    else:
        planes = allocate_planes(weights[0], work, config)
        here, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            h = shrink(x, weights[0], work, config, planes)
        out = F.linear(x, *layer)
        here.wait_stream(side)
    expand(h, weights[1], work, out, out_slices)
    return out


def _work_of(batch: LoraBatch) -> LoraWork:
    if batch.work is None:
        raise ValueError("batch: made for the CPU, it has no work list; build it with the tensors' device")
    return batch.work


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _pdl(config: LoraConfig) -> dict[str, bool]:
    return {"launch_pdl": True} if config.pdl else {}
