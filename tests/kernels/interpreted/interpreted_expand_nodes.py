"""Nodes after a base layer that add its LoRA deltas, in the interpreter, against float64 and against their twins."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from expand_node_cases import NODES, NodeCase, check_against_twin, make_node_case, with_slots
from lora_cases import draw_slots, poison_new_tensors

from lorax_kernels import LoraBatch, WorkBuffer, lora_triton
from lorax_kernels.configs import LoraConfig
from lorax_kernels.expand_nodes import begin_linear

SMALL = LoraConfig(
    fuse_norm=True, fuse_silu=True, fuse_rope=True, block_k=32, split_shift=2, row_n=64,
    block_n=32, fuse_row_n=64, fuse_block_n=32, fuse_waves=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_tensors(monkeypatch)


def run(case: NodeCase, config: LoraConfig = SMALL, tolerance: float = 1e-5) -> None:
    batch = case.lora.batch()
    if batch is not None:
        check_against_twin(case, batch.with_work("cpu"), config, tolerance)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("popularity", ["distinct", "identical"])
def test_any_ranks(node: str, popularity: str) -> None:
    run(make_node_case(node, 3, (1, 12), popularity))
    run(make_node_case(node, 3, (72, 5), popularity))


@pytest.mark.parametrize("node", NODES)
def test_mixed_batches(node: str) -> None:
    config = replace(SMALL, split_shift=3, target_log2=4)
    run(make_node_case(node, 18, (8, 24, 3), "segments", seed=4), config)
    run(make_node_case(node, 5, (8, 24, 3), "none_but_one", seed=4), config)


@pytest.mark.parametrize(
    ("node", "width"), [("residual norm", 40), ("residual norm", 200), ("silu", 40), ("silu", 7)]
)
def test_widths_that_are_no_multiple_of_a_block(node: str, width: int) -> None:
    for popularity in ("distinct", "identical"):
        run(make_node_case(node, 3, (8, 20), popularity, width=width))


@pytest.mark.parametrize(
    ("node", "heads", "dim"), [("rope", (9, 3), 64), ("rope with norms", (8, 1), 80)], ids=str
)
def test_any_grouping_of_heads(node: str, heads: tuple[int, int], dim: int) -> None:
    run(make_node_case(node, 2, (8, 20), "distinct", heads=heads, head_dim=dim))


@pytest.mark.parametrize("node", NODES)
def test_float16(node: str) -> None:
    run(make_node_case(node, 5, (8, 12), "uniform", dtype=torch.float16), tolerance=3e-3)


@pytest.mark.parametrize("node", NODES)
def test_a_row_is_the_same_whatever_its_batch_mates_hold(node: str) -> None:
    case = make_node_case(node, 6, (8, 3), "identical", base_share=0.0)
    batch = case.lora.batch()
    assert batch is not None
    batch.with_work("cpu")
    want = case.run(case.lora.out, case.delta(batch, SMALL))
    case.lora.x[[0, 1, 3, 4, 5]] = float("nan")
    case.lora.out[[0, 1, 3, 4]] = float("nan")
    got = case.run(case.lora.out, case.delta(batch, SMALL))
    assert torch.equal(got[0][2], want[0][2])
    assert got[0][5].isnan().all()


@pytest.mark.parametrize("node", NODES)
def test_one_buffer_serves_batch_after_batch_of_any_mix(node: str) -> None:
    """What a captured graph does: launches fixed by the padded size, the batch only in device memory."""
    case = make_node_case(node, 8, (8, 30, 16, 1), seed=2)
    buffer = WorkBuffer(num_tokens=8, max_pages=6, device="cpu")
    rng = np.random.default_rng(0)
    lora = case.lora
    for popularity, base_share, used in (("distinct", 0.0, 8), ("identical", 0.5, 5), ("uniform", 1.0, 8)):
        slots = draw_slots(rng, 8, 4, popularity, base_share)
        slots[used:] = -1
        batch = LoraBatch.build(slots, lora.slot_pages, lora.slot_ranks, "cpu", buffer)
        assert batch is not None
        check_against_twin(with_slots(case, slots), batch, SMALL, 1e-5)


def test_a_linear_layer_leaves_its_delta_only_where_the_node_can_add_it() -> None:
    for tokens, fused, left in ((6, True, True), (6, False, False), (260, True, False)):
        lora = make_node_case("silu", tokens, (8, 12), seed=1).lora
        weight = torch.randn(lora.out.shape[1], lora.x.shape[1]) / 8
        batch = lora.batch()
        assert batch is not None
        layer, pair = (weight, None), (lora.a, lora.b)
        config = replace(SMALL, fuse_silu=fused, prefill_block_k=32, prefill_block_n=32)
        got, delta = begin_linear(lora.x, layer, pair, batch.with_work("cpu"), lora.out_slices, config)
        assert (delta is not None) == left
        if delta is not None:
            delta.add_to(got)
        want = lora_triton.linear(lora.x, layer, pair, batch, lora.out_slices, config)
        torch.testing.assert_close(got, want)
