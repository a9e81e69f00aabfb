"""Shrink that rides in the node before the base layer, in the interpreter, against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora_cases import draw_slots
from riding_cases import NODES, RidingCase, make_riding_case, poison_new_tensors

from lorax_kernels import LoraBatch, WorkBuffer
from lorax_kernels.tuning import LoraConfig

SMALL = LoraConfig(
    shrink="fused", ride_block_k=32, ride_split_shift=2, ride_waves=2, row_n=64, block_n=32, expand_flat=True
)
UNEVEN = LoraConfig(
    shrink="fused", ride_block_k=64, ride_split_shift=3, ride_target_log2=4, row_n=64, block_n=32
)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_tensors(monkeypatch)


def run(case: RidingCase, config: LoraConfig = SMALL, tolerance: float = 1e-5) -> None:
    batch = case.lora.batch()
    if batch is None:
        return
    made, got = case.run(batch.with_work("cpu"), config)
    for one, other in zip(made, case.plain(), strict=True):
        assert torch.equal(one, other)
    case.check(got, tolerance)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("ranks", [(1, 3), (12, 16), (96, 256, 5)], ids=str)
@pytest.mark.parametrize("popularity", ["distinct", "identical"])
def test_any_ranks(node: str, ranks: tuple[int, ...], popularity: str) -> None:
    run(make_riding_case(node, 4 if max(ranks) > 64 else 9, ranks, popularity, seed=sum(ranks)))


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("popularity", ["zipf", "none_but_one"])
def test_mixed_batches(node: str, popularity: str) -> None:
    run(make_riding_case(node, 21, (8, 24, 3), popularity, seed=4, out_slices=(40, 24, 8)), UNEVEN)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize(
    ("in_features", "slices", "config"),
    [(40, (33,), UNEVEN), (200, (8, 72, 8), SMALL)],
    ids=["tiles by rows", "flat"],
)
def test_widths_that_are_no_multiple_of_a_block(
    node: str, in_features: int, slices: tuple[int, ...], config: LoraConfig
) -> None:
    for popularity in ("distinct", "identical"):
        run(
            make_riding_case(node, 3, (8, 20), popularity, in_features=in_features, out_slices=slices), config
        )


@pytest.mark.parametrize("node", NODES)
def test_float16_also_of_inputs_near_its_limit(node: str) -> None:
    """The weight of a norm may carry its input beyond float16 before the norm's factor is applied."""
    size = 1.0 if node == "silu" else 8000.0
    for popularity in ("distinct", "identical"):
        case = make_riding_case(node, 5, (8, 12), popularity, size, dtype=torch.float16, base_share=0.0)
        run(case, tolerance=3e-3)


@pytest.mark.parametrize("node", NODES)
def test_a_row_is_the_same_whatever_its_batch_mates_hold(node: str) -> None:
    case = make_riding_case(node, 6, (12, 8), "identical", base_share=0.0)
    batch = case.lora.batch()
    assert batch is not None
    _, want = case.run(batch.with_work("cpu"), SMALL)
    case.source[[0, 1, 2, 4, 5]] = float("nan")
    _, got = case.run(batch, SMALL)
    assert torch.equal(got[3], want[3])
    assert got[4].isnan().all()


@pytest.mark.parametrize("node", NODES)
def test_one_buffer_serves_batch_after_batch_of_any_mix(node: str) -> None:
    """What a captured graph does; rows beyond the batch are padding, and may hold anything."""
    case = make_riding_case(node, 8, (8, 30, 16, 1), "uniform", seed=2)
    buffer = WorkBuffer(num_tokens=8, max_pages=6, device="cpu")
    rng = np.random.default_rng(0)
    lora = case.lora
    for popularity, base_share, used in (("distinct", 0.0, 8), ("identical", 0.5, 5), ("uniform", 1.0, 8)):
        lora.token_slots = draw_slots(rng, 8, 4, popularity, base_share)
        lora.token_slots[used:] = -1
        source = case.source.clone()
        case.source[used:] = float("nan")
        batch = LoraBatch.build(lora.token_slots, lora.slot_pages, lora.slot_ranks, "cpu", buffer)
        assert batch is not None
        _, got = case.run(batch, SMALL)
        case.source = source
        case.check(got, 1e-5)
