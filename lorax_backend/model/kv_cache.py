"""KvCache: the tensors of the paged key/value cache. Which block belongs to whom is the BlockManager's business."""

from __future__ import annotations

import math

import numpy as np
import torch

from lorax_backend.model.config import ModelConfig


class KvCache:
    """Keys and values of all layers, in blocks of `block_size` tokens.

    `data` is [layers, 2, num_blocks, block_size, kv_heads, head_dim]; `keys[i]` and `values[i]` are the views of layer
    i, [num_blocks, block_size, kv_heads, head_dim]. It starts as zeros: what lies beyond a sequence's end is multiplied
    by zero weights in attention, which would not hide a NaN.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.data = _zeros(shape, dtype, device)
        self.keys = [layer[0] for layer in self.data]
        self.values = [layer[1] for layer in self.data]

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zero pages, which take memory and time only when first written; torch fills them all.
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes one block takes over all layers."""
    return 2 * config.num_layers * block_size * config.kv_size * dtype.itemsize
