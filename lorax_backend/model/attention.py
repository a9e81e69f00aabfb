"""Attention of one layer over the paged cache. The kernels choose Triton or torch by device."""

from __future__ import annotations

import torch

from lorax_kernels import paged_attention, write_kv
from lorax_kernels.metadata import AttentionBatch


def attend(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Store the step's keys and values, then attend causally to everything cached.

    Args:
        qkv: queries [T, heads, head_dim], keys and values [T, kv_heads, head_dim].
        cache: keys and values of the layer, each [num_blocks, block_size, kv_heads, head_dim].
        sliding_window: tokens each token sees, itself included; None for all.

    Returns:
        [T, heads * head_dim].
    """
    (q, k, v), (key_cache, value_cache) = qkv, cache
    write_kv(k, v, key_cache, value_cache, batch.slot_mapping)
    out = paged_attention(q, key_cache, value_cache, batch, scale, sliding_window)
    return out.reshape(out.shape[0], -1)
