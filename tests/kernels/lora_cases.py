"""Random LoRA batches and what they must give, in float64, computed row by row from whole adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lorax_kernels import LoraBatch, LoraSite, PageLayout, pages_for_rank


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
class LoraCase:
    x: torch.Tensor
    out: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    out_slices: tuple[int, ...]
    token_slots: np.ndarray
    slot_pages: np.ndarray
    slot_ranks: np.ndarray
    whole_a: list[torch.Tensor]
    whole_b: list[torch.Tensor]

    def batch(self, device: torch.device | str = "cpu") -> LoraBatch | None:
        return LoraBatch.build(self.token_slots, self.slot_pages, self.slot_ranks, device)


def draw_slots(
    rng: np.random.Generator, tokens: int, slots: int, popularity: str, base_share: float
) -> np.ndarray:
    if popularity == "distinct":
        ids = np.arange(tokens) % slots
        rng.shuffle(ids)
    elif popularity == "uniform":
        ids = rng.integers(0, slots, tokens)
    elif popularity == "zipf":
        weights = 1.0 / np.arange(1, slots + 1)
        ids = rng.choice(slots, tokens, p=weights / weights.sum())
    elif popularity == "segments":
        ids = np.sort(rng.integers(0, slots, tokens))
    else:
        ids = np.full(tokens, slots - 1)
    ids = ids.astype(np.int32)
    if popularity == "none_but_one":
        keep = rng.integers(tokens)
        ids[np.arange(tokens) != keep] = -1
    else:
        ids[rng.random(tokens) < base_share] = -1
    return ids


def make_lora_case(
    tokens: int,
    ranks: tuple[int, ...],
    popularity: str = "uniform",
    seed: int = 0,
    in_features: int = 64,
    out_slices: tuple[int, ...] = (48, 16),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    base_share: float = 0.2,
) -> LoraCase:
    """Adapters of the given ranks in random pages of an arena whose other pages, and other sites, are NaN."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    site = LoraSite(in_features, out_slices)
    layout = PageLayout({"before": LoraSite(24, (8,)), "site": site, "after": LoraSite(8, (24,))})
    counts = [pages_for_rank(r) for r in ranks]
    order = rng.permutation(sum(counts) + 3)
    arena = torch.full((len(order), layout.page_size), float("nan"), dtype=dtype)
    a, b = layout.a_view(arena, "site"), layout.b_view(arena, "site")
    slot_pages = np.full((len(ranks) + 1, max(counts)), -1, np.int32)
    whole_a, whole_b, at = [], [], 0
    for slot, (rank, count) in enumerate(zip(ranks, counts, strict=True)):
        wa = (torch.randn(len(out_slices), rank, in_features) / in_features**0.5).to(dtype)
        wb = (torch.randn(rank, site.out_features) / rank**0.5).to(dtype)
        for j in range(count):
            page = int(order[at])
            at += 1
            slot_pages[slot, j] = page
            part = slice(8 * j, min(8 * j + 8, rank))
            a[page], b[page] = 0, 0
            a[page, :, : part.stop - part.start] = wa[:, part]
            b[page, : part.stop - part.start] = wb[part]
        whole_a.append(wa)
        whole_b.append(wb)
    slot_ranks = np.array([*ranks, 0], np.int32)
    slots = draw_slots(rng, tokens, len(ranks), popularity, base_share)
    arena = arena.to(device)
    return LoraCase(
        x=torch.randn(tokens, in_features).to(dtype).to(device),
        out=torch.randn(tokens, site.out_features).to(dtype).to(device),
        a=layout.a_view(arena, "site"),
        b=layout.b_view(arena, "site"),
        out_slices=out_slices,
        token_slots=slots,
        slot_pages=slot_pages,
        slot_ranks=slot_ranks,
        whole_a=[w.to(device) for w in whole_a],
        whole_b=[w.to(device) for w in whole_b],
    )


def expected_delta(case: LoraCase) -> torch.Tensor:
    """The delta of every row in float64, zero where a row has no adapter."""
    delta = torch.zeros(case.out.shape, dtype=torch.float64, device=case.out.device)
    for row, slot in enumerate(case.token_slots.tolist()):
        if slot < 0:
            continue
        begin = 0
        for s, width in enumerate(case.out_slices):
            h = case.whole_a[slot][s].double() @ case.x[row].double()
            delta[row, begin : begin + width] = h @ case.whole_b[slot][:, begin : begin + width].double()
            begin += width
    return delta
