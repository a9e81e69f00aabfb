"""Torch twins of the fused small kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorax_kernels.attention_reference import write_kv


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm (Zhang and Sennrich, 2019) of x [T, width], or of x + residual, in float32.

    Returns:
        The normed rows and their input: x, or x + residual rounded to the dtype of x.
    """
    total = x if residual is None else x + residual
    return _norm(total, weight, eps), total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for `gate_up` [T, 2 * width] with gate in the left half -> [T, width]."""
    width = gate_up.shape[-1] // 2
    return F.silu(gate_up[:, :width]).mul_(gate_up[:, width:])


def rope_and_cache(
    qkv: torch.Tensor,
    heads: tuple[int, int],
    rope: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Rotate queries and keys, store keys and values, return the queries.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], queries, keys and values of every row.
        heads: Hq and Hkv.
        rope: positions int [T]; cos [length, ..., D] doubled to (cos, cos), and sin to (-sin, sin), in float32.
        cache: keys and values of the layer, each [N, block_size, Hkv, D].
        slot_mapping: int64 [T], where a row's key and value go; -1 stores nothing.
        norms: RMS-norm weights [D] of queries and keys, applied to each head before it is rotated; or None.
        eps: of the norms.

    Returns:
        Queries [T, Hq, D].
    """
    num_heads, num_kv = heads
    positions, cos, sin = rope
    dim = cache[0].shape[3]
    parts = qkv.view(qkv.shape[0], num_heads + 2 * num_kv, dim)
    q, k, v = parts.split((num_heads, num_kv, num_kv), dim=1)
    if norms is not None:
        q, k = _norm(q, norms[0], eps), _norm(k, norms[1], eps)
    cos = cos.view(cos.shape[0], 1, dim).index_select(0, positions)
    sin = sin.view(sin.shape[0], 1, dim).index_select(0, positions)
    write_kv(_rotate(k, cos, sin), v, *cache, slot_mapping)
    return _rotate(q, cos, sin)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    wide = x.to(cos.dtype)
    return (wide * cos + torch.roll(wide, x.shape[-1] // 2, -1) * sin).to(x.dtype)
