"""LoRA kernels on a CUDA device against float64, launched one by one and replayed from a captured graph."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from lora_cases import LoraCase, draw_slots, expected_delta, make_lora_case

from lorax_kernels import LoraBatch, WorkBuffer, add_lora, lora_linear, lora_triton
from lorax_kernels.configs import DEFAULT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
POPULARITIES = ("distinct", "uniform", "zipf", "identical", "none_but_one", "segments")
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
CONFIGS = {
    "tuned": None,
    "default": DEFAULT,
    "dependent launch": replace(DEFAULT, pdl=True, block_k=256, block_n=128),
    "side stream": replace(
        DEFAULT, overlap="shrink_first", split_shift=4, block_n=256, row_n=1024, expand_warps=4
    ),
}


def check(case: LoraCase, got: torch.Tensor, dtype: torch.dtype) -> None:
    want = expected_delta(case)
    error = (got.double() - case.out.double() - want).norm()
    assert error <= TOLERANCE[dtype] * want.norm() + TOLERANCE[dtype] * 0.5 * case.out.double().norm()
    without = torch.from_numpy(case.token_slots < 0).to(got.device)
    assert torch.equal(got[without], case.out[without])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every intermediate starts as NaN, so that one that is read before it is written shows."""
    plain = torch.empty

    def poisoned(*args: object, **options: object) -> torch.Tensor:
        made: torch.Tensor = plain(*args, **options)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 200, 400])
def test_add_lora_in_bfloat16(tokens: int, popularity: str, config: str) -> None:
    case = make_lora_case(
        tokens,
        (8, 16, 64, 1, 12),
        popularity,
        seed=tokens,
        in_features=1024,
        out_slices=(512, 128, 128),
        dtype=torch.bfloat16,
        device="cuda",
    )
    batch = case.batch("cuda")
    got = case.out.clone()
    if batch is not None:
        lora_triton.add_lora(case.x, case.a, case.b, batch, got, case.out_slices, CONFIGS[config])
    check(case, got, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("ranks", [(1,), (3, 8), (96, 256, 5), (24, 40)], ids=str)
@pytest.mark.parametrize("tokens", [2, 33, 300])
def test_any_rank_and_dtype(tokens: int, ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_lora_case(tokens, ranks, "uniform", seed=len(ranks), in_features=576, out_slices=(1536, 1536),
                          dtype=dtype, device="cuda")  # fmt: skip
    got = case.out.clone()
    batch = case.batch("cuda")
    assert batch is not None
    add_lora(case.x, case.a, case.b, batch, got, case.out_slices)
    check(case, got, dtype)


@pytest.mark.parametrize("overlap", ["none", "shrink_first", "product_first"])
def test_the_fused_linear_layer_equals_product_plus_delta(overlap: str) -> None:
    case = make_lora_case(40, (8, 16), "uniform", in_features=512, out_slices=(512,), dtype=torch.bfloat16,
                          device="cuda")  # fmt: skip
    weight = torch.randn(512, 512, dtype=torch.bfloat16, device="cuda") / 23
    bias = torch.randn(512, dtype=torch.bfloat16, device="cuda")
    batch = case.batch("cuda")
    assert batch is not None
    want = torch.nn.functional.linear(case.x, weight, bias)
    add_lora(case.x, case.a, case.b, batch, want, (512,))
    got = lora_triton.linear(
        case.x, (weight, bias), (case.a, case.b), batch, (512,), replace(DEFAULT, overlap=overlap)
    )
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    assert lora_linear(case.x, (weight, bias), (case.a, case.b), batch, (512,)).shape == want.shape


@pytest.mark.parametrize("config", list(CONFIGS))
def test_one_graph_runs_every_mix_of_adapters(config: str) -> None:
    tokens = 48
    case = make_lora_case(tokens, (8, 30, 16, 1, 64), "uniform", seed=2, in_features=2048, out_slices=(1024, 256, 256),
                          dtype=torch.bfloat16, device="cuda")  # fmt: skip
    buffer = WorkBuffer(tokens, max_pages=8, device="cuda")

    def build(slots: np.ndarray) -> LoraBatch:
        batch = LoraBatch.build(slots, case.slot_pages, case.slot_ranks, "cuda", buffer)
        assert batch is not None
        return batch

    batch = build(case.token_slots)
    static = case.out.clone()
    weight = torch.zeros(case.out.shape[1], 2048, dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        assert batch.work is not None
        if CONFIGS[config] is not None and CONFIGS[config].overlap != "none":
            static.add_(lora_triton.linear(
                case.x, (weight, None), (case.a, case.b), batch, case.out_slices, CONFIGS[config]
            ))  # fmt: skip
        else:
            lora_triton.add_lora(case.x, case.a, case.b, batch, static, case.out_slices, CONFIGS[config])

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    rng = np.random.default_rng(0)
    for popularity, base_share in (("distinct", 0.0), ("identical", 0.5), ("uniform", 1.0), ("zipf", 0.3)):
        case.token_slots = draw_slots(rng, tokens, 5, popularity, base_share)
        build(case.token_slots)
        static.copy_(case.out)
        graph.replay()
        check(case, static, torch.bfloat16)
