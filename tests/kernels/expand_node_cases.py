"""Nodes after a base layer that add its LoRA deltas: random inputs, what they must give in float64, and their twin,
expand by itself and then the plain node."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from lora_cases import LoraCase, expected_delta, make_lora_case

from lorax_kernels import LoraBatch, fused_reference, fused_triton
from lorax_kernels.expand_nodes import Delta, rms_norm_expand, silu_mul_expand
from lorax_kernels.lora_triton import shrink, work_of
from lorax_kernels.tuning import LoraConfig

NODES = ("residual norm", "silu")
EPS = 1e-5


@dataclass
class NodeCase:
    """A node that reads `lora.out`, the base layer's output, [T, sum of `lora.out_slices`]."""

    node: str
    lora: LoraCase
    vectors: tuple[torch.Tensor, torch.Tensor]
    """The residual [T, width] and the norm's weight."""

    def delta(self, batch: LoraBatch, config: LoraConfig) -> Delta:
        """What the adapters add, begun by shrink."""
        case, work = self.lora, work_of(batch)
        return Delta(shrink(case.x, case.a, work, config), case.b, work, case.out_slices)

    def run(self, base: torch.Tensor, delta: Delta | None) -> tuple[torch.Tensor, ...]:
        """All that the node writes, each [rows, columns]."""
        if self.node == "silu":
            return (fused_triton.silu_mul(base) if delta is None else silu_mul_expand(base, delta),)
        residual, weight = self.vectors
        if delta is None:
            return fused_triton.rms_norm(base, weight, EPS, residual)
        return rms_norm_expand(base, (weight, EPS), residual, delta)

    def expected(self, base: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same of `base` in float64."""
        if self.node == "silu":
            return (fused_reference.silu_mul(base),)
        residual, weight = (vector.double() for vector in self.vectors)
        return fused_reference.rms_norm(base, weight, EPS, residual)

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
    **options: object,
) -> NodeCase:
    """As `make_lora_case`; the node's output has `width` columns."""
    slices = (width,) if node == "residual norm" else (width, width)
    lora = make_lora_case(tokens, ranks, popularity, out_slices=slices, **options)
    vectors = torch.randn(tokens, width), torch.rand(width) + 0.5
    return NodeCase(node, lora, (vectors[0].to(lora.x), vectors[1].to(lora.x)))


def with_slots(case: NodeCase, token_slots: object) -> NodeCase:
    """The same with other adapters in its rows."""
    return replace(case, lora=replace(case.lora, token_slots=token_slots))
