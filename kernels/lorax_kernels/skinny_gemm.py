"""Base layers of decode steps with few rows, y = x @ weight.T, bound by reading the weight once.

Three forms by the number of rows: a matrix-vector product for one row, and tensor cores with the rows padded to 16 or
32, either of which may have rows and columns swapped. Each row's result depends on that row alone and on the form,
which decides the order of its sum: forms need not agree to the bit. Sums are in float32, rounded once, and without
atomics: the same call gives the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from lorax_kernels import prefill_gemm
from lorax_kernels.configs import GemmConfig, launch_options
from lorax_kernels.sizes import cdiv
from lorax_kernels.skinny_gemm_kernels import skinny_row_kernel, skinny_rows_kernel, sum_planes_kernel
from lorax_kernels.tuning import gemm_config
from lorax_kernels.worklist import LoraWork

MAX_ROWS = 32
_SUM_BLOCK = 512
_INTERPRETER_SMS = 4
_LEAST_N = 16  # columns of a program; fewer would read x more often than the weight


@dataclass(frozen=True, slots=True)
class RowDelta:
    """What an adapter adds to a product of one row: h B, or nothing where the row has no adapter.

    `planes` is h as shrink writes it, for `work`, with `splits` as in `lora_triton.Shrunk`; `b` is [P, 8, out] and
    contiguous in columns.
    """

    planes: torch.Tensor
    splits: tuple[int, int]
    b: torch.Tensor
    work: LoraWork
    out_slices: tuple[int, ...]

    @property
    def arguments(self) -> tuple[Any, ...]:
        at = self.work.capacity
        return (
            self.planes, self.b, self.work.data, self.b.stride(0), self.b.stride(1), at.tokens_at, at.pages_at,
            self.planes.shape[1], self.work.max_pages,
        )  # fmt: skip

    @property
    def constants(self) -> dict[str, int]:
        w0, w1 = (*self.out_slices, 0)[:2]
        shift, target = self.splits
        return {"W0": w0, "W1": w1, "S": len(self.out_slices), "MAX_SHIFT": shift, "TARGET_LOG2": target}


_NO_DELTA = {"W0": 0, "W1": 0, "S": 0, "MAX_SHIFT": 0, "TARGET_LOG2": 0}


def row_config(x: torch.Tensor, weight: torch.Tensor) -> GemmConfig | None:
    """How x [1, in] is multiplied by a kernel that can add a `RowDelta`; None if another multiplies it."""
    if x.dim() != 2 or x.shape[0] != 1 or not _fits(x, weight):
        return None
    config = _table_entry(x, weight)
    return config if config.kernel == "triton" else None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """`lorax_kernels.linear` on a device: as the tables for its number of rows say, or few rows as `config` does."""
    if x.dim() == 2 and 1 <= x.shape[0] <= MAX_ROWS:
        config = config or _table_entry(x, weight)
        if config.kernel == "triton" and _fits(x, weight):
            return skinny_linear(x, weight, bias, config)
    elif (many := prefill_gemm.chosen(x, weight)) is not None:
        return prefill_gemm.prefill_linear(x, weight, bias, many)
    return F.linear(x, weight, bias)


def linear_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor | None:
    """`lorax_kernels.linear_silu_mul` of few rows by one kernel; None where the table, or `config`, wants another
    way."""
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_ROWS or not _fits(x, weight):
        return None
    config = config or _table_entry(x, weight)
    return skinny_linear(x, weight, bias, config, silu=True) if does_silu(x, weight, config) else None


def does_silu(x: torch.Tensor, weight: torch.Tensor, config: GemmConfig) -> bool:
    """Whether a product of few rows as `config` says may do SiLU and multiplication as well."""
    if config.kernel != "triton" or not config.fuse_silu:
        return False
    return x.shape[0] == 1 or share(x.shape[1], weight.shape[0], config, _num_sms(x.device.index))[1] == 1


def begin_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """`lorax_kernels.begin_linear` on a device, as the table says, or few rows as `config` does."""
    if bias is None and x.dim() == 2 and 2 <= x.shape[0] <= MAX_ROWS and _fits(x, weight):
        config = config or _table_entry(x, weight)
        if config.kernel == "triton" and config.fuse_sum:
            planes = _product(x, weight, None, config.for_itemsize(x.element_size()), least_splits=2)
            if planes is not None:
                return planes
    return linear(x, weight, bias, config)


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    config: GemmConfig | None = None,
    delta: RowDelta | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """x @ weight.T + bias for few rows, whatever `config.kernel` says.

    Args:
        x: [T, in], T from 1 to `MAX_ROWS`, rows contiguous; bfloat16, float16 or float32.
        weight: [out, in], contiguous, in a multiple of 16, of the same type.
        bias: [out] or None.
        config: the table's entry if None.
        delta: added to the rounded product, and the sum rounded again, as `lora_triton.expand` would; for one row.
        silu: do `silu_mul` as well, of gate and up one after the other in `weight`; K is not split then.

    Returns:
        [T, out], or [T, out / 2] after `silu_mul`, of x's type.

    Raises:
        ValueError: the tensors are not as above.
    """
    columns = weight.shape[0]
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_ROWS or not _fits(x, weight) or (silu and columns % 2):
        raise ValueError(
            f"skinny_linear: x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype}"
        )
    if delta is not None and (
        x.shape[0] != 1
        or sum(delta.out_slices) != columns
        or len(delta.out_slices) > 3
        or delta.b.stride(2) != 1
    ):
        raise ValueError(f"skinny_linear: a delta of slices {delta.out_slices} for {x.shape[0]} x {columns}")
    config = (config or _table_entry(x, weight)).for_itemsize(x.element_size())
    if x.shape[0] == 1:
        return _row_product(x, weight, bias, config, delta, silu)
    if silu:
        config = replace(config, split_k=1)
    out = _product(x, weight, bias, config, silu=silu)
    assert out is not None
    return out if out.dim() == 2 else _sum_planes(out, bias, x.dtype, config)


def _row_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: GemmConfig,
    delta: RowDelta | None,
    silu: bool,
) -> torch.Tensor:
    columns, width = weight.shape
    out = torch.empty(1, columns // 2 if silu else columns, dtype=x.dtype, device=x.device)
    skinny_row_kernel[(cdiv(columns, config.block_n),)](
        x, weight, bias if bias is not None else x, out, *(delta.arguments if delta else (x, x, x, 0, 0, 0, 0, 0, 0)),
        OUT=columns, K=width, BLOCK_N=config.block_n, BLOCK_K=config.block_k, STAGES=min(2, config.stages),
        HAS_BIAS=bias is not None, PDL=config.pdl, SILU=silu, num_warps=config.warps, num_stages=1,
        **(delta.constants if delta else _NO_DELTA), **launch_options(config.pdl),
    )  # fmt: skip
    return out


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: GemmConfig,
    silu: bool = False,
    least_splits: int = 1,
) -> torch.Tensor | None:
    """The product of 2 rows and more: [T, out], or with splits planes [P, T, out] in float32 that lack the bias. None
    if there would be fewer splits than wanted."""
    (tokens, width), columns = x.shape, weight.shape[0]
    block_n, splits = share(width, columns, config, _num_sms(x.device.index))
    if splits < least_splits:
        return None
    if splits > 1:
        out = torch.empty(splits, tokens, columns, dtype=torch.float32, device=x.device)
    else:
        out = torch.empty(tokens, columns // 2 if silu else columns, dtype=x.dtype, device=x.device)
    has_bias = bias is not None and splits == 1
    skinny_rows_kernel[(cdiv(columns, block_n) * splits,)](
        x, weight, bias if has_bias else x, out, tokens, x.stride(0), OUT=columns, K=width,
        BLOCK_M=16 if tokens <= 16 else 32, BLOCK_N=block_n, BLOCK_K=config.block_k, SPLITS=splits,
        STAGES=config.stages, AHEAD=config.ahead, HAS_BIAS=has_bias, PDL=config.pdl, SILU=silu,
        SWAP=config.swap, PIECES=max(1, min(config.warps * 32 // block_n, config.block_k // 8)),
        num_warps=config.warps, num_stages=1, **launch_options(config.pdl),
    )  # fmt: skip
    return out


def _sum_planes(
    planes: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, config: GemmConfig
) -> torch.Tensor:
    splits, tokens, columns = planes.shape
    out = torch.empty(tokens, columns, dtype=dtype, device=planes.device)
    sum_planes_kernel[(tokens, cdiv(columns, _SUM_BLOCK))](
        planes, bias if bias is not None else planes, out, tokens, OUT=columns, SPLITS=splits, BLOCK=_SUM_BLOCK,
        HAS_BIAS=bias is not None, PDL=config.pdl, num_warps=2, num_stages=1, **launch_options(config.pdl),
    )  # fmt: skip
    return out


def share(width: int, columns: int, config: GemmConfig, sms: int) -> tuple[int, int]:
    """Columns of a program and splits of K for a weight [columns, width]: nearly every multiprocessor gets a program,
    by splits as far as `config.split_k` lets, else by fewer columns. Or as `config` says, if it is `exact`."""
    if config.exact:
        return config.block_n, min(config.split_k, cdiv(width, config.block_k))
    block_n, splits = config.block_n, 1
    enough = sms * 7 // 8
    while cdiv(columns, block_n) * splits < enough:
        if splits < config.split_k and width >= splits * 4 * config.block_k:
            splits *= 2
        elif block_n > _LEAST_N:
            block_n //= 2
        else:
            break
    return block_n, splits


def _table_entry(x: torch.Tensor, weight: torch.Tensor) -> GemmConfig:
    columns, width = weight.shape
    return gemm_config(x.shape[0], columns, width, x.device.index)


@functools.cache
def _num_sms(index: int | None) -> int:
    if index is None:
        return _INTERPRETER_SMS
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.shape[1] == weight.shape[1]
        and weight.shape[1] % 16 == 0
        and x.stride(1) == 1
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
        and x.dtype == weight.dtype
        and x.dtype in _TYPES
    )


_TYPES = (torch.bfloat16, torch.float16, torch.float32)
