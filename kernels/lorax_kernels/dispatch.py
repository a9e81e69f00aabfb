"""The public functions: Triton kernels for CUDA tensors, torch twins otherwise."""

from __future__ import annotations

import torch

from lorax_kernels import attention_reference, reference
from lorax_kernels.metadata import AttentionBatch, LoraBatch


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
    if x.is_cuda:
        from lorax_kernels import lora_triton

        lora_triton.add_lora(x, a, b, batch, out, out_slices)
    else:
        reference.add_lora(x, a, b, batch, out, out_slices)


def bgmv_shrink(x: torch.Tensor, a: torch.Tensor, batch: LoraBatch) -> torch.Tensor:
    """x [T, in] times A of each row's adapter: [R, max_pages, S, 8], row i for token row `batch.rows[i]`."""
    return reference.bgmv_shrink(x, a, batch)


def bgmv_expand(
    h: torch.Tensor, b: torch.Tensor, batch: LoraBatch, out: torch.Tensor, out_slices: tuple[int, ...]
) -> None:
    """Add h [R, max_pages, S, 8] times B of each row's adapter to the rows of out [T, out]."""
    reference.bgmv_expand(h, b, batch, out, out_slices)


def sgmv_shrink(x: torch.Tensor, a: torch.Tensor, batch: LoraBatch) -> torch.Tensor:
    """Like `bgmv_shrink`, for batches with many rows an adapter."""
    return reference.sgmv_shrink(x, a, batch)


def sgmv_expand(
    h: torch.Tensor, b: torch.Tensor, batch: LoraBatch, out: torch.Tensor, out_slices: tuple[int, ...]
) -> None:
    """Like `bgmv_expand`, for batches with many rows an adapter."""
    reference.sgmv_expand(h, b, batch, out, out_slices)


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Store k, v [T, Hkv, D] in the caches [N, block_size, Hkv, D] at `slot_mapping` int64 [T]; -1 stores nothing."""
    if k.is_cuda:
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
    if q.is_cuda:
        from lorax_kernels import attention_triton

        return attention_triton.paged_attention(q, k_cache, v_cache, batch, scale, sliding_window)
    return attention_reference.paged_attention(q, k_cache, v_cache, batch, scale, sliding_window)
