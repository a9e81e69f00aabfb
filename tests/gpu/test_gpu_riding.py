"""Shrink that rides in the node before the base layer, on a CUDA device: against float64, launched one by one and in a
captured graph with the base layer's product between shrink and expand; and a whole model's greedy tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from lora_cases import draw_slots
from model_driver import ModelDriver
from riding_cases import EPS, NODES, RidingAttentionCase, make_riding_case, poison_new_tensors

from lorax_kernels import LoraBatch, WorkBuffer, lora_triton, riding, tuning
from lorax_kernels.tuning import DEFAULT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
FUSED = replace(DEFAULT, shrink="fused")
CONFIGS = {
    "default": FUSED,
    "flat": replace(FUSED, expand_flat=True, ride_block_k=512, ride_stages=1, ride_warps=4),
    "dependent launch": replace(FUSED, pdl=True, expand_flat=True, block_n=256, expand_warps=4),
    "dependent launch, tiles by rows": replace(FUSED, pdl=True, ride_split_shift=3, ride_target_log2=8),
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_new_tensors(monkeypatch)
    yield
    tuning.forget_configs()


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("popularity", ["distinct", "zipf", "identical", "none_but_one"])
@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 200])
def test_bfloat16(tokens: int, popularity: str, node: str, config: str) -> None:
    case = make_riding_case(
        node, tokens, (8, 16, 64, 1, 12), popularity, seed=tokens, in_features=1024, out_slices=(512, 128, 128),
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    batch = case.lora.batch("cuda")
    if batch is None:
        return
    made, got = case.run(batch, CONFIGS[config])
    for one, other in zip(made, case.plain(), strict=True):
        assert torch.equal(one, other)
    case.check(got, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("ranks", [(1,), (3, 8), (96, 256, 5)], ids=str)
@pytest.mark.parametrize("tokens", [2, 33])
def test_any_rank_and_dtype(tokens: int, ranks: tuple[int, ...], node: str, dtype: torch.dtype) -> None:
    size = 8000.0 if dtype == torch.float16 and node != "silu" else 1.0
    case = make_riding_case(
        node, tokens, ranks, "uniform", size, seed=len(ranks), in_features=576, out_slices=(1536, 1536), dtype=dtype,
        device="cuda", base_share=0.0,
    )  # fmt: skip
    batch = case.lora.batch("cuda")
    assert batch is not None
    _, got = case.run(batch, FUSED)
    case.check(got, TOLERANCE[dtype])


@pytest.mark.parametrize("pdl", [False, True], ids=["plain launch", "dependent launch"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("heads", "dim"), [((32, 8), 128), ((8, 2), 64), ((4, 4), 32), ((8, 1), 80), ((16, 16), 64)], ids=str
)
@pytest.mark.parametrize("contexts", [(5,), (1500, 3, 700, 40), (100,) * 40], ids=len)
def test_attention(
    contexts: tuple[int, ...],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    pdl: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(tuning.OVERRIDE.format(kind="NODE"), json.dumps({"pdl": pdl}))
    tuning.forget_configs()
    case = RidingAttentionCase.make(
        contexts, (12, 1, 96), "uniform", heads, dim, dtype=dtype, device="cuda", base_share=0.0
    )
    case.check(replace(FUSED, ride_attention=True, pdl=pdl), TOLERANCE[dtype])


@pytest.mark.parametrize("node", NODES)
def test_a_row_is_the_same_whatever_its_batch_mates_hold(node: str) -> None:
    case = make_riding_case(node, 6, (12, 8), "identical", base_share=0.0, in_features=512, dtype=torch.bfloat16,
                            device="cuda")  # fmt: skip
    batch = case.lora.batch("cuda")
    assert batch is not None
    _, want = case.run(batch, FUSED)
    case.source[[0, 1, 2, 4, 5]] = float("nan")
    _, got = case.run(batch, FUSED)
    assert torch.equal(got[3], want[3])


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("node", NODES)
def test_one_graph_runs_every_mix_of_adapters(node: str, config: str) -> None:
    """Node, base layer's product and expand, several times over, so that launches that overlap would show."""
    tokens, repeats = 48, 6
    case = make_riding_case(node, tokens, (8, 30, 16, 1, 64), "uniform", seed=2, in_features=2048,
                            out_slices=(1024, 256, 256), dtype=torch.bfloat16, device="cuda")  # fmt: skip
    lora = case.lora
    buffer = WorkBuffer(tokens, max_pages=8, device="cuda")
    slots = lora.token_slots
    batch = LoraBatch.build(slots, lora.slot_pages, lora.slot_ranks, "cuda", buffer)
    assert batch is not None
    # The product adds nothing to the base output, whatever the node gave.
    weight = torch.zeros(lora.out.shape[1], 2048, dtype=torch.bfloat16, device="cuda")
    outputs = [torch.empty_like(lora.out) for _ in range(repeats)]

    def once(out: torch.Tensor) -> None:
        if node == "silu":
            y, h = riding.silu_mul_shrink(case.source, lora.a, batch, CONFIGS[config])
        else:
            y, _, h = riding.rms_norm_shrink(
                case.source, (case.weight, EPS), case.residual, lora.a, batch, CONFIGS[config]
            )
        assert h is not None
        made = torch.addmm(lora.out, y, weight.t())
        lora_triton.expand(h, lora.b, lora_triton.work_of(batch), made, lora.out_slices)
        out.copy_(made)

    once(outputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outputs:
            once(out)
    rng = np.random.default_rng(0)
    for popularity, base_share in (("distinct", 0.0), ("identical", 0.5), ("uniform", 1.0), ("zipf", 0.3)):
        lora.token_slots = draw_slots(rng, tokens, 5, popularity, base_share)
        LoraBatch.build(lora.token_slots, lora.slot_pages, lora.slot_ranks, "cuda", buffer)
        for out in outputs:
            out.fill_(float("nan"))
        graph.replay()
        for out in outputs:
            case.check(out, TOLERANCE[torch.bfloat16])


@pytest.fixture(params=[False, True], ids=["plain launches", "dependent launches"])
def riding_everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {
        "shrink": "fused",
        "pdl": request.param,
        "expand_flat": request.param,
        "ride_attention": request.param,
    }
    monkeypatch.setenv(tuning.OVERRIDE.format(kind="LORA"), json.dumps(fields))
    monkeypatch.setenv(tuning.OVERRIDE.format(kind="NODE"), json.dumps({"pdl": request.param}))
    tuning.forget_configs()


@pytest.mark.usefixtures("riding_everywhere")
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_model_draws_the_tokens_that_the_cpu_draws(
    graphs: bool, tiny_model_path: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    path = tiny_model_path("llama")
    folders = [
        tiny_adapter(path, seed=0, rank=1, targets=("q_proj",)),
        tiny_adapter(path, seed=1, rank=12, targets=MODULES),
        tiny_adapter(path, seed=2, rank=64, targets=(*MODULES, "lm_head")),
    ]
    drawn = []
    for options in ({"device": "cpu"}, {"device": "cuda", "cuda_graphs": graphs}):
        driver = ModelDriver(path, dtype="float32", adapter_pages=64, **options)
        slots = [*(driver.add_adapter(folder) for folder in folders), -1]
        for count in (1, 5, 11):
            sequences = [
                driver.add([3 + (7 * i + k) % 200 for k in range(5 + 3 * i)], slots[i % 4])
                for i in range(count)
            ]
            drawn.append(list(driver.generate(sequences, 20).values()))
            for seq in sequences:
                driver.remove(seq)
    assert drawn[:3] == drawn[3:]
