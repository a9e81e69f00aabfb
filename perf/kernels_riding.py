"""Sites together with the node that makes their input, for measuring shrink that rides in it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import linear

from lorax_kernels import AttentionBatch, LoraBatch, lora_triton, paged_attention, riding
from lorax_kernels.fused_triton import rms_norm, silu_mul
from lorax_kernels.tuning import LoraConfig

NODES = {"qkv": "norm", "o": "attention", "gate_up": "norm", "down": "silu"}
"""What makes the input of each site."""
_RIDE = ("ride_block_k", "ride_split_shift", "ride_target_log2", "ride_waves", "ride_stages", "ride_warps")
RIDE_CHOICES = [
    dict(zip(_RIDE, values, strict=True))
    for values in (
        (256, 4, 9, 2, 2, 0), (256, 3, 9, 3, 2, 0), (512, 3, 9, 2, 2, 4), (512, 4, 10, 4, 2, 4), (256, 4, 10, 4, 1, 4),
        (128, 5, 10, 4, 2, 4), (256, 5, 9, 3, 2, 8), (512, 3, 8, 1, 2, 8), (1024, 2, 9, 2, 1, 8),
    )
]  # fmt: skip
FLAT_EXPAND_CHOICES = [
    {"expand_flat": True, "block_n": n, "expand_warps": w, "expand_registers": g, "expand_waves": v}
    for n, w, g, v in (
        (32, 1, 0, 16), (64, 1, 0, 16), (64, 2, 0, 12), (128, 2, 0, 8), (128, 4, 0, 8), (256, 4, 128, 4),
        (256, 2, 128, 8),
    )
]  # fmt: skip
RIDE_MODE_CHOICES = [
    {"pdl": p, "overlap": o, "ride_attention": a}
    for p in (False, True)
    for o, a in (("none", False), ("product_first", False), ("none", True))
]
_HEADS, _KEY_HEADS = 32, 8
_CONTEXT, _BLOCK_SIZE = 256, 16
_EPS = 1e-5
_SCALE = 0.1


def _decodes(count: int) -> AttentionBatch:
    """Sequences that decode one token each."""
    blocks = np.arange(count * _CONTEXT // _BLOCK_SIZE, dtype=np.int32).reshape(count, -1)
    starts, contexts = np.arange(count + 1, dtype=np.int32), np.full(count, _CONTEXT, dtype=np.int32)
    return AttentionBatch.build(starts, contexts, blocks, np.full(count, -1, dtype=np.int64), "cuda")


class Node:
    """A norm with residual, SiLU and multiplication, or decode's attention over short contexts, of `tokens` rows that
    give `width` columns each."""

    def __init__(self, kind: str, tokens: int, width: int, generator: torch.Generator) -> None:
        self.kind = kind
        columns = width * (2 if kind == "silu" else 1)
        self._source = torch.randn(tokens, columns, device="cuda", generator=generator).bfloat16()
        self._residual = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16()
        weight = torch.rand(width, device="cuda", generator=generator) + 0.5
        self._norm = weight.bfloat16(), _EPS
        if kind == "attention":
            self._attention = _decodes(tokens)
            shape = tokens * _CONTEXT // _BLOCK_SIZE, _BLOCK_SIZE, _KEY_HEADS, width // _HEADS
            self._caches = tuple(torch.randn(*shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def rides(self, config: LoraConfig) -> bool:
        """True if shrink is to ride in this node."""
        return config.shrink == "fused" and (self.kind != "attention" or config.ride_attention)

    def plain(self) -> torch.Tensor:
        """The site's input."""
        if self.kind == "attention":
            q = self._source.view(len(self._source), _HEADS, -1)
            return paged_attention(q, *self._caches, self._attention, _SCALE).flatten(1)
        if self.kind == "silu":
            return silu_mul(self._source)
        return rms_norm(self._source, *self._norm, self._residual)[0]

    def with_shrink(
        self, a: torch.Tensor, batch: LoraBatch, config: LoraConfig
    ) -> tuple[torch.Tensor, lora_triton.Shrunk | None]:
        """The site's input, and its product with A."""
        if self.kind == "attention":
            q = self._source.view(len(self._source), _HEADS, -1)
            x, h = riding.paged_attention_shrink(
                q, self._caches, self._attention, _SCALE, None, a, batch, config
            )
            return x.flatten(1), h
        if self.kind == "silu":
            return riding.silu_mul_shrink(self._source, a, batch, config)
        y, _, h = riding.rms_norm_shrink(self._source, self._norm, self._residual, a, batch, config)
        return y, h

    def base_call(self, product: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The node and the base layer."""
        return lambda: linear(self.plain(), product)

    def lora_call(
        self,
        product: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        batch: LoraBatch,
        out_slices: tuple[int, ...],
        config: LoraConfig,
    ) -> Callable[[], torch.Tensor]:
        """The same with LoRA."""

        def call() -> torch.Tensor:
            x, h = self.with_shrink(weights[0], batch, config)
            return lora_triton.linear(x, (product, None), weights, batch, out_slices, config, h)

        return call
