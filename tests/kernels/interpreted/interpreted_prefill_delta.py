"""Products of many rows that add the adapters' deltas themselves, in the interpreter, against float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel_settings import configured
from lora_cases import LoraCase, expected_delta, make_lora_case, poison_new_tensors

from lorax_kernels import LoraBatch, dispatch, expand_nodes, lora_triton, prefill_gemm
from lorax_kernels.configs import PrefillConfig
from lorax_kernels.fused_reference import silu_mul
from lorax_kernels.prefill_delta import TileDelta
from lorax_kernels.prefill_gemm import prefill_linear, prefill_linear_silu

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
SMALL = PrefillConfig(block_m=128, block_n=64, block_k=64, parts=2)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_tensors(monkeypatch)


def weight_of(case: LoraCase) -> torch.Tensor:
    return (torch.randn(sum(case.out_slices), case.x.shape[1]) * case.x.shape[1] ** -0.5).to(case.x.dtype)


def delta_of(case: LoraCase) -> TileDelta:
    batch = case.batch()
    assert batch is not None
    work = batch.with_work().work
    assert work is not None
    return TileDelta(lora_triton.shrink(case.x, case.a, work).planes, case.b, work, case.out_slices)


def check(case: LoraCase, config: PrefillConfig = SMALL, bias: torch.Tensor | None = None) -> None:
    """The product, and with two equal slices also SiLU and multiplication."""
    weight, delta = weight_of(case), delta_of(case)
    want = case.x.double() @ weight.double().T + expected_delta(case)
    close(prefill_linear(case.x, weight, bias, config, delta), want if bias is None else want + bias.double())
    if len(set(case.out_slices)) == 1 and len(case.out_slices) == 2:
        close(prefill_linear_silu(case.x, weight, config, delta), silu_mul(want))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want).norm(dim=1) / want.norm(dim=1)
    assert float(error.max()) <= TOLERANCE[got.dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("slices", [(64,), (64, 64), (128, 64, 64)], ids=str)
def test_one_adapter(slices: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make_lora_case(260, (16,), "identical", out_slices=slices, dtype=dtype, base_share=0.0))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_adapters_that_meet_inside_a_tile_and_rows_without_one(dtype: torch.dtype) -> None:
    case = make_lora_case(300, (16, 8, 20), out_slices=(64, 64), dtype=dtype)
    case.token_slots[:] = -1
    for slot, rows in enumerate((slice(3, 100), slice(100, 131), slice(250, 299))):
        case.token_slots[rows] = slot
    check(case)


@pytest.mark.parametrize("ranks", [(1, 3, 12), (96, 256, 1)], ids=str)
def test_any_ranks(ranks: tuple[int, ...]) -> None:
    check(
        make_lora_case(257, ranks, "segments", out_slices=(24, 24), base_share=0.0),
        replace(SMALL, block_n=32),
    )


@pytest.mark.parametrize("slices", [(72, 24, 24), (40, 88), (104,), (8, 16, 32)], ids=str)
def test_slices_that_begin_inside_a_tile(slices: tuple[int, ...]) -> None:
    check(make_lora_case(257, (16, 5), "segments", out_slices=slices, base_share=0.0))


@pytest.mark.parametrize("popularity", ["uniform", "distinct", "none_but_one"])
def test_rows_in_any_order(popularity: str) -> None:
    """Such as decodes before the chunks of a mixed step."""
    check(make_lora_case(257, (8, 11, 3), popularity, out_slices=(24,)), replace(SMALL, block_n=32))


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, block_m=64, block_n=32),
        replace(SMALL, parts=4, group=2),
        replace(SMALL, programs=0, flatten=False),
    ],
    ids=["small tiles", "four parts", "a program a tile"],
)
def test_tiles_make_no_difference(config: PrefillConfig) -> None:
    case = make_lora_case(258, (16, 12), "segments", out_slices=(64, 64), base_share=0.0)
    check(case, config, torch.randn(128))
    weight, delta = weight_of(case), delta_of(case)
    assert torch.equal(
        prefill_linear(case.x, weight, None, config, delta),
        prefill_linear(case.x, weight, None, SMALL, delta),
    )


def test_a_row_without_an_adapter_is_what_it_is_without_adapters() -> None:
    case = make_lora_case(260, (16, 12), "segments", out_slices=(64, 64), base_share=0.5)
    weight, delta = weight_of(case), delta_of(case)
    bare = torch.from_numpy(case.token_slots < 0)
    got, plain = (prefill_linear(case.x, weight, None, SMALL, each) for each in (delta, None))
    assert torch.equal(got[bare], plain[bare])
    assert not (got[~bare] == plain[~bare]).all()


@pytest.mark.parametrize(
    ("config", "slices", "rows"),
    [
        (replace(SMALL, block_m=256), (64, 64), 260),
        (replace(SMALL, parts=1), (64, 64), 260),
        (SMALL, (64, 60), 260),
        (SMALL, (64, 64), 280),
    ],
    ids=["tiles larger than the list's", "in one part", "other columns", "other rows"],
)
def test_what_a_delta_does_not_fit_is_refused(
    config: PrefillConfig, slices: tuple[int, ...], rows: int
) -> None:
    case = make_lora_case(260, (8,), out_slices=(64, 64))
    delta = replace(delta_of(case), out_slices=slices)
    with pytest.raises(ValueError, match=r"a delta"):
        prefill_linear(torch.zeros(rows, 64), weight_of(case), None, config, delta)


@pytest.fixture
def _by_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_uses_triton", lambda tensor: True)
    with configured(monkeypatch, prefill={"delta": True, "block_n": 32, "parts": 2, "most_groups": 5}):
        yield


@pytest.mark.usefixtures("_by_environment")
@pytest.mark.parametrize(
    ("tokens", "ranks", "ours"), [(20, (8,), 0), (257, (8, 8), 3), (257, (8, 88), 0)], ids=str
)
def test_a_site_of_many_rows_is_two_launches(
    tokens: int, ranks: tuple[int, ...], ours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither so in decode, nor where a tile would go through too many pages."""
    expands: list[int] = []
    plain = lora_triton.expand

    def expand(*args: object) -> None:
        expands.append(1)
        plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(lora_triton, "expand", expand)
    monkeypatch.setattr(expand_nodes, "expand", expand)
    case = make_lora_case(
        tokens, ranks, "segments", out_slices=(32, 32), in_features=32, dtype=torch.float16, base_share=0.0
    )
    batch = LoraBatch.build(case.token_slots, case.slot_pages, case.slot_ranks, "cpu")
    assert batch is not None
    batch.with_work()
    weight = weight_of(case)
    site = (weight, None), (case.a, case.b), batch, case.out_slices
    want = case.x.double() @ weight.double().T + expected_delta(case)
    close(dispatch.lora_linear(case.x, *site), want)
    begun, delta = dispatch.begin_lora_linear(case.x, *site)
    assert delta is None
    close(begun, want)
    close(dispatch.lora_linear_silu_mul(case.x, *site), silu_mul(want))
    assert 3 - len(expands) == ours


def test_without_a_table_deltas_are_launches_of_their_own() -> None:
    case = make_lora_case(300, (8,), out_slices=(64, 64), dtype=torch.float16)
    assert prefill_gemm.chosen_with_delta(case.x, weight_of(case), delta_of(case).work, (64, 64)) is None
    assert np.any(case.token_slots >= 0)
