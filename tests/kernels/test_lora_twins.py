"""The torch twins of the LoRA kernels against float64 written out row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lora_cases import LoraCase, expected_delta, make_lora_case

from lorax_kernels import LoraBatch, add_lora, reference

POPULARITIES = ("distinct", "uniform", "zipf", "identical", "none_but_one")


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("ranks", [(8,), (1, 3, 12), (4, 64, 16), (96, 256, 8)], ids=str)
def test_add_lora_adds_each_rows_own_delta_and_leaves_the_others(
    popularity: str, ranks: tuple[int, ...]
) -> None:
    case = make_lora_case(tokens=23, ranks=ranks, popularity=popularity, seed=len(ranks))
    got = case.out.clone()
    add_lora(case.x, case.a, case.b, case.batch(), got, case.out_slices)
    _check(case, got)


@pytest.mark.parametrize("form", ["bgmv", "sgmv"])
@pytest.mark.parametrize("slices", [(48,), (40, 24), (32, 16, 8)], ids=str)
def test_shrink_then_expand_is_the_same_delta(form: str, slices: tuple[int, ...]) -> None:
    case = make_lora_case(tokens=17, ranks=(8, 20, 3), out_slices=slices, popularity="uniform", seed=3)
    batch = case.batch()
    assert batch is not None
    got = case.out.clone()
    h = getattr(reference, f"{form}_shrink")(case.x, case.a, batch)
    getattr(reference, f"{form}_expand")(h, case.b, batch, got, slices)
    _check(case, got)


def test_a_batch_without_adapters_is_none() -> None:
    none = LoraBatch.build(
        np.full(5, -1, np.int32), np.zeros((2, 1), np.int32), np.array([8, 8], np.int32), "cpu"
    )
    assert none is None


def test_rows_of_an_adapter_without_weights_are_left_out() -> None:
    batch = LoraBatch.build(
        np.array([0, 1, 0], np.int32), np.array([[0], [-1]], np.int32), np.array([8, 0], np.int32), "cpu"
    )
    assert batch is not None
    assert batch.rows.tolist() == [0, 2]
    assert batch.num_adapters == 1


def test_a_slot_with_too_few_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer pages"):
        LoraBatch.build(
            np.array([0], np.int32), np.array([[3, -1]], np.int32), np.array([12], np.int32), "cpu"
        )


def test_adapters_of_consecutive_rows_need_no_gather() -> None:
    pages, ranks = np.array([[0], [1]], np.int32), np.array([8, 8], np.int32)
    chunks = LoraBatch.build(np.array([1, 1, -1, 0, 0], np.int32), pages, ranks, "cpu")
    mixed = LoraBatch.build(np.array([1, 0, 1], np.int32), pages, ranks, "cpu")
    assert chunks is not None
    assert mixed is not None
    assert chunks.token_ranges == ((3, 2), (0, 2))
    assert mixed.token_ranges is None


def test_half_precision_accumulates_close_to_float64() -> None:
    case = make_lora_case(tokens=9, ranks=(16, 8), dtype=torch.bfloat16, popularity="uniform", seed=5)
    got = case.out.clone()
    add_lora(case.x, case.a, case.b, case.batch(), got, case.out_slices)
    _check(case, got, tolerance=2e-2)


def _check(case: LoraCase, got: torch.Tensor, tolerance: float = 1e-5) -> None:
    want = expected_delta(case)
    delta = got.double() - case.out.double()
    assert (delta - want).norm() <= tolerance * (want.norm() + case.out.double().norm())
    without = case.token_slots < 0
    assert torch.equal(got[torch.from_numpy(without)], case.out[torch.from_numpy(without)])
