"""Nodes after a base layer that add its LoRA deltas: random inputs, what they must give in float64, and their twin,
expand by itself and then the plain node."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from lora_cases import LoraCase, expected_delta, make_lora_case

from lorax_kernels import LoraBatch, fused_reference, fused_triton
from lorax_kernels.configs import LoraConfig
from lorax_kernels.expand_nodes import Delta, rms_norm_expand, rope_and_cache_expand, silu_mul_expand
from lorax_kernels.lora_triton import shrink, work_of

NODES = ("residual norm", "silu", "rope", "rope with norms")
EPS = 1e-5
CACHE_BLOCK = 4


@dataclass
class NodeCase:
    """A node that reads `lora.out`, the base layer's output, [T, sum of `lora.out_slices`]."""

    node: str
    lora: LoraCase
    heads: tuple[int, int]
    vectors: tuple[torch.Tensor, torch.Tensor]
    """The residual [T, width] and the norm's weight, or the weights of both norms of heads."""
    rope: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    slots: torch.Tensor

    def delta(self, batch: LoraBatch, config: LoraConfig) -> Delta:
        """What the adapters add, begun by shrink."""
        case, work = self.lora, work_of(batch)
        return Delta(shrink(case.x, case.a, work, config), case.b, work, case.out_slices)

    def run(
        self,
        base: torch.Tensor,
        delta: Delta | None,
        caches: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """All that the node writes, each [rows, columns]; the caches are NaN where it writes nothing."""
        if self.node == "silu":
            return (fused_triton.silu_mul(base) if delta is None else silu_mul_expand(base, delta),)
        if self.node == "residual norm":
            residual, weight = self.vectors
            if delta is None:
                return fused_triton.rms_norm(base, weight, EPS, residual)
            return rms_norm_expand(base, (weight, EPS), residual, delta)
        caches = caches or self.caches(base)
        arguments = base, self.heads, self.rope, caches, self.slots
        norms = self.vectors if self.node == "rope with norms" else None
        if delta is None:
            q = fused_triton.rope_and_cache(*arguments, norms, EPS)
        else:
            q = rope_and_cache_expand(*arguments, (norms, EPS), delta)
        return q.flatten(1), *(cache.flatten(2).flatten(0, 1) for cache in caches)

    def expected(self, base: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same of `base` in float64."""
        if self.node == "silu":
            return (fused_reference.silu_mul(base),)
        wide = tuple(vector.double() for vector in self.vectors)
        if self.node == "residual norm":
            return fused_reference.rms_norm(base, wide[1], EPS, wide[0])
        caches = self.caches(base)
        positions, cos, sin = self.rope
        q = fused_reference.rope_and_cache(
            base, self.heads, (positions, cos.double(), sin.double()), caches, self.slots,
            (wide[0], wide[1]) if self.node == "rope with norms" else None, EPS,
        )  # fmt: skip
        return q.flatten(1), *(cache.flatten(2).flatten(0, 1) for cache in caches)

    def check(
        self, got: tuple[torch.Tensor, ...], tolerance: float, base: torch.Tensor | None = None
    ) -> None:
        """Every row against float64. A delta is as large as the base, so one that is missing is an error near 1."""
        base = self.lora.out if base is None else base
        compare(got, self.expected(base.double() + expected_delta(self.lora)), tolerance)
        if self.node == "silu":
            # Without sums over columns, the order of which is free, rows without an adapter are the plain node's.
            without = torch.from_numpy(self.lora.token_slots < 0).to(base.device)
            assert torch.equal(got[0][without], self.run(base, None)[0][without])

    def caches(self, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of nobody, in the type of `base`."""
        dim = self.rope[1].shape[-1]
        shape = -(-2 * len(self.slots) // CACHE_BLOCK) + 1, CACHE_BLOCK, self.heads[1], dim
        one, other = (torch.full(shape, float("nan"), dtype=base.dtype, device=base.device) for _ in range(2))
        return one, other


def compare(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], tolerance: float) -> None:
    """Row by row, error over size; what is not to be written must be NaN, and nothing else."""
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        exact = other.double().nan_to_num()
        error = (one.double().nan_to_num() - exact).norm(dim=1)
        assert (error <= tolerance * exact.norm(dim=1)).all(), float(
            (error / exact.norm(dim=1)).nan_to_num().max()
        )


def check_against_twin(case: NodeCase, batch: LoraBatch, config: LoraConfig, tolerance: float) -> None:
    """The node against float64, and against expand and the plain node one after the other."""
    base = case.lora.out
    delta = case.delta(batch, config)
    before = base.clone()
    got = case.run(base, delta)
    case.check(got, tolerance)
    added = base.clone()
    delta.add_to(added)
    compare(got, case.run(added, None), tolerance)
    assert torch.equal(base, before)  # the node reads its input, it does not add to it


def make_node_case(
    node: str,
    tokens: int,
    ranks: tuple[int, ...],
    popularity: str = "uniform",
    width: int = 64,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    **options: object,
) -> NodeCase:
    """As `make_lora_case`; norm and SiLU give `width` columns, rotary embedding these heads. In a batch of several rows
    one is padding to the cache."""
    slices: tuple[int, ...] = tuple(head_dim * count for count in (heads[0], heads[1], heads[1]))
    if not node.startswith("rope"):
        slices = (width,) if node == "residual norm" else (width, width)
    lora = make_lora_case(tokens, ranks, popularity, out_slices=slices, **options)
    device, dtype = lora.x.device, lora.x.dtype
    angles = torch.outer(torch.arange(50.0), torch.rand(head_dim // 2))
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
    slots = torch.randperm(2 * tokens)[:tokens]
    if tokens > 1:
        slots[tokens // 2] = -1
    if node == "residual norm":
        vectors = torch.randn(tokens, width), torch.rand(width) + 0.5
    else:
        vectors = torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5
    return NodeCase(
        node=node,
        lora=lora,
        heads=heads,
        vectors=(vectors[0].to(dtype).to(device), vectors[1].to(dtype).to(device)),
        rope=(torch.randint(0, 50, (tokens,)).to(device), tables[0].to(device), tables[1].to(device)),
        slots=slots.to(device),
    )


def with_slots(case: NodeCase, token_slots: object) -> NodeCase:
    """The same with other adapters in its rows."""
    return replace(case, lora=replace(case.lora, token_slots=token_slots))
