"""A layer's sites as the decoder runs them, each with the node that reads its output: for measuring what adapters cost
there, and what both must give in float64.

The nodes are a part of it because they may do a part of the work: norms and the rotation sum what split products leave,
norms add deltas, and SiLU and multiplication may be done by the product, or add the deltas.
"""

from __future__ import annotations

import torch

from lorax_kernels import LoraBatch, linear_silu_mul, rms_norm, rope_and_cache
from lorax_kernels.configs import LoraConfig
from lorax_kernels.expand_nodes import begin_linear, linear_silu
from lorax_kernels.skinny_gemm import begin_linear as begin_base

NODES = {"o": "norm", "qkv": "rope", "gate_up": "silu", "down": "norm"}
"""What reads the output of each site."""
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
FUSE_ROPE_CHOICES = [{"fuse_rope": False}] + [
    {"fuse_rope": True, "fuse_rope_heads": n} for n in (4, 8, 16, 32)
]
LONG_CHOICES = [{"long_input": 0}] + [
    {"long_input": 8192, "long_block_k": k, "long_split_shift": s, "long_target_log2": t}
    for k, s, t in ((1024, 4, 10), (2048, 3, 9), (2048, 4, 10), (1024, 3, 9), (512, 4, 10))
]
_EPS = 1e-5
_BLOCK = 16


class Chain:
    """One site of `tokens` rows and its node, which is all that reads the site's output.

    Args:
        head_dim: of attention heads, for the rotation.
    """

    def __init__(
        self, name: str, tokens: int, out_slices: tuple[int, ...], head_dim: int, generator: torch.Generator
    ) -> None:
        self.kind, self.out_slices = NODES[name], out_slices
        device, width = generator.device, sum(out_slices)
        if self.kind == "norm":
            self._residual = torch.randn(tokens, width, device=device, generator=generator).bfloat16()
            weight = torch.rand(width, device=device, generator=generator) + 0.5
            self._weight = weight.bfloat16()
        if self.kind == "rope":
            self._heads = out_slices[0] // head_dim, out_slices[1] // head_dim
            shape = (-(-tokens // _BLOCK), _BLOCK, self._heads[1], head_dim)
            self._cache = tuple(torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
            self._slots = torch.arange(tokens, device=device)
            # At position 0 the rotation changes nothing, so that queries are what the site gives.
            ones, zeros = (f(1, 1, head_dim, device=device) for f in (torch.ones, torch.zeros))
            self._rope = torch.zeros(tokens, dtype=torch.int32, device=device), ones, zeros

    def base(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Without adapters: x [T, in] and the weight [out, in] to what the node gives."""
        if self.kind == "silu":
            return (linear_silu_mul(x, weight),)
        return self._node(begin_base(x, weight), None)

    def lora(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        batch: LoraBatch,
        config: LoraConfig,
    ) -> tuple[torch.Tensor, ...]:
        """With the adapters of `batch`, whose A and B are `weights`."""
        layer = (weight, None)
        if self.kind == "silu":
            return (linear_silu(x, layer, weights, batch, self.out_slices, config),)
        return self._node(*begin_linear(x, layer, weights, batch, self.out_slices, config))

    def _node(self, out: torch.Tensor, delta: object) -> tuple[torch.Tensor, ...]:
        if self.kind == "norm":
            return rms_norm(self._residual, self._weight, _EPS, out, delta)  # type: ignore[arg-type]
        queries = rope_and_cache(
            out,
            self._heads,
            self._rope,
            self._cache,
            self._slots,
            delta=delta,  # type: ignore[arg-type]
        )
        kv = (cache.view(-1, *cache.shape[2:])[: out.shape[-2]] for cache in self._cache)
        return queries, *kv

    def expected(self, rows: torch.Tensor, site: torch.Tensor) -> list[torch.Tensor]:
        """What some rows must be, of which the site's output in float64 is given."""
        if self.kind == "silu":
            gate, up = site.chunk(2, 1)
            return [torch.nn.functional.silu(gate) * up]
        if self.kind == "rope":
            parts = site.split(self.out_slices, 1)
            return [part.reshape(len(site), -1, self._cache[0].shape[-1]) for part in parts]
        total = site + self._residual[rows].double()
        scale = (total.square().mean(1, keepdim=True) + _EPS).rsqrt()
        return [self._weight.double() * total * scale, total]
