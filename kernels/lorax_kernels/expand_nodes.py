"""Nodes after a base layer that add its LoRA deltas on the way: see `expand_node_kernels` for how.

`begin_linear` computes the base layer and, beside it, shrink; what it leaves to the node is a `Delta`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorax_kernels.configs import LoraConfig, launch_options
from lorax_kernels.expand_node_kernels import norm_expand_kernel, silu_expand_kernel
from lorax_kernels.fused_triton import num_planes, rope_and_cache, silu_mul
from lorax_kernels.lora_triton import Shrunk, expand, linear_and_shrink, linear_in_product, num_sms, work_of
from lorax_kernels.metadata import LoraBatch
from lorax_kernels.rope_expand_kernels import rope_expand_kernel
from lorax_kernels.sizes import cdiv, next_power_of_2
from lorax_kernels.tuning import lora_config
from lorax_kernels.worklist import DECODE_MAX_TOKENS, LoraWork


@dataclass(frozen=True, slots=True)
class Delta:
    """What adapters add to a base layer's output [T, out] and nobody has added yet: h B, with `b` [P, 8, out]."""

    h: Shrunk
    b: torch.Tensor
    work: LoraWork
    out_slices: tuple[int, ...]

    def add_to(self, out: torch.Tensor) -> None:
        """Add it in place, for a node that cannot."""
        expand(self.h, self.b, self.work, out, self.out_slices)


def begin_linear(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor | None],
    weights: tuple[torch.Tensor, torch.Tensor],
    batch: LoraBatch,
    out_slices: tuple[int, ...],
    config: LoraConfig | None = None,
) -> tuple[torch.Tensor, Delta | None]:
    """`lorax_kernels.begin_lora_linear` on a device: with one slice for `rms_norm`, with two for `silu_mul`, with three
    for `rope_and_cache`. What does not go to `silu_mul` may be planes, see there.

    The work lists of prefill are cut for other kernels, and beyond `DECODE_MAX_TOKENS` rows reading B for every row
    costs more than a launch.
    """
    work = work_of(batch)
    config = config or lora_config(work.num_tokens, work.shape.decode, x.device.index)
    whole = linear_in_product(x, layer, weights, work, out_slices, config)
    if whole is not None:
        return whole, None
    fuses = (config.fuse_norm, config.fuse_silu, config.fuse_rope)[len(out_slices) - 1]
    fuses = fuses and work.shape.decode and work.num_tokens <= DECODE_MAX_TOKENS
    out, h = linear_and_shrink(x, layer, weights[0], work, config, planes=fuses and len(out_slices) != 2)
    delta = Delta(h, weights[1], work, out_slices)
    if fuses:
        return out, delta
    delta.add_to(out)
    return out, None


def linear_silu(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor | None],
    weights: tuple[torch.Tensor, torch.Tensor],
    batch: LoraBatch,
    out_slices: tuple[int, ...],
    config: LoraConfig | None = None,
) -> torch.Tensor:
    """`lorax_kernels.lora_linear_silu_mul` on a device."""
    work = work_of(batch)
    config = config or lora_config(work.num_tokens, work.shape.decode, x.device.index)
    whole = linear_in_product(x, layer, weights, work, out_slices, config, silu=True)
    if whole is not None:
        return whole
    out, delta = begin_linear(x, layer, weights, batch, out_slices, config)
    return silu_mul(out) if delta is None else silu_mul_expand(out, delta)


