"""Random inputs of the fused rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class RopeCase:
    qkv: torch.Tensor
    heads: tuple[int, int]
    rope: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    cache_shape: tuple[int, int, int, int]
    slots: torch.Tensor
    norms: tuple[torch.Tensor, torch.Tensor] | None

    def run(self, function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and both caches after one call on zeroed caches."""
        return self.run_on(self.qkv, function)

    def run_on(
        self, qkv: torch.Tensor, function: Callable[..., torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`run`, with another qkv or planes of it."""
        kind = {"dtype": self.qkv.dtype, "device": self.qkv.device}
        caches = torch.zeros(self.cache_shape, **kind), torch.zeros(self.cache_shape, **kind)
        q = function(qkv, self.heads, self.rope, caches, self.slots, self.norms, 1e-6)
        return q, *caches

    def check_planes(self, function: Callable[..., torch.Tensor]) -> None:
        """Planes of qkv give what their sum gives, to the bit."""
        planes = torch.randn(4, *self.qkv.shape, device=self.qkv.device)
        whole = (((planes[0] + planes[1]) + planes[2]) + planes[3]).to(self.qkv.dtype)
        pairs = zip(self.run_on(planes, function), self.run_on(whole, function), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def make_rope_case(
    heads: tuple[int, int],
    dim: int,
    qk_norm: bool,
    tokens: int = 5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> RopeCase:
    """One row is padding, which stores nothing."""
    torch.manual_seed(dim)
    angles = torch.outer(torch.arange(50.0), torch.rand(dim // 2))
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
    slots = torch.randperm(8 * 4)[:tokens]
    slots[tokens // 2] = -1
    norms = (torch.rand(dim) + 0.5, torch.rand(dim) + 0.5) if qk_norm else None
    return RopeCase(
        qkv=torch.randn(tokens, (heads[0] + 2 * heads[1]) * dim).to(dtype).to(device),
        heads=heads,
        rope=(torch.randint(0, 50, (tokens,)).to(device), *(t.to(device) for t in tables)),
        cache_shape=(8, 4, heads[1], dim),
        slots=slots.to(device),
        norms=tuple(n.to(dtype).to(device) for n in norms) if norms else None,
    )
