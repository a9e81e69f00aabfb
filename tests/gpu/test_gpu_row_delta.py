"""A product of one row that adds the row's LoRA delta, on a CUDA device: against float64 and against expand, launched
by itself and replayed between norms from a captured graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_settings import configured
from lora_cases import LoraCase, expected_delta, make_lora_case, poison_new_tensors

import lorax_kernels
from lorax_kernels import LoraBatch, WorkBuffer
from lorax_kernels.configs import GemmConfig, LoraConfig
from lorax_kernels.lora_triton import linear, linear_in_product, work_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
WITHIN = LoraConfig(one_row_in_product=True)
PRODUCTS = {
    "plain": GemmConfig(kernel="triton", block_n=8, block_k=512, stages=2),
    "early": GemmConfig(kernel="triton", block_n=4, block_k=4096, stages=1, pdl=True),
    "early, two tiles": GemmConfig(kernel="triton", block_n=16, block_k=512, stages=2, warps=8, pdl=True),
}
SLICES = {"one": (1000,), "three": (768, 128, 128), "three that straddle": (500, 262, 262)}


@pytest.fixture(params=list(PRODUCTS))
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What computes the products; the small kernels start early where they do."""
    config = PRODUCTS[request.param]
    with configured(monkeypatch, gemm=asdict(config), node={"pdl": config.pdl}):
        yield request.param


def base_layer(case: LoraCase, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    columns, width = case.out.shape[1], case.x.shape[1]
    weight = torch.randn(columns, width, device="cuda", generator=generator) / width**0.5
    bias = torch.randn(columns, device="cuda", generator=generator)
    return weight.to(case.x.dtype), bias.to(case.x.dtype)


def check(
    got: torch.Tensor, case: LoraCase, layer: tuple[torch.Tensor, torch.Tensor], batch: LoraBatch
) -> None:
    dtype = got.dtype
    want = torch.nn.functional.linear(case.x.double(), layer[0].double(), layer[1].double())
    want += expected_delta(case)
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()
    twin = linear(case.x, layer, (case.a, case.b), batch, case.out_slices, LoraConfig())
    # Where both round it is the same sums; their order alone may differ.
    assert (got.double() - twin.double()).norm() <= 0.3 * TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("slices", ["one", "three that straddle"])
@pytest.mark.parametrize("rank", [1, 3, 16, 40, 256])
def test_it_is_the_product_and_then_expand(
    rank: int, slices: str, dtype: torch.dtype, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_lora_case(
        1, (8, rank), "identical", seed=rank, in_features=1024, out_slices=SLICES[slices], dtype=dtype,
        device="cuda", base_share=0.0,
    )  # fmt: skip
    batch = case.batch("cuda")
    assert batch is not None
    layer = base_layer(case)
    if not PRODUCTS[product].pdl:
        poison_new_tensors(monkeypatch)
    got = linear_in_product(case.x, layer, (case.a, case.b), work_of(batch), case.out_slices, WITHIN)
    assert got is not None
    check(got, case, layer, batch)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_one_graph_runs_every_adapter_and_none(dtype: torch.dtype, product: str) -> None:
    """Norm, shrink and product, several times over without anything between, so that launches that begin too soon
    would show."""
    width, layers = 1024, 8
    ranks = (8, 30, 16, 1, 96)
    case = make_lora_case(1, ranks, in_features=width, out_slices=SLICES["three"], dtype=dtype, device="cuda")
    buffer = WorkBuffer(1, max_pages=12, device="cuda")
    batch = LoraBatch.build(case.token_slots, case.slot_pages, case.slot_ranks, "cuda", buffer)
    assert batch is not None
    bases = [base_layer(case, seed) for seed in range(layers)]
    norm = torch.ones(width, dtype=dtype, device="cuda")
    start = torch.randn(1, width, device="cuda").to(dtype)

    def step() -> list[tuple[torch.Tensor, torch.Tensor]]:
        hidden, residual, made = start, start, []
        for layer in bases:
            x, residual = lorax_kernels.rms_norm(hidden, norm, 1e-5, residual)
            whole = linear_in_product(x, layer, (case.a, case.b), work_of(batch), case.out_slices, WITHIN)
            assert whole is not None
            hidden = whole
            made.append((x, hidden))
        return made

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    for seed, slot in enumerate((0, 1, -1, 4, 3, 2, -1, 4)):
        slots = np.array([slot], np.int32)
        batch = LoraBatch.build(slots, case.slot_pages, case.slot_ranks, "cuda", buffer)
        assert batch is not None
        for tensors in made:
            for tensor in tensors:
                tensor.fill_(float("nan"))
        start.copy_(torch.randn(1, width, device="cuda") * (seed + 1))
        graph.replay()
        for (x, out), layer in zip(made, bases, strict=True):
            check(out, replace(case, x=x, token_slots=slots), layer, batch)