def rms_norm_expand(
    x: torch.Tensor, norm: tuple[torch.Tensor, float], residual: torch.Tensor, delta: Delta
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lorax_kernels.rms_norm` of x [T, width] + delta and the residual [T, width], with `norm` = (weight, eps). x may
    be planes, as in `rms_norm`."""
    rows, width = residual.shape
    y, total = (torch.empty(rows, width, dtype=residual.dtype, device=x.device) for _ in range(2))
    block, at = next_power_of_2(width), delta.work.capacity
    pdl = delta.h.config.fuse_pdl
    norm_expand_kernel[(rows,)](
        x, residual, norm[0], y, total, delta.h.planes, delta.b, delta.work.data, x.stride(0), residual.stride(0),
        norm[1], delta.b.stride(0), delta.b.stride(1), at.tokens_at, at.pages_at, delta.h.planes.shape[1],
        delta.work.max_pages, WIDTH=width, BLOCK=block, **_splits(delta), PLANES=num_planes(x), PDL=pdl,
        num_warps=max(1, min(16, block // 256)), num_stages=1, **launch_options(pdl),
    )  # fmt: skip
    return y, total


def silu_mul_expand(gate_up: torch.Tensor, delta: Delta) -> torch.Tensor:
    """`lorax_kernels.silu_mul` of gate_up [T, 2 * width] + delta -> [T, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    config, work = delta.h.config, delta.work
    at = work.capacity
    row_n, block_n = (min(n, next_power_of_2(width)) for n in (config.fuse_row_n, config.fuse_block_n))
    blocks = at.blocks if work.fixed else work.num_blocks + work.num_bare
    tiles = blocks * cdiv(width, min(row_n, block_n))
    programs = min(num_sms(gate_up.device.index) * config.fuse_waves, tiles)
    silu_expand_kernel[(max(1, programs),)](
        gate_up, y, delta.h.planes, delta.b, work.data, gate_up.stride(0), delta.b.stride(0), delta.b.stride(1),
        at.blocks_at, at.rows_at, at.pages_at, delta.h.planes.shape[1], work.max_pages, WIDTH=width,
        BLOCK_M=work.shape.block_rows, ROW_N=row_n, BLOCK_N=block_n, **_splits(delta), PDL=config.fuse_pdl,
        num_warps=config.fuse_warps, num_stages=1, **launch_options(config.fuse_pdl, config.fuse_registers),
    )  # fmt: skip
    return y


def rope_and_cache_expand(
    qkv: torch.Tensor,
    heads: tuple[int, int],
    rope: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
    normed: tuple[tuple[torch.Tensor, torch.Tensor] | None, float],
    delta: Delta,
) -> torch.Tensor:
    """`lorax_kernels.rope_and_cache` of qkv + delta, with `normed` = (norms, eps). qkv may be planes, and stays without
    the delta. Heads whose size is no power of two cost expand as a launch of its own."""
    norms, eps = normed
    positions, cos, sin = rope
    k_cache, v_cache = cache
    rows, dim, at = qkv.shape[-2], k_cache.shape[3], delta.work.capacity
    if dim & (dim - 1):
        whole = qkv.sum(0).to(k_cache.dtype) if num_planes(qkv) else qkv.clone()
        delta.add_to(whole)
        return rope_and_cache(whole, heads, rope, cache, slot_mapping, norms, eps)
    q = torch.empty(rows, heads[0], dim, dtype=k_cache.dtype, device=qkv.device)
    config = delta.h.config
    pdl, block_h = config.fuse_pdl, config.fuse_rope_heads
    rope_expand_kernel[(rows, cdiv(heads[0], block_h) + 2 * cdiv(heads[1], block_h))](
        qkv, positions, cos, sin, norms[0] if norms else qkv, norms[1] if norms else qkv, slot_mapping, q, k_cache,
        v_cache, delta.h.planes, delta.b, delta.work.data, qkv.stride(-2), cos.stride(0), eps, delta.b.stride(0),
        delta.b.stride(1), at.tokens_at, at.pages_at, delta.h.planes.shape[1], delta.work.max_pages, HEADS=heads[0],
        KV_HEADS=heads[1], D=dim, BLOCK_H=block_h, QK_NORM=norms is not None, **_splits(delta),
        PLANES=num_planes(qkv), PDL=pdl, num_warps=max(1, min(16, block_h * dim // 256)), num_stages=1,
        **launch_options(pdl),
    )  # fmt: skip
    return q


def _splits(delta: Delta) -> dict[str, int]:
    return {"MAX_SHIFT": delta.h.splits[0], "TARGET_LOG2": delta.h.splits[1]}
