"""The public functions: Triton kernels for CUDA tensors, torch twins otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lorax_kernels import attention_reference, fused_reference, reference
from lorax_kernels.metadata import AttentionBatch, LoraBatch

if TYPE_CHECKING:
    from lorax_kernels.expand_nodes import Delta


def _uses_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in] times `weight` [out, in], plus `bias` [out] if there is one -> [T, out]. Few rows on a device may be
    computed by a kernel of this package (`skinny_gemm`)."""
    if _uses_triton(x):
        from lorax_kernels import skinny_gemm

        return skinny_gemm.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def begin_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` for a caller that gives the result to `rms_norm` as the residual or to `rope_and_cache`, and to nothing
    else: on a device it may be planes, as said there."""
    if _uses_triton(x):
        from lorax_kernels import skinny_gemm

        return skinny_gemm.begin_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_silu_mul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`silu_mul` of `linear`: x [T, in] times `weight` [2 * width, in], gate in the upper half -> [T, width]. Few or
    many rows on a device may be computed by one kernel (`skinny_gemm`, `prefill_gemm`)."""
    if _uses_triton(x):
        from lorax_kernels import prefill_gemm, skinny_gemm

        whole = prefill_gemm.linear_silu(x, weight) if bias is None else None
        if whole is None:
            whole = skinny_gemm.linear_silu(x, weight, bias)
        if whole is not None:
            return whole
    return silu_mul(linear(x, weight, bias))


def add_lora(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    batch: LoraBatch,
    out: torch.Tensor,
    out_slices: tuple[int, ...],
) -> None:
    """Add the LoRA delta of one site to `out` in place; rows without an adapter are not touched.

    Args:
        x: [T, in], input of the site.
        a: [P, S, 8, in], A of every page: `PageLayout.a_view`. Keep the view; remaking it a step costs time.
        b: [P, 8, out], B of every page: `PageLayout.b_view`.
        batch: the rows with adapters.
        out: [T, out], the base layer's output.
        out_slices: widths of the S fused layers, summing to `out`.
    """
    if _uses_triton(x):
        from lorax_kernels import lora_triton

        lora_triton.add_lora(x, a, b, batch, out, out_slices)
    else:
        reference.add_lora(x, a, b, batch, out, out_slices)


def lora_linear(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor | None],
    weights: tuple[torch.Tensor, torch.Tensor],
    batch: LoraBatch,
    out_slices: tuple[int, ...],
) -> torch.Tensor:
    """A base layer with the adapters' deltas: the sum of `linear(x, *layer)` and what `add_lora` adds.

    Args:
        x: [T, in].
        layer: the base layer's weight [out, in] and bias [out] or None.
        weights: the site's A [P, S, 8, in] and B [P, 8, out].
        batch: the rows with adapters.
        out_slices: widths of the S fused layers, summing to `out`.

    Returns:
        [T, out].
    """
    if _uses_triton(x):
        from lorax_kernels import lora_triton

        return lora_triton.linear(x, layer, weights, batch, out_slices)
    out = F.linear(x, *layer)
    reference.add_lora(x, *weights, batch, out, out_slices)
    return out


def begin_lora_linear(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor | None],
    weights: tuple[torch.Tensor, torch.Tensor],
    batch: LoraBatch,
    out_slices: tuple[int, ...],
) -> tuple[torch.Tensor, Delta | None]:
    """`lora_linear` for a caller that gives the result to `rms_norm`, if it has one slice, with two to `silu_mul`, with
    three to `rope_and_cache`, and to nothing else: these may add the deltas on the way. For the first and the last it
    may be planes, as in `begin_linear`.

    Returns:
        [T, out], and the deltas that it lacks, to be given along with it; None if it lacks none.
    """
    if _uses_triton(x):
        from lorax_kernels import expand_nodes

        return expand_nodes.begin_linear(x, layer, weights, batch, out_slices)
    return lora_linear(x, layer, weights, batch, out_slices), None


def lora_linear_silu_mul(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor | None],
    weights: tuple[torch.Tensor, torch.Tensor],
    batch: LoraBatch,
    out_slices: tuple[int, ...],
) -> torch.Tensor:
    """`silu_mul` of `lora_linear`, in as few launches as there may be: x [T, in] -> [T, out / 2]."""
    if _uses_triton(x):
        from lorax_kernels import expand_nodes

        return expand_nodes.linear_silu(x, layer, weights, batch, out_slices)
    return silu_mul(lora_linear(x, layer, weights, batch, out_slices))


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Store k, v [T, Hkv, D] in the caches [N, block_size, Hkv, D] at `slot_mapping` int64 [T]; -1 stores nothing."""
    if _uses_triton(k):
        from lorax_kernels import attention_triton

        attention_triton.write_kv(k, v, k_cache, v_cache, slot_mapping)
    else:
        attention_reference.write_kv(k, v, k_cache, v_cache, slot_mapping)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal attention over the paged cache: q [T, Hq, D] -> [T, Hq, D]; see `attention_reference.paged_attention`.

    Decodes and prefill chunks over a cached prefix may be mixed. Keys and values of the step are written before.
    """
    if _uses_triton(q):
        from lorax_kernels import attention_triton

        return attention_triton.paged_attention(q, k_cache, v_cache, batch, scale, sliding_window)
    return attention_reference.paged_attention(q, k_cache, v_cache, batch, scale, sliding_window)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    delta: Delta | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of x [T, width], or of x + residual; see `fused_reference.rms_norm`. `delta` is what
    `begin_lora_linear` gave along with the residual. On a device the residual may be planes [P, T, width] in float32,
    whose sum, rounded to x's type, is meant."""
    if _uses_triton(x):
        from lorax_kernels import expand_nodes, fused_triton

        if delta is not None and residual is not None:
            return expand_nodes.rms_norm_expand(residual, (weight, eps), x, delta)
        return fused_triton.rms_norm(x, weight, eps, residual)
    return fused_reference.rms_norm(x, weight, eps, residual)


def silu_mul(gate_up: torch.Tensor, delta: Delta | None = None) -> torch.Tensor:
    """silu(gate) * up for `gate_up` [T, 2 * width] with gate in the left half -> [T, width]. `delta` is what
    `begin_lora_linear` gave along with it."""
    if _uses_triton(gate_up):
        from lorax_kernels import expand_nodes, fused_triton

        if delta is not None:
            return expand_nodes.silu_mul_expand(gate_up, delta)
        return fused_triton.silu_mul(gate_up)
    return fused_reference.silu_mul(gate_up)


def rope_and_cache(
    qkv: torch.Tensor,
    heads: tuple[int, int],
    rope: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
    delta: Delta | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, store keys and values; see `fused_reference.rope_and_cache`. On a device qkv may be
    planes, as the residual of `rms_norm`. `delta` is what `begin_lora_linear` gave along with it."""
    if _uses_triton(qkv):
        from lorax_kernels import expand_nodes, fused_triton

        if delta is not None:
            return expand_nodes.rope_and_cache_expand(
                qkv, heads, rope, cache, slot_mapping, (norms, eps), delta
            )
        return fused_triton.rope_and_cache(qkv, heads, rope, cache, slot_mapping, norms, eps)
    return fused_reference.rope_and_cache(qkv, heads, rope, cache, slot_mapping, norms, eps)
