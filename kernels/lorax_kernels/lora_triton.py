"""LoRA shrink and expand in Triton: what a CUDA device runs.

A site costs two launches: shrink, h = x A^T, and expand, out += h B. Both walk the work list of the step (`worklist`),
so their cost follows active rows, adapters and true ranks. Shrink splits the long input dimension over programs; each
split writes a plane of h of its own and expand sums the planes, so that nothing is zeroed and nothing is added
atomically, and a result does not depend on the order in which programs run.

Two forms of shrink. bgmv, for decode: a unit is one page and one slice of a block of up to 16 rows; a block of one row,
the rule when every sequence has its own adapter, is a matrix-vector product without tensor cores, bound by reading A.
sgmv, for prefill: a unit is 64 rows and two pages with all slices, so that x is read once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from lorax_kernels import prefill_gemm, skinny_gemm
from lorax_kernels.configs import LoraConfig, launch_options
from lorax_kernels.expand_kernels import bgmv_expand_kernel, sgmv_expand_kernel
from lorax_kernels.layout import PAGE_RANK
from lorax_kernels.lora_kernels import bgmv_shrink_kernel, sgmv_shrink_kernel
from lorax_kernels.metadata import LoraBatch
from lorax_kernels.prefill_delta import TileDelta
from lorax_kernels.sizes import next_power_of_2
from lorax_kernels.skinny_gemm import RowDelta
from lorax_kernels.tuning import lora_config
from lorax_kernels.worklist import LoraWork

MAX_SLICES = 3
_INTERPRETER_SMS = 3
# Below this a launch outside a graph is bound by the host, which a second stream only gives more to do.
_OVERLAP_MIN_TOKENS = 1024


@dataclass(slots=True)
class Shrunk:
    """h of one site, as planes [splits, rows, S * max_pages * 8] in float32, and how it was made.

    `splits` are the log2 of the most splits and of the pieces wanted in all.
    """

    planes: torch.Tensor
    slices: int
    config: LoraConfig
    splits: tuple[int, int]


@functools.cache
def num_sms(index: int | None) -> int:
    if index is None:
        return _INTERPRETER_SMS
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def allocate_planes(a: torch.Tensor, work: LoraWork, config: LoraConfig) -> torch.Tensor:
    """Memory for h of a site with `a` [P, S, 8, in]; every element that expand reads is written by shrink."""
    config = config.for_input(a.shape[3])
    splits = 1 << config.split_shift if work.shape.decode else config.prefill_splits
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
    config = config or lora_config(work.num_tokens, work.shape.decode, x.device.index)
    config = config.for_itemsize(x.element_size()).for_input(in_features)
    columns = slices * PAGE_RANK
    at = work.capacity
    if planes is None:
        planes = allocate_planes(a, work, config)
    arguments = (
        x, a, planes, work.data, x.stride(0), a.stride(0), at.units_at, at.rows_at, at.pages_at,
        planes.shape[1], work.max_pages,
    )  # fmt: skip
    if work.shape.decode:
        pieces = (at.units if work.fixed else work.num_units) * slices << config.split_shift
        grid = (max(1, min(num_sms(x.device.index) * config.shrink_waves, pieces)),)
        bgmv_shrink_kernel[grid](
            *arguments, K=in_features, S=slices, BLOCK_M=work.shape.block_rows, BLOCK_K=config.block_k,
            MAX_SHIFT=config.split_shift, TARGET_LOG2=config.target_log2, STAGES=config.stages, PDL=config.pdl,
            num_warps=config.shrink_warps, num_stages=1, **launch_options(config.pdl, config.shrink_registers),
        )  # fmt: skip
    else:
        unit_columns = work.shape.unit_pages * columns
        sgmv_shrink_kernel[(work.num_units * planes.shape[0],)](
            *arguments, K=in_features, COLUMNS=columns, UNIT_PAGES=work.shape.unit_pages,
            BLOCK_M=work.shape.block_rows, BLOCK_N=max(16, next_power_of_2(unit_columns)),
            BLOCK_K=config.prefill_block_k, SPLITS=planes.shape[0], STAGES=config.prefill_stages,
            num_warps=config.prefill_shrink_warps, num_stages=1,
        )  # fmt: skip
    return Shrunk(planes, slices, config, (config.split_shift, config.target_log2))


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
    config, at = h.config, work.capacity
    w0, w1, w2 = (*out_slices, 0, 0)[:MAX_SLICES]
    arguments = (
        work.data, out.stride(0), b.stride(0), b.stride(1), at.blocks_at, at.rows_at, at.pages_at,
        h.planes.shape[1], work.max_pages,
    )  # fmt: skip
    if work.shape.decode:
        row_tiles, tiles = _num_tiles(out_slices, config.row_n), _num_tiles(out_slices, config.block_n)
        items = (at.blocks if work.fixed else work.num_blocks) * max(row_tiles, tiles)
        bgmv_expand_kernel[(max(1, min(num_sms(out.device.index) * config.expand_waves, items)),)](
            h.planes, b, out, *arguments, W0=w0, W1=w1, W2=w2, S=h.slices, BLOCK_M=work.shape.block_rows,
            ROW_N=config.row_n, BLOCK_N=config.block_n, MAX_SHIFT=h.splits[0], TARGET_LOG2=h.splits[1], PDL=config.pdl,
            num_warps=config.expand_warps, num_stages=1, **launch_options(config.pdl, config.expand_registers),
        )  # fmt: skip
    else:
        sgmv_expand_kernel[(_num_tiles(out_slices, config.prefill_block_n), work.num_blocks)](
            h.planes, b, out, *arguments, W0=w0, W1=w1, W2=w2, S=h.slices, BLOCK_M=work.shape.block_rows,
            BLOCK_N=config.prefill_block_n, SPLITS=h.planes.shape[0], num_warps=config.prefill_expand_warps,
            num_stages=1,
        )  # fmt: skip


@functools.cache
def _num_tiles(out_slices: tuple[int, ...], block_n: int) -> int:
    return sum(-(-width // block_n) for width in out_slices)


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
    work = work_of(batch)
    expand(shrink(x, a, work, config), b, work, out, out_slices)


def linear(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor | None],
    weights: tuple[torch.Tensor, torch.Tensor],
    batch: LoraBatch,
    out_slices: tuple[int, ...],
    config: LoraConfig | None = None,
) -> torch.Tensor:
    """`lorax_kernels.lora_linear` on a device."""
    work = work_of(batch)
    config = config or lora_config(work.num_tokens, work.shape.decode, x.device.index)
    whole = linear_in_product(x, layer, weights, work, out_slices, config)
    if whole is not None:
        return whole
    out, h = linear_and_shrink(x, layer, weights[0], work, config)
    expand(h, weights[1], work, out, out_slices)
    return out


def linear_in_product(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor | None],
    weights: tuple[torch.Tensor, torch.Tensor],
    work: LoraWork,
    out_slices: tuple[int, ...],
    config: LoraConfig,
    *,
    silu: bool = False,
) -> torch.Tensor | None:
    """The base layer's output of one row, or of many, with their deltas, in two launches: shrink, and a product that
    adds h B, and with `silu` does `silu_mul`. None where the configuration, the number of rows or the tables want
    another way."""
    if not work.shape.decode:
        return _many_in_product(x, layer, weights, work, out_slices, config, silu)
    if not config.one_row_in_product or work.num_tokens != 1:
        return None
    product = skinny_gemm.row_config(x, layer[0])
    if product is None or (silu and not skinny_gemm.does_silu(x, layer[0], product)):
        return None
    h = shrink(x, weights[0], work, _launched_early(config) if product.pdl else config)
    delta = RowDelta(h.planes, h.splits, weights[1], work, out_slices)
    return skinny_gemm.skinny_linear(x, *layer, product, delta, silu)


def _many_in_product(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor | None],
    weights: tuple[torch.Tensor, torch.Tensor],
    work: LoraWork,
    out_slices: tuple[int, ...],
    config: LoraConfig,
    silu: bool,
) -> torch.Tensor | None:
    """`linear_in_product` of prefill."""
    weight, bias = layer
    product = None
    if not (silu and bias is not None):
        product = prefill_gemm.chosen_with_delta(x, weight, work, out_slices, silu)
    if product is None:
        return None
    delta = TileDelta(shrink(x, weights[0], work, config).planes, weights[1], work, out_slices)
    if silu:
        return prefill_gemm.prefill_linear_silu(x, weight, product, delta)
    return prefill_gemm.prefill_linear(x, weight, bias, product, delta)


@functools.cache
def _launched_early(config: LoraConfig) -> LoraConfig:
    return replace(config, pdl=True)


def linear_and_shrink(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor | None],
    a: torch.Tensor,
    work: LoraWork,
    config: LoraConfig,
    planes: bool = False,
) -> tuple[torch.Tensor, Shrunk]:
    """The base layer's output [T, out] without the deltas, and what expand needs to add them. Where the configuration
    says so, shrink runs beside the product on a stream of its own: both wait for x only. With `planes` the output may
    be some, as `skinny_gemm.begin_linear` gives them."""
    base_linear = skinny_gemm.begin_linear if planes else skinny_gemm.linear
    if config.overlap == "none" or not (work.fixed or work.num_tokens >= _OVERLAP_MIN_TOKENS):
        return base_linear(x, *layer), shrink(x, a, work, config)
    h_planes = allocate_planes(a, work, config)
    here, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_stream(here)
    # The order of the launches decides which of the two gets the multiprocessors first.
    if config.overlap == "product_first":
        out = base_linear(x, *layer)
    with torch.cuda.stream(side):
        h = shrink(x, a, work, config, h_planes)
    if config.overlap == "shrink_first":
        out = base_linear(x, *layer)
    here.wait_stream(side)
    return out, h


def work_of(batch: LoraBatch) -> LoraWork:
    """The work list of `batch`.

    Raises:
        ValueError: it was made for the CPU path and has none.
    """
    if batch.work is None:
        raise ValueError("batch: made for the CPU, it has no work list; build it with the tensors' device")
    return batch.work


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
