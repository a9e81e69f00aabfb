"""The nodes after a layer's sites, for measuring expand that is left to them, and what they must give in float64."""

from __future__ import annotations

import torch

from lorax_kernels.expand_nodes import Delta, rms_norm_expand, rope_and_cache_expand, silu_mul_expand
from lorax_kernels.fused_triton import rms_norm, rope_and_cache, silu_mul

NODES = {"qkv": "rope", "o": "norm", "gate_up": "silu", "down": "norm"}
"""What reads the output of each site: rotary embedding and the cache's writing, SiLU, or the norm with residual."""
FUSE_CHOICES = [
    {"fuse_block_n": n, "fuse_warps": w, "fuse_waves": v}
    for n, w, v in (
        (128, 4, 4), (64, 2, 8), (64, 4, 8), (128, 2, 8), (128, 4, 8), (128, 8, 4), (256, 4, 4), (256, 8, 2),
    )
]  # fmt: skip
FUSE_MODE_CHOICES = [
    {"pdl": p, "overlap": o} for p in (False, True) for o in ("none", "product_first", "shrink_first")
]
_HEADS = 32
_CACHE_BLOCK = 16
_POSITIONS = 4096
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
        if kind == "rope":
            dim = out_slices[0] // _HEADS
            self._heads = _HEADS, out_slices[1] // dim
            angles = torch.outer(torch.arange(_POSITIONS, device=device), torch.rand(dim // 2, device=device))
            cos, sin = angles.cos(), angles.sin()
            positions = torch.randint(0, _POSITIONS, (tokens,), device=device, generator=generator)
            self._rope = positions, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
            shape = -(-tokens // _CACHE_BLOCK), _CACHE_BLOCK, self._heads[1], dim
            keys, values = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
            self._cache = keys, values
            self._slots = torch.randperm(keys.shape[0] * _CACHE_BLOCK, device=device)[:tokens]

    def __call__(self, base: torch.Tensor, delta: Delta | None = None) -> tuple[torch.Tensor, ...]:
        """What the node returns for the base layer's output [T, out]."""
        if self.kind == "silu":
            return (silu_mul(base) if delta is None else silu_mul_expand(base, delta),)
        if self.kind == "norm":
            if delta is None:
                return rms_norm(base, self._weight, _EPS, self._residual)
            return rms_norm_expand(base, (self._weight, _EPS), self._residual, delta)
        arguments = base, self._heads, self._rope, self._cache, self._slots
        return (rope_and_cache(*arguments) if delta is None else rope_and_cache_expand(*arguments, delta),)

    def results(self, base: torch.Tensor, delta: Delta) -> list[torch.Tensor]:
        """All that it writes, [T, columns] each."""
        if self.kind != "rope":
            return list(self(base, delta))
        for cache in self._cache:
            cache.fill_(float("nan"))
        (q,) = self(base, delta)
        stored = [cache.flatten(0, 1)[self._slots].flatten(1) for cache in self._cache]
        return [q.flatten(1), *stored]

    def expected(self, rows: torch.Tensor, base: torch.Tensor) -> list[torch.Tensor]:
        """The same of some of its rows, whose `base` with the delta is given in float64."""
        if self.kind == "silu":
            gate, up = base.chunk(2, 1)
            return [torch.nn.functional.silu(gate) * up]
        if self.kind == "norm":
            total = base + self._residual[rows].double()
            scale = (total.square().mean(1, keepdim=True) + _EPS).rsqrt()
            return [total * scale * self._weight.double(), total]
        positions, cos, sin = self._rope
        heads, kv_heads = self._heads
        wide_cos, wide_sin = (table[positions[rows]].double()[:, None] for table in (cos, sin))
        parts = base.view(len(base), heads + 2 * kv_heads, -1)
        q, k, v = parts.split((heads, kv_heads, kv_heads), dim=1)
        turned = [x * wide_cos + x.roll(x.shape[-1] // 2, -1) * wide_sin for x in (q, k)]
        return [x.flatten(1) for x in (*turned, v)]
