"""Products of many rows that add the adapters' deltas themselves, on a CUDA device against float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_settings import configured
from lora_cases import LoraCase, expected_delta, make_lora_case, poison_new_tensors

import lorax_kernels
from lorax_kernels import lora_triton
from lorax_kernels.configs import DEFAULT_PREFILL_DELTA, DEFAULT_PREFILL_SILU_DELTA
from lorax_kernels.fused_reference import silu_mul
from lorax_kernels.prefill_delta import TileDelta
from lorax_kernels.prefill_gemm import prefill_linear, prefill_linear_silu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
        reason="needs a CUDA device with TMA",
    ),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
WIDE, SILU = DEFAULT_PREFILL_DELTA, DEFAULT_PREFILL_SILU_DELTA
CONFIGS = {
    "wide": WIDE,
    "three reads, two parts": replace(WIDE, stages=3, parts=2, group=3),
    "a program a tile": replace(WIDE, flatten=False, programs=0),
    "small": replace(WIDE, block_n=128, stages=3, warps=4, parts=2, programs=2),
}
SILU_CONFIGS = {
    "wide": SILU,
    "three reads": replace(SILU, stages=3, parts=1),
    "a program a tile": replace(SILU, flatten=False, programs=0),
    "small": replace(SILU, block_n=64, stages=3, warps=4, programs=2),
}
# Each is compiled for itself: the second type with one of them.
WAYS, SILU_WAYS = (
    [(name, torch.bfloat16) for name in configs] + [("wide", torch.float16)]
    for configs in (CONFIGS, SILU_CONFIGS)
)
MIXED = (16, 1, 3, 12, 96, 256, 8)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_tensors(monkeypatch)


def case_of(
    tokens: int,
    ranks: tuple[int, ...],
    popularity: str,
    slices: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
) -> LoraCase:
    return make_lora_case(
        tokens, ranks, popularity, in_features=width, out_slices=slices, dtype=dtype, device="cuda", base_share=0.02
    )  # fmt: skip


def weight_of(case: LoraCase) -> torch.Tensor:
    columns, width = sum(case.out_slices), case.x.shape[1]
    return (torch.randn(columns, width, device="cuda") * width**-0.5).to(case.x.dtype)


def delta_of(case: LoraCase) -> TileDelta:
    batch = case.batch("cuda")
    assert batch is not None
    work = lora_triton.work_of(batch)
    return TileDelta(lora_triton.shrink(case.x, case.a, work).planes, case.b, work, case.out_slices)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want).norm(dim=1) / want.norm(dim=1)
    assert float(error.max()) <= TOLERANCE[got.dtype]


@pytest.mark.parametrize(("config", "dtype"), WAYS, ids=str)
@pytest.mark.parametrize(
    ("slices", "width"), [((4096, 1024, 1024), 4096), ((1000, 200, 200), 584)], ids=["8B", "odd"]
)
def test_products_with_deltas(slices: tuple[int, ...], width: int, dtype: torch.dtype, config: str) -> None:
    for tokens, ranks, popularity in ((1100, (16,), "identical"), (700, MIXED, "segments")):
        case = case_of(tokens, ranks, popularity, slices, width, dtype)
        weight = weight_of(case)
        bias = torch.randn(sum(slices), device="cuda").to(dtype)
        got = prefill_linear(case.x, weight, bias, CONFIGS[config], delta_of(case))
        close(got, case.x.double() @ weight.double().T + bias.double() + expected_delta(case))


@pytest.mark.parametrize(("config", "dtype"), SILU_WAYS, ids=str)
@pytest.mark.parametrize(("inner", "width"), [(3584, 4096), (1000, 584)])
def test_silu_and_multiplication_after_deltas(
    inner: int, width: int, dtype: torch.dtype, config: str
) -> None:
    for tokens, ranks, popularity in ((1100, (16,), "identical"), (700, MIXED, "segments")):
        case = case_of(tokens, ranks, popularity, (inner, inner), width, dtype)
        weight = weight_of(case)
        got = prefill_linear_silu(case.x, weight, SILU_CONFIGS[config], delta_of(case))
        close(got, silu_mul(case.x.double() @ weight.double().T + expected_delta(case)))


@pytest.mark.parametrize("popularity", ["distinct", "none_but_one"])
def test_rows_in_any_order(popularity: str) -> None:
    case = case_of(300, (16, 24, 3, 8), popularity, (512, 512), 1024, torch.bfloat16)
    weight = weight_of(case)
    want = case.x.double() @ weight.double().T + expected_delta(case)
    close(prefill_linear(case.x, weight, None, WIDE, delta_of(case)), want)
    close(prefill_linear_silu(case.x, weight, SILU, delta_of(case)), silu_mul(want))


def test_a_row_without_an_adapter_is_what_it_is_without_adapters() -> None:
    case = case_of(900, (16, 12), "segments", (2048, 2048), 4096, torch.bfloat16)
    case.token_slots[200:400] = -1
    weight, delta = weight_of(case), delta_of(case)
    bare = torch.from_numpy(case.token_slots < 0).cuda()
    for got, plain in (
        [prefill_linear(case.x, weight, None, WIDE, each) for each in (delta, None)],
        [prefill_linear_silu(case.x, weight, SILU, each) for each in (delta, None)],
    ):
        assert torch.equal(got[bare], plain[bare])


@pytest.fixture
def _by_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with configured(monkeypatch, prefill={"delta": True}):
        yield


@pytest.mark.usefixtures("_by_environment")
@pytest.mark.parametrize("tokens", [40, 256, 257, 2048])
def test_the_environment_lets_products_add_deltas(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(tokens, (16, 8), "segments", (1024, 1024), 1024, torch.bfloat16)
    weight, batch = weight_of(case), case.batch("cuda")
    assert batch is not None
    if tokens > 256:
        monkeypatch.setattr(lora_triton, "expand", None)
    want = case.x.double() @ weight.double().T + expected_delta(case)
    site = (weight, None), (case.a, case.b), batch, case.out_slices
    close(lorax_kernels.lora_linear(case.x, *site), want)
    close(lorax_kernels.lora_linear_silu_mul(case.x, *site), silu_mul(want))
