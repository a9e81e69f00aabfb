"""Base layers of steps with many rows, y = x @ weight.T, bound by the tensor cores; alone, or with SiLU and
multiplication after gate and up, which then never write their [T, 2 * inner], or with the adapters' deltas on the way.

Used where a table says so that was measured on the device (`tuning.prefill_config`); without one it is the library's
product, as `skinny_gemm.linear` launches it. See `prefill_gemm_kernels` for how they go about it.
"""

from __future__ import annotations

import functools

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from lorax_kernels.configs import PrefillConfig
from lorax_kernels.prefill_delta import TileDelta, without_delta
from lorax_kernels.prefill_gemm_kernels import prefill_gemm_kernel, prefill_silu_kernel
from lorax_kernels.sizes import cdiv
from lorax_kernels.tuning import prefill_config
from lorax_kernels.worklist import LoraWork

LEAST_ROWS = 256
"""With fewer rows there are too few tiles for the device; no table is asked."""
_INTERPRETER_SMS = 3
_TYPES = (torch.bfloat16, torch.float16)


def chosen(x: torch.Tensor, weight: torch.Tensor, silu: bool = False) -> PrefillConfig | None:
    """How x [T, in] is multiplied by weight [out, in], with SiLU and multiplication after it if `silu`; None: by the
    library."""
    if x.dim() != 2 or x.shape[0] < LEAST_ROWS or x.dtype not in _TYPES:
        return None
    config = prefill_config(x.shape[0], weight.shape[0], weight.shape[1], x.device.index, silu)
    return config if config.kernel == "triton" and _fits(x, weight, silu) else None


def chosen_with_delta(
    x: torch.Tensor, weight: torch.Tensor, work: LoraWork, out_slices: tuple[int, ...], silu: bool = False
) -> PrefillConfig | None:
    """How x [T, in] is multiplied by a site's weight [out, in], with the adapters' deltas of `work` and with SiLU and
    multiplication after it if `silu`; None: the deltas, and SiLU, are to be launches of their own."""
    if x.dim() != 2 or work.shape.decode or x.dtype not in _TYPES or not _fits(x, weight, silu):
        return None
    config = prefill_config(x.shape[0], weight.shape[0], weight.shape[1], x.device.index, silu, delta=True)
    if not config.delta or work.most_groups > config.most_groups or (silu and len(out_slices) != 2):
        return None
    return config


def prefill_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: PrefillConfig,
    delta: TileDelta | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias for any number of rows, whatever `config.kernel` says.

    Args:
        x: [T, in], rows contiguous and a multiple of 16 bytes apart; bfloat16 or float16 (the interpreter also takes
            float32).
        weight: [out, in], contiguous, of the same type, `in` and `out` multiples of 8.
        bias: [out] or None.
        delta: added before the one rounding; the rows of a tile must divide `TILE_ROWS`, and its parts be 2 or 4.

    Returns:
        [T, out], of x's type.

    Raises:
        ValueError: the tensors are not as above.
    """
    if not _fits(x, weight):
        raise ValueError(f"prefill_linear: x {_seen(x)} and weight {_seen(weight)}")
    if delta is not None:
        delta.check(x, weight, config, silu=False)
    (tokens, width), columns = x.shape, weight.shape[0]
    out = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    given = (
        TensorDescriptor(x, list(x.shape), list(x.stride()), [block_m, block_k]),
        TensorDescriptor(weight, [columns, width], [width, 1], [block_n, block_k]),
        TensorDescriptor(out, [tokens, columns], [columns, 1], [block_m, block_n // config.parts]),
    )
    added, constants = (delta.arguments, delta.constants(False)) if delta else without_delta(x, False)
    tiles = cdiv(tokens, block_m) * cdiv(columns, block_n)
    prefill_gemm_kernel[(_programs(tiles, config, x),)](
        *given, bias if bias is not None else x, tokens, columns, *added, K=width, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=block_k, GROUP=config.group, PARTS=config.parts, FLATTEN=config.flatten, HAS_BIAS=bias is not None,
        **constants, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def prefill_linear_silu(
    x: torch.Tensor, weight: torch.Tensor, config: PrefillConfig, delta: TileDelta | None = None
) -> torch.Tensor:
    """`silu_mul` of x @ weight.T for any number of rows, whatever `config.kernel` says: the same numbers as
    `prefill_linear` and `fused_triton.silu_mul` one after the other.

    Args:
        x: as for `prefill_linear`.
        weight: [2 * inner, in], gate in the upper half; `inner` a multiple of 8.
        delta: added to gate and up before each is rounded; the rows of a tile must divide `TILE_ROWS`.

    Returns:
        [T, inner], of x's type.

    Raises:
        ValueError: the tensors are not as above.
    """
    if not _fits(x, weight, True):
        raise ValueError(f"prefill_linear_silu: x {_seen(x)} and weight {_seen(weight)}")
    if delta is not None:
        delta.check(x, weight, config, silu=True)
    (tokens, width), columns = x.shape, weight.shape[0] // 2
    out = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    given = (
        TensorDescriptor(x, list(x.shape), list(x.stride()), [block_m, block_k]),
        TensorDescriptor(weight, [2, columns, width], [columns * width, width, 1], [2, block_n, block_k]),
        TensorDescriptor(out, [tokens, columns], [columns, 1], [block_m, block_n // config.parts]),
    )  # fmt: skip
    added, constants = (delta.arguments, delta.constants(True)) if delta else without_delta(x, True)
    tiles = cdiv(tokens, block_m) * cdiv(columns, block_n)
    prefill_silu_kernel[(_programs(tiles, config, x),)](
        *given, tokens, columns, *added, K=width, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        GROUP=config.group, PARTS=config.parts, FLATTEN=config.flatten, **constants, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return out


def linear_silu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """`prefill_linear_silu` where the table says so; None where product and `silu_mul` are to be two."""
    config = chosen(x, weight, silu=True)
    return None if config is None else prefill_linear_silu(x, weight, config)


def _programs(tiles: int, config: PrefillConfig, x: torch.Tensor) -> int:
    return min(tiles, config.programs * _num_sms(x.device.index)) if config.programs else tiles


@functools.cache
def _num_sms(index: int | None) -> int:
    if index is None:
        return _INTERPRETER_SMS
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _fits(x: torch.Tensor, weight: torch.Tensor, silu: bool = False) -> bool:
    return (
        x.dim() == 2
        and x.shape[0] > 0
        and x.shape[1] == weight.shape[1]
        and x.stride(1) == 1
        and weight.is_contiguous()
        and x.dtype == weight.dtype
        and (x.dtype in _TYPES or not x.is_cuda)
        and weight.shape[1] % 8 == x.stride(0) % 8 == 0
        and weight.shape[0] % (16 if silu else 8) == 0
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


def _seen(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} of strides {tensor.stride()}"
