"""Sites whose input a node makes (a norm, or SiLU and multiplication), and what they must give, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from attention_cases import AttentionCase, expected_attention, make_attention_case
from lora_cases import LoraCase, expected_delta, make_lora_case

from lorax_kernels import LoraBatch, attention_triton, fused_triton, riding
from lorax_kernels.lora_triton import Shrunk, expand, work_of
from lorax_kernels.tuning import LoraConfig

NODES = ("norm", "residual norm", "silu")
EPS = 1e-5


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated but not written is NaN, so that reading it shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))


def _poisoning(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*arguments: object, **options: object) -> torch.Tensor:
        made = plain(*arguments, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    return poisoned


@dataclass
class RidingCase:
    """A site with `lora.x` unused: its input comes from `source` [T, in], or [T, 2 in] for SiLU."""

    node: str
    lora: LoraCase
    source: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor

    def plain(self) -> tuple[torch.Tensor, ...]:
        """What the node gives without LoRA."""
        if self.node == "silu":
            return (fused_triton.silu_mul(self.source),)
        return fused_triton.rms_norm(self.source, self.weight, EPS, self.residual)

    def run(self, batch: LoraBatch, config: LoraConfig) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The node's own results, and the site's output with the deltas added."""
        case = self.lora
        if self.node == "silu":
            y, h = riding.silu_mul_shrink(self.source, case.a, batch, config)
            made: tuple[torch.Tensor, ...] = (y,)
        else:
            norm = self.weight, EPS
            *made, h = riding.rms_norm_shrink(self.source, norm, self.residual, case.a, batch, config)
        assert h is not None
        got = case.out.clone()
        expand(h, case.b, work_of(batch), got, case.out_slices)
        return tuple(made), got

    def check(self, got: torch.Tensor, tolerance: float) -> None:
        """The output against the delta in float64; rows without an adapter must be as they were."""
        case = self.lora
        want = expected_delta(replace(case, x=self._input()))
        delta = got.double() - case.out.double()
        assert (delta - want).norm() <= tolerance * (want.norm() + case.out.double().norm())
        without = torch.from_numpy(case.token_slots < 0).to(got.device)
        assert torch.equal(got[without], case.out[without])

    def _input(self) -> torch.Tensor:
        source = self.source.double()
        if self.node == "silu":
            gate, up = source.chunk(2, 1)
            return torch.nn.functional.silu(gate) * up
        total = source if self.residual is None else (self.source + self.residual).double()
        return total * (total.square().mean(1, keepdim=True) + EPS).rsqrt() * self.weight.double()


def make_riding_case(
    node: str,
    tokens: int,
    ranks: tuple[int, ...],
    popularity: str = "uniform",
    size: float = 1.0,
    **options: object,
) -> RidingCase:
    """As `make_lora_case`; the rows of the node's input differ in size, around `size`."""
    lora = make_lora_case(tokens, ranks, popularity, **options)
    x = lora.x
    sizes = torch.linspace(0.3, 3.0, tokens, device=x.device)[:, None] * size
    source = (torch.randn(tokens, x.shape[1] * (2 if node == "silu" else 1), device=x.device) * sizes).to(
        x.dtype
    )
    residual = torch.randn_like(x) * size if node == "residual norm" else None
    return RidingCase(
        node, lora, source, residual, (torch.rand(x.shape[1], device=x.device) + 0.5).to(x.dtype)
    )


@dataclass
class RidingAttentionCase:
    """Attention, and the site after it."""

    lora: LoraCase
    attention: AttentionCase

    @classmethod
    def make(
        cls,
        contexts: tuple[int, ...],
        ranks: tuple[int, ...],
        popularity: str,
        heads: tuple[int, int],
        head_dim: int,
        queries: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        base_share: float = 0.2,
    ) -> RidingAttentionCase:
        queries = queries or (1,) * len(contexts)
        attention = make_attention_case(
            queries, contexts, heads, head_dim, dtype=dtype, device=device, seed=sum(ranks)
        )
        lora = make_lora_case(
            sum(queries), ranks, popularity, in_features=heads[0] * head_dim, out_slices=(72,), dtype=dtype,
            device=device, base_share=base_share,
        )  # fmt: skip
        return cls(lora, attention)

    def run(self, config: LoraConfig) -> tuple[torch.Tensor, Shrunk | None, LoraBatch]:
        case, device = self.attention, self.lora.x.device
        batch = self.lora.batch(device)
        assert batch is not None
        if batch.work is None:
            batch.with_work(device)
        out, h = riding.paged_attention_shrink(
            case.q,
            (case.k_cache, case.v_cache),
            case.batch(device),
            case.scale,
            None,
            self.lora.a,
            batch,
            config,
        )
        return out, h, batch

    def check(self, config: LoraConfig, tolerance: float) -> None:
        """Attention must be as it is without LoRA, and the deltas those of float64."""
        case, lora = self.attention, self.lora
        out, h, batch = self.run(config)
        plain = attention_triton.paged_attention(
            case.q, case.k_cache, case.v_cache, case.batch(out.device), case.scale
        )
        assert torch.equal(out, plain)
        assert h is not None
        got = lora.out.clone()
        expand(h, lora.b, work_of(batch), got, lora.out_slices)
        want = expected_delta(replace(lora, x=expected_attention(case).flatten(1)))
        error = (got.double() - lora.out.double() - want).norm()
        assert error <= tolerance * (want.norm() + lora.out.double().norm())
        without = torch.from_numpy(lora.token_slots < 0).to(got.device)
        assert torch.equal(got[without], lora.out[without])
