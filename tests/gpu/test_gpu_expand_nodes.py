"""Nodes after a base layer that add its LoRA deltas, on a CUDA device: against float64, launched one by one and in a
captured graph with the base layer's product and shrink before them; and a whole model's greedy tokens."""

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

from expand_node_cases import NODES, NodeCase, check_against_twin, make_node_case, with_slots
from lora_cases import draw_slots, poison_new_tensors
from model_driver import ModelDriver

from lorax_kernels import LoraBatch, WorkBuffer, tuning
from lorax_kernels.configs import DEFAULT
from lorax_kernels.expand_nodes import begin_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
FUSED = replace(DEFAULT, fuse_norm=True, fuse_silu=True, fuse_rope=True)
EARLY = replace(FUSED, fuse_pdl=True)
CONFIGS = {
    "one after the other": FUSED,
    "dependent launch": replace(EARLY, pdl=True, fuse_block_n=256, fuse_warps=8, fuse_waves=1),
    "product first": replace(
        FUSED, overlap="product_first", fuse_row_n=256, fuse_block_n=64, fuse_registers=128
    ),
    "product first, dependent node": replace(EARLY, overlap="product_first", fuse_rope_heads=8),
    "product first, dependent launch": replace(EARLY, pdl=True, overlap="product_first"),
    "shrink first, dependent launch": replace(EARLY, pdl=True, overlap="shrink_first", split_shift=4),
}
RANKS = (1, 3, 12, 96, 256)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDE = {"width": 1024, "heads": (8, 2), "head_dim": 128, "in_features": 512, "device": "cuda"}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for what is about launches that follow each other: it puts one between."""
    poison_new_tensors(monkeypatch)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("popularity", ["distinct", "zipf", "identical", "none_but_one"])
@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 200])
def test_any_mix_of_adapters_in_bfloat16(tokens: int, popularity: str, node: str) -> None:
    case = make_node_case(node, tokens, RANKS, popularity, seed=tokens, dtype=torch.bfloat16, **WIDE)
    batch = case.lora.batch("cuda")
    if batch is not None:
        check_against_twin(case, batch, FUSED, TOLERANCE[torch.bfloat16])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("ranks", [(1,), (3, 12), (96, 256, 3)], ids=str)
def test_any_rank_and_dtype(ranks: tuple[int, ...], node: str, dtype: torch.dtype) -> None:
    case = make_node_case(node, 33, ranks, "uniform", seed=len(ranks), dtype=dtype, **WIDE)
    batch = case.lora.batch("cuda")
    assert batch is not None
    check_against_twin(case, batch, FUSED, TOLERANCE[dtype])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pdl", [False, True], ids=["plain launch", "dependent launch"])
@pytest.mark.parametrize(
    ("node", "shape"),
    [
        ("residual norm", {"width": 2880}),
        ("silu", {"width": 1000}),
        ("rope", {"heads": (9, 3), "head_dim": 80}),
        ("rope with norms", {"heads": (32, 8), "head_dim": 128}),
    ],
    ids=["residual norm", "silu", "rope", "rope with norms"],
)
def test_widths_that_are_no_multiple_of_a_block(node: str, shape: dict[str, object], pdl: bool) -> None:
    case = make_node_case(node, 20, (12, 3, 64), "zipf", dtype=torch.bfloat16, **{**WIDE, **shape})
    batch = case.lora.batch("cuda")
    assert batch is not None
    check_against_twin(case, batch, replace(FUSED, pdl=pdl, fuse_pdl=pdl), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("node", NODES)
def test_a_row_is_the_same_whatever_its_batch_mates_hold(node: str) -> None:
    case = make_node_case(node, 6, (12, 8), "identical", base_share=0.0, dtype=torch.bfloat16, **WIDE)
    batch = case.lora.batch("cuda")
    assert batch is not None
    want = case.run(case.lora.out, case.delta(batch, FUSED))
    others = [0, 1, 3, 4, 5]
    case.lora.x[others] = float("nan")
    case.lora.out[others] = float("nan")
    got = case.run(case.lora.out, case.delta(batch, FUSED))
    assert torch.equal(got[0][2], want[0][2])


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("node", NODES)
def test_one_graph_runs_every_mix_of_adapters(node: str, config: str) -> None:
    """Base layer's product, shrink and node, several times over without anything between, so that launches that begin
    too soon would show."""
    tokens, repeats = 48, 6
    case = make_node_case(node, tokens, (8, 30, 16, 1, 96), seed=2, dtype=torch.bfloat16, **WIDE)
    lora = case.lora
    buffer = WorkBuffer(tokens, max_pages=12, device="cuda")
    batch = LoraBatch.build(lora.token_slots, lora.slot_pages, lora.slot_ranks, "cuda", buffer)
    assert batch is not None
    weight = (
        torch.randn(lora.out.shape[1], lora.x.shape[1], device="cuda").bfloat16() / lora.x.shape[1] ** 0.5
    )
    inputs = [torch.randn_like(lora.x) for _ in range(repeats)]
    bases = [torch.nn.functional.linear(x, weight) for x in inputs]
    caches = [case.caches(lora.out) for _ in range(repeats)]

    def once(x: torch.Tensor, pair_of_caches: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        layer, pair = (weight, None), (lora.a, lora.b)
        out, delta = begin_linear(x, layer, pair, batch, lora.out_slices, CONFIGS[config])
        assert delta is not None
        return case.run(out, delta, pair_of_caches)

    once(inputs[0], caches[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [once(x, pair) for x, pair in zip(inputs, caches, strict=True)]
    rng = np.random.default_rng(0)
    for popularity, base_share in (("distinct", 0.0), ("identical", 0.5), ("uniform", 1.0), ("zipf", 0.3)):
        slots = draw_slots(rng, tokens, 5, popularity, base_share)
        LoraBatch.build(slots, lora.slot_pages, lora.slot_ranks, "cuda", buffer)
        for result in results:
            for tensor in result:
                tensor.fill_(float("nan"))
        graph.replay()
        for x, base, result in zip(inputs, bases, results, strict=True):
            mixed = with_slots(case, slots)
            filled: NodeCase = replace(mixed, lora=replace(mixed.lora, x=x, out=base))
            filled.check(result, TOLERANCE[torch.bfloat16])


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool, bool], None]]:
    """Sets whether every later step's nodes add the deltas, and whether launches may begin early."""

    def configure(fused: bool, pdl: bool) -> None:
        fields = {
            "fuse_norm": fused,
            "fuse_silu": fused,
            "fuse_rope": fused,
            "fuse_pdl": pdl,
            "pdl": pdl,
            "overlap": "product_first",
        }
        monkeypatch.setenv(tuning.OVERRIDE.format(kind="LORA"), json.dumps(fields))
        monkeypatch.setenv(tuning.OVERRIDE.format(kind="NODE"), json.dumps({"pdl": pdl}))
        tuning.forget_configs()

    yield configure
    monkeypatch.undo()
    tuning.forget_configs()


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_model_draws_the_same_tokens_wherever_its_deltas_are_added(
    architecture: str,
    graphs: bool,
    tiny_model_path: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    configured: Callable[[bool, bool], None],
) -> None:
    path = tiny_model_path(architecture)
    folders = [
        tiny_adapter(path, seed=0, rank=1, targets=("q_proj",)),
        tiny_adapter(path, seed=1, rank=12, targets=MODULES),
        tiny_adapter(path, seed=2, rank=64, targets=(*MODULES, "lm_head")),
    ]
    drawn = []
    for options, fused, pdl in (
        ({"device": "cpu"}, False, False),
        ({"device": "cuda", "cuda_graphs": graphs}, False, False),
        ({"device": "cuda", "cuda_graphs": graphs}, True, True),
    ):
        configured(fused, pdl)
        driver = ModelDriver(path, dtype="float32", adapter_pages=64, **options)
        slots = [*(driver.add_adapter(folder) for folder in folders), -1]
        tokens = []
        for count in (1, 5, 11):
            sequences = [
                driver.add([3 + (7 * i + k) % 200 for k in range(5 + 3 * i)], slots[i % 4])
                for i in range(count)
            ]
            tokens.append(list(driver.generate(sequences, 20).values()))
            for seq in sequences:
                driver.remove(seq)
        drawn.append(tokens)
        driver.runner.close()
    assert drawn[1] == drawn[0]
    assert drawn[2] == drawn[0]
