"""The small kernels between the matrix products, fused so that a decode step has few launches.

Each rounds where its torch twin in `fused_reference` rounds, so that both give the same numbers up to the order
of sums. With `NodeConfig.pdl` each may be launched before the launch before it is over (programmatic dependent launch):
it reads what no kernel of the step writes, waits, and then reads the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorax_kernels.configs import launch_options
from lorax_kernels.sizes import cdiv, next_power_of_2
from lorax_kernels.tuning import node_config


@triton.jit
def store_normed(x, weight, y_ptr, row, column, seen, eps, WIDTH: tl.constexpr):
    """RMS norm of one row, `x` and `weight` [columns], to its place in y."""
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    y = weight.to(tl.float32) * (wide * scale).to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + column, y.to(x.dtype), mask=seen)


@triton.jit
def sum_of_planes(planes_ptr, row, column, seen, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """Columns of one row of planes [PLANES, rows, WIDTH], summed in their order, in float32. The first axis of the grid
    must be the rows."""
    rows = tl.num_programs(0).to(tl.int64)
    total = tl.zeros(column.shape, dtype=tl.float32)
    for plane in tl.static_range(PLANES):
        total += tl.load(planes_ptr + (plane * rows + row) * WIDTH + column, mask=seen, other=0.0)
    return total


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, stride_x, stride_residual, eps, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    seen = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=seen, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * stride_x + column, mask=seen, other=0.0)
    if HAS_RESIDUAL:
        if PLANES > 0:
            residual = sum_of_planes(residual_ptr, row, column, seen, WIDTH, PLANES).to(x.dtype)
        else:
            residual = tl.load(residual_ptr + row * stride_residual + column, mask=seen, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * WIDTH + column, x, mask=seen)
    store_normed(x, weight, y_ptr, row, column, seen, eps, WIDTH)


@triton.jit
def silu_mul_block(gate, up):
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    return (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _silu_mul_kernel(x_ptr, y_ptr, stride_x, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < WIDTH
    gate = tl.load(x_ptr + row * stride_x + column, mask=seen, other=0.0)
    up = tl.load(x_ptr + row * stride_x + WIDTH + column, mask=seen, other=0.0)
    tl.store(y_ptr + row * WIDTH + column, silu_mul_block(gate, up), mask=seen)


@triton.jit
def _normed(first, second, weight_ptr, d, half_seen, eps, D: tl.constexpr):
    """Both halves of every head, RMS-normed over the whole head."""
    dtype = first.dtype
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    squares = tl.sum(wide_first * wide_first, axis=1) + tl.sum(wide_second * wide_second, axis=1)
    scale = tl.rsqrt(squares / D + eps)[:, None]
    weight_first = tl.load(weight_ptr + d, mask=half_seen, other=0.0).to(tl.float32)[None, :]
    weight_second = tl.load(weight_ptr + D // 2 + d, mask=half_seen, other=0.0).to(tl.float32)[None, :]
    first = (weight_first * (wide_first * scale).to(dtype).to(tl.float32)).to(dtype)
    second = (weight_second * (wide_second * scale).to(dtype).to(tl.float32)).to(dtype)
    return first, second


@triton.jit
def rope_tables(
    positions_ptr, cos_ptr, sin_ptr, slots_ptr, row, d, stride_table, D: tl.constexpr
):  # fmt: skip
    """A row's cosines and sines for the halves of a head, and its slot in the cache."""
    half_seen = d < D // 2
    table = tl.load(positions_ptr + row).to(tl.int64) * stride_table + d
    slot = tl.load(slots_ptr + row)
    cos = tl.load(cos_ptr + table, mask=half_seen, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table + D // 2, mask=half_seen, other=0.0).to(tl.float32)[None, :]
    return cos, sin, slot


@triton.jit
def rope_and_store(
    plain_first, plain_second, row, head, d, cos, sin, slot, q_norm_ptr, k_norm_ptr, q_out_ptr, k_cache_ptr,
    v_cache_ptr, eps, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr,
):  # fmt: skip
    """Turn both halves of some heads of q, k and v; store queries, and keys and values in the cache."""
    half_seen = d < D // 2
    seen = (head < HEADS + 2 * KV_HEADS)[:, None] & half_seen[None, :]
    first, second = plain_first, plain_second
    is_q = (head < HEADS)[:, None]
    is_k = ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None]
    is_v = (head >= HEADS + KV_HEADS)[:, None]
    if QK_NORM:
        q_first, q_second = _normed(plain_first, plain_second, q_norm_ptr, d, half_seen, eps, D)
        k_first, k_second = _normed(plain_first, plain_second, k_norm_ptr, d, half_seen, eps, D)
        first = tl.where(is_q, q_first, k_first)
        second = tl.where(is_q, q_second, k_second)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    turned_first = (wide_first * cos - wide_second * sin).to(plain_first.dtype)
    turned_second = (wide_second * cos + wide_first * sin).to(plain_first.dtype)
    q_out = q_out_ptr + row * HEADS * D + head[:, None] * D + d[None, :]
    tl.store(q_out, turned_first, mask=seen & is_q)
    tl.store(q_out + D // 2, turned_second, mask=seen & is_q)
    stored = seen & (slot >= 0)
    k_out = k_cache_ptr + (slot * KV_HEADS + head - HEADS)[:, None] * D + d[None, :]
    tl.store(k_out, turned_first, mask=stored & is_k)
    tl.store(k_out + D // 2, turned_second, mask=stored & is_k)
    v_out = v_cache_ptr + (slot * KV_HEADS + head - HEADS - KV_HEADS)[:, None] * D + d[None, :]
    tl.store(v_out, plain_first, mask=stored & is_v)
    tl.store(v_out + D // 2, plain_second, mask=stored & is_v)


@triton.jit
def _rope_cache_kernel(
    qkv_ptr, positions_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr,
    stride_qkv, stride_table, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    QK_NORM: tl.constexpr, PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)  # over half a head
    seen = (head < HEADS + 2 * KV_HEADS)[:, None] & (d < D // 2)[None, :]
    cos, sin, slot = rope_tables(positions_ptr, cos_ptr, sin_ptr, slots_ptr, row, d, stride_table, D)
    if PDL:
        tl.extra.cuda.gdc_wait()
    where = head[:, None] * D + d[None, :]
    if PLANES > 0:
        first = sum_of_planes(qkv_ptr, row, where, seen, (HEADS + 2 * KV_HEADS) * D, PLANES)
        second = sum_of_planes(qkv_ptr, row, where + D // 2, seen, (HEADS + 2 * KV_HEADS) * D, PLANES)
        first = first.to(q_out_ptr.dtype.element_ty)
        second = second.to(q_out_ptr.dtype.element_ty)
    else:
        first = tl.load(qkv_ptr + row * stride_qkv + where, mask=seen, other=0.0)
        second = tl.load(qkv_ptr + row * stride_qkv + where + D // 2, mask=seen, other=0.0)
    rope_and_store(
        first, second, row, head, d, cos, sin, slot, q_norm_ptr, k_norm_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, eps,
        HEADS, KV_HEADS, D, QK_NORM,
    )  # fmt: skip


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lorax_kernels.rms_norm` on a device."""
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if residual is not None else x
    block, warps = norm_shape(width)
    planes = num_planes(residual)
    if planes:
        warps = min(16, 2 * warps)
    pdl = node_config(x.device.index).pdl
    _rms_norm_kernel[(rows,)](
        x, residual if residual is not None else x, weight, y, total, x.stride(0),
        residual.stride(0) if residual is not None else 0, eps, WIDTH=width, BLOCK=block,
        HAS_RESIDUAL=residual is not None, PLANES=planes, PDL=pdl, num_warps=warps, **launch_options(pdl),
    )  # fmt: skip
    return y, total


def num_planes(given: torch.Tensor | None) -> int:
    """How many planes are to be summed, 0 if it is no stack of planes.

    Raises:
        ValueError: they are planes, but not contiguous in float32.
    """
    if given is None or given.dim() == 2:
        return 0
    if not given.is_contiguous() or given.dtype != torch.float32:
        raise ValueError(f"planes {tuple(given.shape)} {given.dtype} are not float32, contiguous")
    return given.shape[0]


def norm_shape(width: int) -> tuple[int, int]:
    """Columns and warps of a program that norms a row of `width`."""
    block = next_power_of_2(width)
    return block, max(1, min(16, block // 512))


def silu_block(width: int) -> int:
    """Columns of a program of SiLU and multiplication, which has 4 warps."""
    return min(1024, next_power_of_2(width))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`lorax_kernels.silu_mul` on a device."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block, pdl = silu_block(width), node_config(gate_up.device.index).pdl
    _silu_mul_kernel[(rows, cdiv(width, block))](
        gate_up, y, gate_up.stride(0), WIDTH=width, BLOCK=block, PDL=pdl, num_warps=4, **launch_options(pdl)
    )
    return y


def rope_and_cache(
    qkv: torch.Tensor,
    heads: tuple[int, int],
    rope: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """`lorax_kernels.rope_and_cache` on a device."""
    positions, cos, sin = rope
    k_cache, v_cache = cache
    dim = k_cache.shape[3]
    rows, planes = qkv.shape[-2], num_planes(qkv)
    q = torch.empty(rows, heads[0], dim, dtype=k_cache.dtype if planes else qkv.dtype, device=qkv.device)
    block_h, pdl = 8, node_config(qkv.device.index).pdl
    _rope_cache_kernel[(rows, cdiv(heads[0] + 2 * heads[1], block_h))](
        qkv, positions, cos, sin, norms[0] if norms else qkv, norms[1] if norms else qkv, slot_mapping, q,
        k_cache, v_cache, qkv.stride(-2), cos.stride(0), eps,
        HEADS=heads[0], KV_HEADS=heads[1], D=dim, BLOCK_D=next_power_of_2(dim // 2), BLOCK_H=block_h,
        QK_NORM=norms is not None, PLANES=planes, PDL=pdl, num_warps=2, **launch_options(pdl),
    )  # fmt: skip
    return q
