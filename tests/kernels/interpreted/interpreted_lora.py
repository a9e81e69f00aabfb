"""LoRA kernels in the interpreter, against float64."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora_cases import LoraCase, draw_slots, expected_delta, make_lora_case

from lorax_kernels import LoraBatch, WorkBuffer, lora_triton
from lorax_kernels.configs import LoraConfig

SMALL = LoraConfig(block_k=32, split_shift=2, row_n=64, block_n=32, prefill_block_k=32, prefill_block_n=32)
RANKS = [(1,), (12, 16, 64), (96, 256, 5)]


def run(case: LoraCase, config: LoraConfig = SMALL) -> torch.Tensor:
    batch = case.batch()
    if batch is None:
        return case.out.clone()
    batch.with_work("cpu")
    assert batch.work is not None
    got = case.out.clone()
    h = lora_triton.shrink(case.x, case.a, batch.work, config)
    lora_triton.expand(h, case.b, batch.work, got, case.out_slices)
    return got


@pytest.fixture(autouse=True)
def _poisoned_intermediates(monkeypatch: pytest.MonkeyPatch) -> None:
    """What shrink leaves unwritten is NaN, so that an expand that reads it shows."""
    plain = lora_triton.allocate_planes
    monkeypatch.setattr(
        lora_triton, "allocate_planes", lambda *arguments: plain(*arguments).fill_(float("nan"))
    )


def check(case: LoraCase, got: torch.Tensor, tolerance: float = 1e-5) -> None:
    want = expected_delta(case)
    error = (got.double() - case.out.double() - want).norm()
    assert error <= tolerance * (want.norm() + case.out.double().norm())
    without = torch.from_numpy(case.token_slots < 0)
    assert torch.equal(got[without], case.out[without])


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical", "none_but_one"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_decode(popularity: str, ranks: tuple[int, ...]) -> None:
    case = make_lora_case(tokens=21, ranks=ranks, popularity=popularity, seed=sum(ranks))
    check(case, run(case))


@pytest.mark.parametrize("tokens", [1, 2, 17, 33])
def test_odd_batch_sizes(tokens: int) -> None:
    case = make_lora_case(
        tokens, (8, 24), seed=tokens, base_share=0.0, in_features=96, out_slices=(40, 24, 8)
    )
    check(case, run(case))


@pytest.mark.parametrize("in_features", [40, 200])
@pytest.mark.parametrize("slices", [(33,), (64, 7), (8, 72, 8)], ids=str)
@pytest.mark.parametrize("popularity", ["distinct", "identical"])
def test_widths_that_are_no_multiple_of_a_block(
    in_features: int, slices: tuple[int, ...], popularity: str
) -> None:
    case = make_lora_case(
        5, (8, 20), popularity, in_features=in_features, out_slices=slices, seed=in_features
    )
    check(case, run(case))


@pytest.mark.parametrize("splits", [0, 1, 3])
def test_any_number_of_splits_gives_the_same_delta(splits: int) -> None:
    case = make_lora_case(6, (8, 12), in_features=256, seed=splits)
    check(case, run(case, replace(SMALL, split_shift=splits, shrink_waves=1 + splits)))


@pytest.mark.parametrize("ranks", [(8,), (20, 1, 64, 5)], ids=str)
@pytest.mark.parametrize("popularity", ["segments", "identical", "uniform"])
def test_prefill(popularity: str, ranks: tuple[int, ...]) -> None:
    case = make_lora_case(290, ranks, popularity, out_slices=(40, 16, 16), seed=len(ranks))
    check(case, run(case))


def test_float16() -> None:
    for tokens in (13, 270):
        case = make_lora_case(tokens, (8, 16, 3), "uniform", dtype=torch.float16)
        check(case, run(case), tolerance=2e-3)


def test_one_buffer_serves_batch_after_batch_of_any_mix() -> None:
    """What a captured graph does: launches fixed by the padded size, the batch only in device memory."""
    case = make_lora_case(12, (8, 30, 16, 1), "uniform", seed=2)
    buffer = WorkBuffer(num_tokens=12, max_pages=8, device="cpu")
    rng = np.random.default_rng(0)
    for popularity, base_share in (("distinct", 0.0), ("identical", 0.5), ("uniform", 1.0), ("zipf", 0.3)):
        case.token_slots = draw_slots(rng, 12, 4, popularity, base_share)
        batch = LoraBatch.build(case.token_slots, case.slot_pages, case.slot_ranks, "cpu", buffer)
        assert batch is not None
        assert batch.work is not None
        got = case.out.clone()
        h = lora_triton.shrink(case.x, case.a, batch.work, SMALL)
        lora_triton.expand(h, case.b, batch.work, got, case.out_slices)
        check(case, got)
