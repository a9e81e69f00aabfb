"""A product of one row that adds the row's LoRA delta, in the interpreter: against float64, and against expand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel_settings import configured
from lora_cases import expected_delta, make_lora_case, poison_new_tensors

from lorax_kernels import WorkBuffer, tuning
from lorax_kernels.configs import LoraConfig
from lorax_kernels.expand_nodes import begin_linear
from lorax_kernels.lora_triton import linear, linear_in_product
from lorax_kernels.metadata import LoraBatch
from lorax_kernels.skinny_gemm import RowDelta, skinny_linear

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
SEPARATE = LoraConfig(block_k=64, split_shift=2, row_n=64)
WITHIN = replace(SEPARATE, one_row_in_product=True)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_new_tensors(monkeypatch)
    with configured(monkeypatch, gemm={"kernel": "triton", "block_n": 32, "block_k": 256, "stages": 2}):
        yield


def base_layer(case, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:  # type: ignore[no-untyped-def]
    columns, width = case.out.shape[1], case.x.shape[1]
    weight = (torch.randn(columns, width) / width**0.5).to(case.x.dtype)
    return weight, torch.randn(columns).to(case.x.dtype) if bias else None


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("rank", "slices", "fixed"),
    [(1, (96,), False), (3, (64, 64), True), (16, (64, 24, 24), False), (40, (80, 24, 24), True)],
    ids=["one slice", "two, a graph's list", "three", "three that straddle, a graph's list"],
)
def test_it_is_the_product_and_then_expand(
    rank: int, slices: tuple[int, ...], fixed: bool, dtype: torch.dtype
) -> None:
    case = make_lora_case(
        1, (rank, 8), "distinct", seed=3, in_features=208, out_slices=slices, dtype=dtype, base_share=0.0
    )
    case.token_slots[:] = 0
    layer = base_layer(case, bias=rank > 1)
    buffer = WorkBuffer(1, max_pages=5, device="cpu") if fixed else None
    batch = LoraBatch.build(case.token_slots, case.slot_pages, case.slot_ranks, "cpu", buffer)
    assert batch is not None
    if not fixed:
        batch.with_work("cpu")
    weights = (case.a, case.b)
    got = linear(case.x, layer, weights, batch, slices, WITHIN)
    twin = linear(case.x, layer, weights, batch, slices, SEPARATE)
    torch.testing.assert_close(got, twin, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 1e-3)
    bias = None if layer[1] is None else layer[1].double()
    want = torch.nn.functional.linear(case.x.double(), layer[0].double(), bias) + expected_delta(case)
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()
    whole, delta = begin_linear(case.x, layer, weights, batch, slices, replace(WITHIN, fuse_norm=True))
    assert delta is None
    assert torch.equal(whole, got)


def test_a_row_without_an_adapter_gets_the_product_alone() -> None:
    case = make_lora_case(1, (12,), in_features=208, out_slices=(64, 40))
    case.token_slots[:] = -1
    buffer = WorkBuffer(1, max_pages=3, device="cpu")
    batch = LoraBatch.build(case.token_slots, case.slot_pages, case.slot_ranks, "cpu", buffer)
    assert batch is not None
    weight, bias = base_layer(case, bias=True)
    got = linear(case.x, (weight, bias), (case.a, case.b), batch, case.out_slices, WITHIN)
    assert torch.equal(got, skinny_linear(case.x, weight, bias))


def test_more_rows_and_the_librarys_products_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, table in ((2, "triton"), (1, "blas")):
        monkeypatch.setenv("LORAX_GEMM_CONFIG", f'{{"kernel": "{table}"}}')
        tuning.forget_configs()
        case = make_lora_case(rows, (8,), in_features=64, base_share=0.0)
        batch = case.batch()
        assert batch is not None
        work = batch.with_work("cpu").work
        assert work is not None
        layer = base_layer(case, bias=False)
        assert linear_in_product(case.x, layer, (case.a, case.b), work, case.out_slices, WITHIN) is None


def test_a_delta_that_does_not_fit_is_refused() -> None:
    case = make_lora_case(2, (8,), base_share=0.0)
    batch = case.batch()
    assert batch is not None
    work = batch.with_work("cpu").work
    assert work is not None
    planes, (weight, _) = torch.zeros(1, 2, 16), base_layer(case, bias=False)
    for rows, slices in ((2, case.out_slices), (1, (64, 64))):
        with pytest.raises(ValueError, match="a delta of slices"):
            skinny_linear(case.x[:rows], weight, None, None, RowDelta(planes, (0, 9), case.b, work, slices))
