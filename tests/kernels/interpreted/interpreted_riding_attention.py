"""Shrink of the layer after attention that rides in decode's attention, in the interpreter, against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from riding_cases import RidingAttentionCase, poison_new_tensors

from lorax_kernels.tuning import LoraConfig

CONFIG = LoraConfig(shrink="fused", ride_attention=True, row_n=64, block_n=32)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_tensors(monkeypatch)


@pytest.mark.parametrize(
    ("heads", "dim"), [((4, 4), 32), ((6, 2), 64), ((8, 1), 80), ((8, 8), 16), ((12, 4), 24)], ids=str
)
@pytest.mark.parametrize("popularity", ["distinct", "identical"])
def test_any_grouping_of_heads(heads: tuple[int, int], dim: int, popularity: str) -> None:
    case = RidingAttentionCase.make((5, 33, 1), (1, 12), popularity, heads, dim)
    case.check(CONFIG, 1e-5)


@pytest.mark.parametrize("ranks", [(3, 96), (256, 8)], ids=str)
def test_contexts_split_over_programs_and_any_rank(ranks: tuple[int, ...]) -> None:
    RidingAttentionCase.make((700, 2, 300), ranks, "uniform", (4, 2), 32, base_share=0.4).check(CONFIG, 1e-5)


def test_float16() -> None:
    RidingAttentionCase.make((300, 40), (8, 12), "uniform", (4, 2), 32, dtype=torch.float16).check(
        CONFIG, 3e-3
    )


def test_heads_that_are_no_power_of_two_do_not_ride() -> None:
    case = RidingAttentionCase.make((5, 9), (8,), "identical", (9, 3), 16, base_share=0.0)
    assert case.run(CONFIG)[1] is None


def test_prompts_do_not_ride() -> None:
    case = RidingAttentionCase.make((9, 9), (8,), "identical", (4, 2), 16, queries=(1, 4), base_share=0.0)
    assert case.run(CONFIG)[1] is None
