"""Recorded steps of a whole tiny model on the Triton kernels, in the interpreter: prefill, chunks over a cached context
and decodes in one step, with and without adapters, against the torch path step by step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_graphs import FakeRecorder
from model_driver import ModelDriver

from lorax_backend.model import layers, prefill_graphs, runner, warm_up
from lorax_backend.scheduler.sequence import Sequence
from lorax_kernels import LoraBatch, dispatch, tuning

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = ({"rank": 1, "targets": ("q_proj",)}, {"rank": 12, "targets": (*MODULES, "lm_head")})
SMALL = {"block_k": 32, "row_n": 64, "block_n": 32, "split_shift": 1}


@contextmanager
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors go to the Triton kernels."""
    plain = LoraBatch.build

    def with_work(*arguments: object) -> LoraBatch | None:
        batch = plain(*arguments)
        return batch if batch is None or batch.work is not None else batch.with_work("cpu")

    with monkeypatch.context() as patched:
        patched.setenv(tuning.OVERRIDE.format(kind="LORA"), json.dumps(SMALL))
        patched.setattr(dispatch, "_uses_triton", lambda tensor: True)
        patched.setattr(LoraBatch, "build", with_work)
        tuning.forget_configs()
        yield
    tuning.forget_configs()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows of nobody hold whatever memory held
def test_recorded_steps_on_the_kernels_give_what_the_torch_path_gives(
    tiny_model_path: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers, "_packing_supported", False)  # plain weights, as on a device
    monkeypatch.setattr(warm_up, "_TOKENS", ())
    monkeypatch.setattr(runner, "graph_sizes", lambda largest: (largest,))  # each size takes seconds here
    monkeypatch.setattr(prefill_graphs, "_SIZES", ())
    path = tiny_model_path("llama", num_hidden_layers=1)
    folders = [tiny_adapter(path, seed=i, **adapter) for i, adapter in enumerate(ADAPTERS)]
    settings = {
        "dtype": "float32",
        "num_blocks": 32,
        "max_batch_size": 4,
        "adapter_pages": 8,
        "max_lora_rank": 16,
    }
    recorder = FakeRecorder()
    twin = ModelDriver(path, **settings)
    with on_triton(monkeypatch):
        driver = ModelDriver(path, recorder=recorder, prefill_graph_tokens=24, **settings)
    slots = [[d.add_adapter(folder) for folder in folders] for d in (twin, driver)]
    prompts = [[3 + (7 * i + k) % 200 for k in range(length)] for i, length in enumerate((18, 19, 7))]
    adapters = (1, -1, 0)
    pairs: list[tuple[Sequence, Sequence]] = []
    for ids, adapter in zip(prompts, adapters, strict=True):
        one, other = (
            d.add(ids, of[adapter] if adapter >= 0 else -1)
            for d, of in zip((twin, driver), slots, strict=True)
        )
        pairs.append((one, other))
    first, second, third = pairs
    for work in (
        [(first, 18)],
        [(first, 1), (second, 12)],
        [(second, 7), (third, 7), (first, 1)],
        [(second, 1), (first, 1), (third, 1)],
    ):
        want = twin.step([(pair[0], count) for pair, count in work])
        with on_triton(monkeypatch):
            got = driver.step([(pair[1], count) for pair, count in work])
        for one, other in pairs:
            if one.handle in twin.last_logits:
                torch.testing.assert_close(
                    driver.last_logits[other.handle], twin.last_logits[one.handle], atol=2e-4, rtol=1e-4
                )
        assert got.token_ids == want.token_ids
        sampled = [p for p, _ in sorted(work, key=lambda entry: entry[1] > 1)
                   if p[0].num_computed == len(p[0].token_ids)]  # fmt: skip
        for pair, token in zip(sampled, want.token_ids, strict=True):
            for seq in pair:
                seq.token_ids.append(token)
    assert recorder.replays == 4
