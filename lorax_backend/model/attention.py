"""Attention of one layer over the paged cache. The kernels choose Triton or torch by device."""

from __future__ import annotations

import torch

from lorax_kernels import paged_attention, write_kv
from lorax_kernels.metadata import AttentionBatch


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Store the step's keys and values, then attend causally to everything cached.

    Args:
        q: [T, heads, head_dim]; k and v: [T, kv_heads, head_dim].
        key_cache: [num_blocks, block_size, kv_heads, head_dim]; value_cache likewise.
        sliding_window: tokens each token sees, itself included; None for all.

    Returns:
        [T, heads * head_dim].
    """
    write_kv(k, v, key_cache, value_cache, batch.slot_mapping)
    out = paged_attention(q, key_cache, value_cache, batch, scale, sliding_window)
    return out.reshape(out.shape[0], -1)
