"""Small prefill and mixed steps as CUDA graphs: the same greedy tokens as without, and no trace of steps before."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_driver import ModelDriver

from lorax_backend.scheduler.sequence import Sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = (
    {"rank": 1, "targets": ("q_proj",)},
    {"rank": 12, "targets": MODULES},
    {"rank": 64, "targets": (*MODULES, "lm_head")},
)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_random_steps_draw_the_same_tokens_with_graphs_and_without(
    architecture: str, tiny_model_path: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    options = {"sliding_window": 48} if architecture == "mistral" else {}
    path = tiny_model_path(architecture, **options)
    folders = [tiny_adapter(path, seed=i, **adapter) for i, adapter in enumerate(ADAPTERS)]
    drivers = [
        ModelDriver(path, dtype="float32", device="cuda", adapter_pages=64, cuda_graphs=graphs,
                    prefill_graph_tokens=256 if graphs else 0)
        for graphs in (False, True)
    ]  # fmt: skip
    assert drivers[1].runner.info(0.0).prefill_graph_tokens[-1] == 256
    slots = [[driver.add_adapter(folder) for folder in folders] for driver in drivers]
    rng = random.Random(1)
    live: list[tuple[Sequence, ...]] = []
    for _ in range(40):
        while len(live) < 12 and rng.random() < 0.7:
            ids = [rng.randrange(3, 384) for _ in range(rng.choice((1, 5, 40, 128, 200)))]
            adapter = rng.choice((-1, 0, 1, 2))
            live.append(
                tuple(
                    driver.add(ids, of[adapter] if adapter >= 0 else -1)
                    for driver, of in zip(drivers, slots, strict=True)
                )
            )
        left, work = rng.choice((16, 100, 256)), []
        for group in live:
            missing = len(group[0].token_ids) - group[0].num_computed
            count = min(left, rng.choice((missing, rng.randint(1, missing))))
            if count:
                work.append((group, count))
                left -= count
        drawn = []
        for side, driver in enumerate(drivers):
            given = [(group[side], count) for group, count in work]
            drawn.append(driver.step(given).token_ids)
            sampled = [seq for seq, _ in sorted(given, key=lambda entry: entry[1] > 1)
                       if seq.num_computed == len(seq.token_ids)]  # fmt: skip
            for seq, token in zip(sampled, drawn[-1], strict=True):
                seq.token_ids.append(token)
        assert drawn[0] == drawn[1]
        for group in list(live):
            if rng.random() < 0.1:
                live.remove(group)
                for driver, seq in zip(drivers, group, strict=True):
                    driver.remove(seq)
    for driver in drivers:
        driver.runner.close()


def test_a_step_ahead_of_its_tokens_takes_them_on_the_device(tiny_model_path: Callable[..., Path]) -> None:
    drawn = []
    for graphs in (False, True):
        driver = ModelDriver(tiny_model_path("llama"), dtype="float32", device="cuda", cuda_graphs=graphs,
                             prefill_graph_tokens=64 if graphs else 0)  # fmt: skip
        first, second = driver.add(range(3, 23)), driver.add(range(30, 42))
        handle = driver.runner.launch(driver.batch([(first, 20)]))
        ahead, beside = driver.batch([(first, 1)], in_flight=True), driver.batch([(second, 12)])
        ahead.sequences += beside.sequences
        ahead.num_tokens += beside.num_tokens
        following = driver.runner.launch(ahead)
        drawn.append((handle.result().token_ids, following.result().token_ids))
        driver.runner.close()
    assert drawn[0] == drawn[1]
