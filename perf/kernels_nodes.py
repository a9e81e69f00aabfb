"""The nodes after a layer's sites, for measuring expand that is left to them, and what they must give in float64."""

from __future__ import annotations

import torch

from lorax_kernels.expand_nodes import Delta, rms_norm_expand, silu_mul_expand
from lorax_kernels.fused_triton import rms_norm, silu_mul

NODES = {"o": "norm", "gate_up": "silu", "down": "norm"}
"""What reads the output of each site, where it can add the deltas: SiLU, or the norm with residual."""
_FUSE = ("fuse_row_n", "fuse_block_n", "fuse_warps", "fuse_waves", "fuse_registers")
FUSE_CHOICES = [
    dict(zip(_FUSE, values, strict=True))
    for values in (
        (512, 128, 4, 3, 0), (512, 128, 4, 4, 128), (256, 128, 4, 3, 0), (512, 64, 4, 3, 0), (512, 64, 4, 5, 96),
        (1024, 128, 4, 2, 0), (512, 256, 8, 1, 0), (1024, 128, 8, 2, 0), (512, 128, 8, 2, 0), (256, 64, 2, 6, 0),
        (512, 64, 2, 4, 0), (1024, 256, 8, 1, 0),
    )
]  # fmt: skip
FUSE_MODE_CHOICES = [
    {"pdl": p, "fuse_pdl": f, "overlap": o}
    for p in (False, True)
    for f in (False, True)
    for o in ("product_first", "shrink_first")
]
FUSE_WHERE_CHOICES = [
    {"fuse_norm": norm, "fuse_silu": silu} for norm in (False, True) for silu in (False, True)
]
_EPS = 1e-5


class Node:
    """One node of `tokens` rows after a site with these slices."""

    def __init__(
        self, kind: str, tokens: int, out_slices: tuple[int, ...], generator: torch.Generator
    ) -> None:
        self.kind = kind
        device, width = generator.device, sum(out_slices)
        if kind == "norm":
            self._residual = torch.randn(tokens, width, device=device, generator=generator).bfloat16()
            weight = torch.rand(width, device=device, generator=generator) + 0.5
            self._weight = weight.bfloat16()

    def __call__(self, base: torch.Tensor, delta: Delta | None = None) -> tuple[torch.Tensor, ...]:
        """What the node returns for the base layer's output [T, out]."""
        if self.kind == "silu":
            return (silu_mul(base) if delta is None else silu_mul_expand(base, delta),)
        if delta is None:
            return rms_norm(base, self._weight, _EPS, self._residual)
        return rms_norm_expand(base, (self._weight, _EPS), self._residual, delta)

    def expected(self, rows: torch.Tensor, base: torch.Tensor) -> list[torch.Tensor]:
        """The same of some of its rows, whose `base` with the delta is given in float64."""
        if self.kind == "silu":
            gate, up = base.chunk(2, 1)
            return [torch.nn.functional.silu(gate) * up]
        total = base + self._residual[rows].double()
        scale = (total.square().mean(1, keepdim=True) + _EPS).rsqrt()
        return [total * scale * self._weight.double(), total]
