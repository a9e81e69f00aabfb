"""Products of 2 to 32 rows that add the rows' LoRA deltas, in the interpreter, against float64."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora_cases import LoraCase, expected_delta, make_lora_case, poison_new_tensors

from lorax_kernels import WorkBuffer, skinny_gemm, tuning
from lorax_kernels.expand_nodes import begin_linear, linear_silu
from lorax_kernels.lora_triton import linear, linear_in_product
from lorax_kernels.metadata import LoraBatch
from lorax_kernels.tuning import LoraConfig

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
WITHIN = LoraConfig(block_k=64, split_shift=2, row_n=64, rows_in_product=True, product_group=2)
WHOLE = {"kernel": "triton", "block_n": 32, "block_k": 256, "stages": 2}
SPLIT = {**WHOLE, "block_k": 128, "split_k": 2, "exact": True}


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_new_tensors(monkeypatch)
    use(monkeypatch, WHOLE)
    yield
    monkeypatch.undo()
    tuning.forget_configs()


def use(monkeypatch: pytest.MonkeyPatch, table: dict[str, object]) -> None:
    monkeypatch.setenv("LORAX_GEMM_CONFIG", json.dumps(table))
    tuning.forget_configs()


def base_layer(case: LoraCase, bias: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    columns, width = case.out.shape[1], case.x.shape[1]
    weight = (torch.randn(columns, width) / width**0.5).to(case.x.dtype)
    return weight, torch.randn(columns).to(case.x.dtype) if bias else None


def batch_of(case: LoraCase, fixed: bool) -> LoraBatch:
    buffer = WorkBuffer(case.x.shape[0], max_pages=32, device="cpu") if fixed else None
    batch = LoraBatch.build(case.token_slots, case.slot_pages, case.slot_ranks, "cpu", buffer)
    assert batch is not None
    return batch if fixed else batch.with_work("cpu")


def wanted(case: LoraCase, layer: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    bias = None if layer[1] is None else layer[1].double()
    return torch.nn.functional.linear(case.x.double(), layer[0].double(), bias) + expected_delta(case)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    errors = (got.double() - want).norm(dim=1) / want.norm(dim=1)
    assert float(errors.max()) <= TOLERANCE[got.dtype]


CASES = {
    "one adapter of all rows": (20, (16,), "one", (64, 24, 24), 0.0),
    "one adapter and rows without": (32, (8,), "uniform", (96,), 0.5),
    "every row its own": (9, (16, 8, 3, 1, 16, 12, 8, 16, 5), "distinct", (64, 24, 24), 0.0),
    "ranks from 1 to 256": (7, (1, 3, 256, 12, 96), "uniform", (80, 16), 0.2),
    "a single row has one": (6, (40, 8), "none_but_one", (40, 24), 0.0),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_the_product_adds_every_rows_delta(name: str, dtype: torch.dtype) -> None:
    rows, ranks, popularity, slices, base_share = CASES[name]
    case = make_lora_case(
        rows,
        ranks,
        popularity,
        seed=5,
        in_features=208,
        out_slices=slices,
        dtype=dtype,
        base_share=base_share,
    )
    layer = base_layer(case, bias=dtype == torch.float32)
    batch = batch_of(case, fixed=dtype == torch.float32)
    assert_close(linear(case.x, layer, (case.a, case.b), batch, slices, WITHIN), wanted(case, layer))


@pytest.mark.parametrize("swap", [False, True], ids=["rows by columns", "columns by rows"])
@pytest.mark.parametrize("many", [False, True], ids=["one adapter", "many"])
def test_parts_of_k_share_the_adapters_among_them(
    many: bool, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, {**SPLIT, "swap": swap})
    case = make_lora_case(
        18,
        (16, 8, 24, 8, 16, 8, 3) if many else (16,),
        "uniform",
        seed=2,
        in_features=256,
        out_slices=(64, 32, 32),
    )
    layer, batch = base_layer(case), batch_of(case, True)
    planes, delta = begin_linear(case.x, layer, (case.a, case.b), batch, case.out_slices, WITHIN)
    assert delta is None
    assert planes.shape == (2, 18, 128)
    assert_close(planes.sum(0), wanted(case, layer))
    summed = linear(case.x, layer, (case.a, case.b), batch, case.out_slices, WITHIN)
    torch.testing.assert_close(summed, planes.sum(0))


@pytest.mark.parametrize("inner", [64, 40], ids=["whole tiles", "a part of one"])
def test_silu_and_multiplication_come_after_the_delta(inner: int) -> None:
    case = make_lora_case(5, (16, 3), "distinct", seed=4, in_features=128, out_slices=(inner, inner))
    layer, batch = base_layer(case), batch_of(case, True)
    got = linear_silu(case.x, layer, (case.a, case.b), batch, case.out_slices, WITHIN)
    gate, up = wanted(case, layer).chunk(2, 1)
    assert_close(got, torch.nn.functional.silu(gate) * up)


def test_rows_without_adapters_get_the_products_bits() -> None:
    case = make_lora_case(8, (16,), "one", seed=1, in_features=128, out_slices=(64,))
    case.token_slots[3:] = -1
    layer, batch = base_layer(case), batch_of(case, True)
    got = linear(case.x, layer, (case.a, case.b), batch, case.out_slices, WITHIN)
    assert torch.equal(got[3:], skinny_gemm.skinny_linear(case.x, layer[0])[3:])
    assert not torch.equal(got[:3], skinny_gemm.skinny_linear(case.x, layer[0])[:3])


def test_a_delta_is_left_to_a_norm_that_takes_it() -> None:
    case = make_lora_case(8, (16,), "one", in_features=128, out_slices=(64,))
    layer, batch = base_layer(case), batch_of(case, True)
    for fuse_norm in (True, False):
        config = replace(WITHIN, fuse_norm=fuse_norm)
        _, delta = begin_linear(case.x, layer, (case.a, case.b), batch, case.out_slices, config)
        assert (delta is not None) == fuse_norm


def test_other_numbers_of_rows_and_the_librarys_products_go_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for rows, table in ((33, "triton"), (1, "triton"), (2, "blas")):
        use(monkeypatch, {"kernel": table})
        case = make_lora_case(rows, (8,), in_features=64, base_share=0.0)
        work = batch_of(case, False).work
        assert work is not None
        layer = base_layer(case)
        assert linear_in_product(case.x, layer, (case.a, case.b), work, case.out_slices, WITHIN) is None
