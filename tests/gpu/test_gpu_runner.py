"""The model runner on a CUDA device: the same greedy tokens as on the CPU, with graphs and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_driver import ModelDriver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = (
    {"rank": 1, "targets": ("q_proj",)},
    {"rank": 12, "targets": MODULES},
    {"rank": 64, "targets": (*MODULES, "lm_head")},
    {"rank": 8, "targets": ("o_proj", "down_proj")},
)


@pytest.fixture(scope="module")
def drivers(
    tiny_model_path: Callable[..., Path], tiny_adapter: Callable[..., Path], request: pytest.FixtureRequest
) -> dict[str, tuple[ModelDriver, list[int]]]:
    """The same tiny model and adapters on the CPU, on CUDA step by step, and on CUDA with graphs."""
    path = tiny_model_path(request.param)
    folders = [tiny_adapter(path, seed=i, **adapter) for i, adapter in enumerate(ADAPTERS)]
    made = {}
    for name, options in {
        "cpu": {"device": "cpu"},
        "eager": {"device": "cuda", "cuda_graphs": False},
        "graphs": {"device": "cuda", "cuda_graphs": True},
    }.items():
        driver = ModelDriver(path, dtype="float32", adapter_pages=64, **options)
        made[name] = (driver, [driver.add_adapter(folder) for folder in folders])
    return made


@pytest.mark.parametrize("drivers", ["llama", "mistral", "qwen2", "qwen3"], indirect=True)
def test_mixed_batches_of_any_size_draw_the_same_tokens(
    drivers: dict[str, tuple[ModelDriver, list[int]]],
) -> None:
    drawn = {}
    for name, (driver, slots) in drivers.items():
        drawn[name] = []
        for count in (1, 3, 11):
            sequences = [
                driver.add([3 + (7 * i + k) % 200 for k in range(5 + 3 * i)], [*slots, -1][i % 5])
                for i in range(count)
            ]
            drawn[name].append(driver.generate(sequences, 20).values())
            for seq in sequences:
                driver.remove(seq)
        drawn[name] = [list(values) for values in drawn[name]]
    assert drawn["eager"] == drawn["cpu"]
    assert drawn["graphs"] == drawn["cpu"]


@pytest.mark.parametrize("drivers", ["llama"], indirect=True)
def test_a_step_launched_before_the_last_token_is_read_takes_it_on_the_device(
    drivers: dict[str, tuple[ModelDriver, list[int]]],
) -> None:
    driver, slots = drivers["graphs"]
    prompts = [[5, 6, 7, 8], [9, 10, 11], [12, 13]]
    plain = [driver.add(ids, slots[i]) for i, ids in enumerate(prompts)]
    want = list(driver.generate(plain, 12).values())
    ahead = [driver.add(ids, slots[i]) for i, ids in enumerate(prompts)]
    got: list[list[int]] = [[] for _ in prompts]
    previous = driver.runner.launch(driver.batch([(seq, len(seq.token_ids)) for seq in ahead]))
    for _ in range(11):
        following = driver.runner.launch(driver.batch([(seq, 1) for seq in ahead], in_flight=True))
        for row, token in enumerate(previous.result().token_ids):
            ahead[row].token_ids.append(token)
            got[row].append(token)
        previous = following
    for row, token in enumerate(previous.result().token_ids):
        got[row].append(token)
    assert got == want
