"""Products of few rows on a CUDA device against float64, launched one by one and replayed from a captured graph."""

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
from lorax_kernels import tuning
from lorax_kernels.configs import GemmConfig
from lorax_kernels.skinny_gemm import skinny_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
EARLY = GemmConfig(kernel="triton", block_n=32, block_k=128, stages=4, ahead=4, pdl=True)
CONFIGS = {
    "plain": replace(EARLY, stages=2, pdl=False),
    "early": EARLY,
    "split": replace(EARLY, block_n=64, split_k=4),
    "long": replace(EARLY, block_n=16, block_k=512, stages=2, ahead=2),
    "swapped": replace(EARLY, block_n=64, swap=True),
    "swapped split": replace(EARLY, block_n=128, block_k=64, split_k=8, swap=True),
    "exact": replace(EARLY, block_n=64, block_k=64, split_k=6, exact=True),
}


@pytest.fixture
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result starts as NaN, so that one that is read before it is written shows. Not for what is launched early:
    the launches that write NaN would come in between."""
    plain = torch.empty

    def poisoned(*args: object, **options: object) -> torch.Tensor:
        made: torch.Tensor = plain(*args, **options)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def _early_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with configured(monkeypatch, node={"pdl": True}):
        yield


def make(
    rows: int, columns: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows)
    shapes = ((rows, width), (columns, width), (columns,))
    x, weight, bias = (torch.randn(*s, device="cuda", generator=generator).to(dtype) for s in shapes)
    return x, weight * width**-0.5, bias


def check(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.dtype == x.dtype
    assert (got.double() - want).norm() <= TOLERANCE[x.dtype] * want.norm()


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """To the bit, but for float32, where the compiler may fuse other additions with products."""
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(got, want)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 32])
@pytest.mark.parametrize(("columns", "width"), [(96, 576), (1000, 4096), (4096, 14336)])
def test_few_rows_in_bfloat16(columns: int, width: int, rows: int, config: str) -> None:
    x, weight, _ = make(rows, columns, width, torch.bfloat16)
    check(skinny_linear(x, weight, None, CONFIGS[config]), x, weight)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 32])
def test_a_bias_in_every_type(rows: int, dtype: torch.dtype, config: str) -> None:
    x, weight, bias = make(rows, 1000, 576, dtype)
    check(skinny_linear(x, weight, bias, CONFIGS[config]), x, weight, bias)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize(("few", "many"), [(2, 16), (17, 32)])
def test_a_row_does_not_depend_on_the_others(few: int, many: int, config: str) -> None:
    x, weight, _ = make(many, 1000, 4096, torch.bfloat16)
    whole = skinny_linear(x, weight, None, CONFIGS[config])
    other = torch.full_like(x, 7.0)
    other[:few] = x[many - few :]
    assert torch.equal(skinny_linear(other[:few], weight, None, CONFIGS[config]), whole[many - few :])
    assert torch.equal(skinny_linear(other, weight, None, CONFIGS[config])[:few], whole[many - few :])


@pytest.mark.usefixtures("_early_nodes")
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("rows", [1, 16, 32])
def test_replays_between_norms_follow_their_input(rows: int, config: str) -> None:
    width, inner = 1024, 2048
    layers = [
        (make(1, inner, width, torch.bfloat16)[1], make(2, width, inner // 2, torch.bfloat16)[1])
        for _ in range(6)
    ]
    norm = torch.ones(width, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")

    def step(linear) -> torch.Tensor:  # type: ignore[no-untyped-def]
        hidden, residual = x, x
        for up, down in layers:
            y, residual = lorax_kernels.rms_norm(hidden, norm, 1e-5, residual)
            hidden = linear(lorax_kernels.silu_mul(linear(y, up)), down)
        return lorax_kernels.rms_norm(hidden, norm, 1e-5, residual)[0]

    def ours(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return skinny_linear(a, weight, None, CONFIGS[config])

    def one_by_one(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return skinny_linear(a, weight, None, replace(CONFIGS[config], pdl=False))

    step(ours)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(ours)
    for seed in range(8):
        x.copy_(make(rows, 1, width, torch.bfloat16)[0] * (seed + 1) - seed)
        graph.replay()
        replayed = got.clone()
        assert torch.equal(replayed, step(one_by_one))
        want = step(F.linear)
        assert (replayed.double() - want.double()).norm() <= 5e-2 * want.double().norm()


@pytest.mark.parametrize("rows", [1, 32, 33])
def test_the_environment_chooses_the_kernel(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = make(rows, 96, 576, torch.bfloat16)
    monkeypatch.setenv("LORAX_GEMM_CONFIG", '{"kernel": "triton", "block_n": 16, "stages": 2}')
    tuning.forget_configs()
    got = lorax_kernels.linear(x, weight, bias)
    check(got, x, weight, bias)
    chosen = tuning.gemm_config(rows, 96, 576, 0)
    monkeypatch.undo()
    tuning.forget_configs()
    assert rows > 32 or torch.equal(got, skinny_linear(x, weight, bias, chosen))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize(("inner", "width"), [(8192, 2048), (1000, 4096)])
def test_silu_in_the_product_is_silu_after_it(
    inner: int, width: int, rows: int, name: str, dtype: torch.dtype
) -> None:
    x, weight, bias = make(rows, 2 * inner, width, dtype)
    config = replace(CONFIGS[name], split_k=1)
    for given in (None, bias):
        apart = lorax_kernels.silu_mul(skinny_linear(x, weight, given, config))
        assert_same(skinny_linear(x, weight, given, CONFIGS[name], silu=True), apart)


@pytest.mark.usefixtures("_early_nodes")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", [2, 24, 32])
def test_a_norm_sums_the_planes_of_a_split_product(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched early, one after the other, again and again in a graph."""
    table = '{"kernel": "triton", "block_n": 128, "block_k": 128, "warps": 8, "split_k": 8, "pdl": true}'
    monkeypatch.setenv("LORAX_GEMM_CONFIG", table)
    tuning.forget_configs()
    x, weight, scale = make(rows, 2048, 8192, dtype)
    before = torch.randn(rows, 2048, device="cuda").to(dtype)

    def fused() -> tuple[torch.Tensor, torch.Tensor]:
        planes = lorax_kernels.begin_linear(x, weight)
        assert planes.dim() == 3
        return lorax_kernels.rms_norm(before, scale, 1e-5, planes)

    want = lorax_kernels.rms_norm(before, scale, 1e-5, lorax_kernels.linear(x, weight))
    fused()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fused()
    for _ in range(3):
        graph.replay()
        # The sum itself is the same; the norm has other warps then, whose squares are added in another order.
        assert_same(got[1], want[1])
        torch.testing.assert_close(got[0], want[0])
