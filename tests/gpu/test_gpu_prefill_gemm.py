"""Products of many rows on a CUDA device against float64, alone and with SiLU and multiplication on the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_settings import configured

import lorax_kernels
from lorax_kernels import fused_triton
from lorax_kernels.configs import PrefillConfig
from lorax_kernels.fused_reference import silu_mul
from lorax_kernels.prefill_gemm import prefill_linear, prefill_linear_silu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
        reason="needs a CUDA device with TMA",
    ),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
WIDE = PrefillConfig(kernel="triton")
CONFIGS = {
    "wide": WIDE,
    "two parts": replace(WIDE, stages=4, parts=2, group=3),
    "a program a tile": replace(WIDE, flatten=False, programs=0),
    "small": replace(WIDE, block_n=128, warps=4, parts=2, programs=2),
}
SILU_CONFIGS = {
    "wide": replace(WIDE, block_n=128, stages=4),
    "a program a tile": replace(WIDE, block_n=128, flatten=False, programs=0),
    "small": replace(WIDE, block_n=64, warps=4, programs=2),
}


@pytest.fixture
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result starts as NaN, so that a part that is not written shows."""
    plain = torch.empty

    def poisoned(*args: object, **options: object) -> torch.Tensor:
        made: torch.Tensor = plain(*args, **options)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def make(rows: int, columns: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, width, device="cuda", generator=generator).to(dtype)
    return x, (torch.randn(columns, width, device="cuda", generator=generator) * width**-0.5).to(dtype)


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.double() - want).norm() <= TOLERANCE[got.dtype] * want.norm()


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(2048, 4096, 1024), (300, 6144, 4096), (1, 72, 584), (1111, 1000, 1096)]
)
def test_many_rows(rows: int, columns: int, width: int, dtype: torch.dtype, config: str) -> None:
    x, weight = make(rows, columns, width, dtype)
    check(prefill_linear(x, weight, None, CONFIGS[config]), x.double() @ weight.double().T)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("config", list(CONFIGS))
def test_a_bias_and_rows_that_lie_apart(config: str) -> None:
    x, weight = make(500, 1000, 1168, torch.bfloat16)
    apart, half, bias = x[:, 584:], weight[:, 584:].contiguous(), weight[:, 0].contiguous()
    want = F.linear(apart.double(), half.double(), bias.double())
    check(prefill_linear(apart, half, bias, CONFIGS[config]), want)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("config", list(SILU_CONFIGS))
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("rows", "inner", "width"), [(2048, 3584, 1024), (1, 72, 584), (1111, 1000, 1096)])
def test_silu_and_multiplication_are_done_on_the_way(
    rows: int, inner: int, width: int, dtype: torch.dtype, config: str
) -> None:
    x, weight = make(rows, 2 * inner, width, dtype)
    got = prefill_linear_silu(x, weight, SILU_CONFIGS[config])
    check(got, silu_mul(x.double() @ weight.double().T))
    # Sums go the same way in every configuration, and both ways round in the same places.
    assert torch.equal(got, fused_triton.silu_mul(prefill_linear(x, weight, None, WIDE)))


@pytest.mark.parametrize("config", list(CONFIGS))
def test_a_row_depends_neither_on_the_others_nor_on_the_tiles(config: str) -> None:
    x, weight = make(700, 1000, 1024, torch.bfloat16)
    whole = prefill_linear(x, weight, None, WIDE)
    assert torch.equal(prefill_linear(x, weight, None, CONFIGS[config]), whole)
    assert torch.equal(prefill_linear(x[400:], weight, None, CONFIGS[config]), whole[400:])


@pytest.mark.parametrize("config", list(SILU_CONFIGS))
def test_a_graph_follows_its_input(config: str) -> None:
    x, up = make(640, 2048, 1024, torch.bfloat16)
    _, down = make(641, 1024, 1024, torch.bfloat16)

    def step() -> torch.Tensor:
        return prefill_linear(prefill_linear_silu(x, up, SILU_CONFIGS[config]), down, None, WIDE)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for seed in range(4):
        x.copy_(make(640, 8, 1024, torch.bfloat16)[0] * (seed + 1))
        graph.replay()
        replayed = got.clone()
        assert torch.equal(replayed, step())
        check(replayed, silu_mul(x.double() @ up.double().T) @ down.double().T)


@pytest.fixture
def _by_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with configured(monkeypatch, prefill={"kernel": "triton"}):
        yield


@pytest.mark.usefixtures("_by_environment")
@pytest.mark.parametrize("rows", [40, 255, 256, 4096])
def test_the_environment_chooses_the_kernel(rows: int) -> None:
    x, weight = make(rows, 2048, 576, torch.bfloat16)
    want = x.double() @ weight.double().T
    got, active = lorax_kernels.linear(x, weight), lorax_kernels.linear_silu_mul(x, weight)
    check(got, want)
    check(active, silu_mul(want))
    if rows >= 256:
        assert torch.equal(got, prefill_linear(x, weight, None, WIDE))
        assert torch.equal(active, prefill_linear_silu(x, weight, SILU_CONFIGS["wide"]))
