"""Sites together with the node that makes their input, for measuring shrink that rides in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from lorax_kernels import LoraBatch, lora_triton, riding
from lorax_kernels.fused_triton import rms_norm, silu_mul
from lorax_kernels.tuning import LoraConfig

NODES = {"qkv": "norm", "gate_up": "norm", "down": "silu"}
"""What makes the input of each site; that of `o` comes from attention, in which shrink does not ride."""
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
RIDE_MODE_CHOICES = [{"pdl": p, "overlap": o} for p in (False, True) for o in ("none", "product_first")]
_EPS = 1e-5


class Node:
    """A norm with residual, or SiLU and multiplication, of `tokens` rows that give `width` columns each."""

    def __init__(self, kind: str, tokens: int, width: int, generator: torch.Generator) -> None:
        self.kind = kind
        columns = width * (2 if kind == "silu" else 1)
        self._source = torch.randn(tokens, columns, device="cuda", generator=generator).bfloat16()
        self._residual = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16()
        weight = torch.rand(width, device="cuda", generator=generator) + 0.5
        self._norm = weight.bfloat16(), _EPS

    def plain(self) -> torch.Tensor:
        """The site's input."""
        if self.kind == "silu":
            return silu_mul(self._source)
        return rms_norm(self._source, *self._norm, self._residual)[0]

    def with_shrink(
        self, a: torch.Tensor, batch: LoraBatch, config: LoraConfig
    ) -> tuple[torch.Tensor, lora_triton.Shrunk | None]:
        """The site's input, and its product with A."""
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
