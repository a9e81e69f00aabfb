"""HeadLayout: the facts about a model that decide who may compute its attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """What of a model matters to its attention. `windows` are the sliding windows that its layers have, None for a
    layer that sees everything."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device
    block_size: int = 16
