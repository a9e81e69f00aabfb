"""Products of 2 to 32 rows that add the rows' LoRA deltas, on a CUDA device: against float64, launched by themselves
and replayed from a captured graph for batches of every kind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from lora_cases import LoraCase, draw_slots, expected_delta, make_lora_case, poison_new_tensors

import lorax_kernels
from lorax_kernels import LoraBatch, WorkBuffer, tuning
from lorax_kernels.expand_nodes import begin_linear, linear_silu
from lorax_kernels.lora_triton import linear
from lorax_kernels.tuning import GemmConfig, LoraConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
WITHIN = LoraConfig(rows_in_product=True)
PRODUCTS = {
    "plain": GemmConfig(kernel="triton", block_n=32, block_k=128, stages=3),
    "early": GemmConfig(kernel="triton", block_n=128, block_k=128, stages=3, warps=8, pdl=True),
    "swapped": GemmConfig(kernel="triton", block_n=64, block_k=128, stages=3, pdl=True, swap=True),
    "split": GemmConfig(kernel="triton", block_n=64, block_k=64, stages=3, split_k=4, exact=True, pdl=True),
}
SLICES = {"one": (1000,), "three": (768, 128, 128), "three that straddle": (504, 264, 264)}


@pytest.fixture(params=list(PRODUCTS))
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[GemmConfig]:
    """What computes the products; the small kernels start early where they do."""
    config = PRODUCTS[request.param]
    monkeypatch.setenv("LORAX_GEMM_CONFIG", json.dumps(asdict(config)))
    monkeypatch.setenv("LORAX_NODE_CONFIG", json.dumps({"pdl": config.pdl}))
    tuning.forget_configs()
    yield config
    monkeypatch.undo()
    tuning.forget_configs()


def base_weight(case: LoraCase, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    columns, width = case.out.shape[1], case.x.shape[1]
    return (torch.randn(columns, width, device="cuda", generator=generator) / width**0.5).to(case.x.dtype)


def wanted(case: LoraCase, weight: torch.Tensor) -> torch.Tensor:
    return case.x.double() @ weight.double().T + expected_delta(case)


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    errors = (got.double() - want).norm(dim=1) / want.norm(dim=1)
    assert float(errors.max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("slices", list(SLICES))
@pytest.mark.parametrize(
    ("rows", "ranks", "popularity"),
    [
        (2, (16,), "identical"),
        (32, (16,), "identical"),
        (32, (16,) * 32, "distinct"),
        (17, (1, 3, 12, 96, 256), "zipf"),
    ],
    ids=["two rows", "one adapter", "all distinct", "ranks from 1 to 256"],
)
def test_the_product_adds_every_rows_delta(
    rows: int,
    ranks: tuple[int, ...],
    popularity: str,
    slices: str,
    dtype: torch.dtype,
    product: GemmConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_lora_case(
        rows, ranks, popularity, seed=rows, in_features=1024, out_slices=SLICES[slices], dtype=dtype, device="cuda",
        base_share=0.0,
    )  # fmt: skip
    batch, weight = case.batch("cuda"), base_weight(case)
    assert batch is not None
    if not product.pdl:
        poison_new_tensors(monkeypatch)
    got = linear(case.x, (weight, None), (case.a, case.b), batch, case.out_slices, WITHIN)
    assert_close(got, wanted(case, weight), dtype)
    planes, delta = begin_linear(case.x, (weight, None), (case.a, case.b), batch, case.out_slices, WITHIN)
    assert delta is None
    assert planes.dim() == (3 if product.split_k > 1 else 2)
    torch.testing.assert_close(planes.sum(0).to(dtype) if planes.dim() == 3 else planes, got)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", [5, 32])
def test_silu_and_multiplication_come_after_the_delta(
    rows: int, dtype: torch.dtype, product: GemmConfig
) -> None:
    case = make_lora_case(
        rows,
        (16, 8, 40),
        "uniform",
        seed=4,
        in_features=1024,
        out_slices=(768, 768),
        dtype=dtype,
        device="cuda",
    )
    batch, weight = case.batch("cuda"), base_weight(case)
    assert batch is not None
    got = linear_silu(case.x, (weight, None), (case.a, case.b), batch, case.out_slices, WITHIN)
    gate, up = wanted(case, weight).chunk(2, 1)
    assert_close(got, torch.nn.functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("slices", ["one", "three"])
def test_one_graph_runs_every_batch(slices: str, product: GemmConfig) -> None:
    """Norm, shrink and product, several times over without anything between, so that launches that begin too soon
    would show."""
    rows, width, layers, dtype = 24, 1024, 6, torch.bfloat16
    ranks = (8, 30, 16, 1, 96, *(16,) * 20)
    case = make_lora_case(
        rows, ranks, in_features=width, out_slices=SLICES[slices], dtype=dtype, device="cuda"
    )
    buffer = WorkBuffer(rows, max_pages=12, device="cuda")

    def batch_of(slots: np.ndarray) -> LoraBatch:
        made = LoraBatch.build(slots, case.slot_pages, case.slot_ranks, "cuda", buffer)
        assert made is not None
        return made

    batch = batch_of(case.token_slots)
    bases = [base_weight(case, seed) for seed in range(layers)]
    norm = torch.ones(width, dtype=dtype, device="cuda")
    start = torch.randn(rows, width, device="cuda").to(dtype)

    def step() -> list[tuple[torch.Tensor, torch.Tensor]]:
        # Each layer's x comes from the norm before, and does not depend on products, whose widths differ.
        x, made = start, []
        for weight in bases:
            x, _ = lorax_kernels.rms_norm(x, norm, 1e-5)
            out, _ = begin_linear(x, (weight, None), (case.a, case.b), batch, case.out_slices, WITHIN)
            made.append((x, out))
        return made

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    rng = np.random.default_rng(0)
    for seed, kind in enumerate(("uniform", "identical", "distinct", "none_but_one", "zipf", "identical")):
        slots = draw_slots(rng, rows, len(ranks), kind, 0.2 if seed % 2 else 0.0)
        batch_of(slots)
        for tensors in made:
            for tensor in tensors:
                tensor.fill_(float("nan"))
        start.copy_(torch.randn(rows, width, device="cuda") * (seed + 1))
        graph.replay()
        for (x, out), weight in zip(made, bases, strict=True):
            got = out.sum(0).to(dtype) if out.dim() == 3 else out
            assert_close(got, wanted(replace(case, x=x, token_slots=slots), weight), dtype)
