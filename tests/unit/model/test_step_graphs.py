"""Graphs of decode, prefill and mixed steps: they give what the same steps give one by one, and read only memory."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_graphs import FakeRecorder, read_memory_only
from model_driver import ModelDriver

from lorax_backend.model import prefill_graphs
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.prefill_graphs import most_prefill_tokens, prefill_graph_bytes, prefill_graph_sizes
from lorax_backend.scheduler.sequence import Sequence
from lorax_backend.types import SamplingParams

pytest.importorskip("triton")  # it says how prompts are cut into tiles
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS: tuple[dict[str, Any], ...] = (
    {"rank": 1, "targets": ("q_proj",)},
    {"rank": 12, "targets": MODULES},
    {"rank": 64, "targets": (*MODULES, "lm_head")},
    {"rank": 8, "targets": ("o_proj", "down_proj")},
)
TILE_ROWS = 64  # of float32


class Pair:
    """The same model twice, step by step and by graphs, fed with the same work."""

    def __init__(
        self,
        path: Path,
        adapters: list[Path],
        monkeypatch: pytest.MonkeyPatch,
        tokens: int = 64,
        **options: Any,
    ) -> None:
        read_memory_only(monkeypatch, TILE_ROWS)
        self.recorder = FakeRecorder()
        self.eager = ModelDriver(path, max_batch_size=12, max_batch_tokens=128, **options)
        self.graphs = ModelDriver(
            path, max_batch_size=12, max_batch_tokens=128, recorder=self.recorder,
            prefill_graph_tokens=tokens, **options,
        )  # fmt: skip
        self.slots = [[d.add_adapter(folder) for folder in adapters] for d in (self.eager, self.graphs)]
        self.live: list[tuple[Sequence, Sequence]] = []

    def add(self, ids: list[int], adapter: int = -1, **sampling: Any) -> tuple[Sequence, Sequence]:
        params = SamplingParams(max_new_tokens=1000, **sampling)
        pair = tuple(
            driver.add(ids, slots[adapter] if adapter >= 0 else -1, params)
            for driver, slots in zip((self.eager, self.graphs), self.slots, strict=True)
        )
        self.live.append((pair[0], pair[1]))
        return self.live[-1]

    def remove(self, pair: tuple[Sequence, Sequence]) -> None:
        self.live.remove(pair)
        self.eager.remove(pair[0])
        self.graphs.remove(pair[1])

    def step(self, work: list[tuple[tuple[Sequence, Sequence], int]]) -> None:
        results = []
        for side, driver in enumerate((self.eager, self.graphs)):
            given = [(pair[side], count) for pair, count in work]
            result = driver.step(given)
            sampled = [seq for seq, _ in sorted(given, key=lambda entry: entry[1] > 1)
                       if seq.num_computed == len(seq.token_ids)]  # fmt: skip
            for seq, token in zip(sampled, result.token_ids, strict=True):
                seq.token_ids.append(token)
            logits = [driver.last_logits[seq.handle] for seq in sampled]
            results.append((result, torch.stack(logits) if logits else torch.zeros(0)))
        (one, want), (other, got) = results
        torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)
        assert other.token_ids == one.token_ids
        assert other.prompt_logprobs.keys() == one.prompt_logprobs.keys()
        for row, scores in one.prompt_logprobs.items():
            torch.testing.assert_close(
                torch.tensor(other.prompt_logprobs[row]), torch.tensor(scores), atol=1e-3, rtol=1e-3
            )


@pytest.fixture
def adapters(tiny_model_path: Callable[..., Path], tiny_adapter: Callable[..., Path]) -> list[Path]:
    return [tiny_adapter(tiny_model_path("llama"), seed=i, **one) for i, one in enumerate(ADAPTERS)]


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, 384) for _ in range(length)]


@pytest.mark.parametrize("seed", [0, 1])
def test_random_steps_of_every_kind_give_what_they_give_without_graphs(
    seed: int, tiny_model_path: Callable[..., Path], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(tiny_model_path("llama"), adapters, monkeypatch)
    for driver in (pair.eager, pair.graphs):
        driver._free_blocks.sort(
            reverse=True
        )  # whoever stores at 0 by mistake meets the first sequence's keys
    rng = random.Random(seed)
    replays = pair.recorder.replays
    kinds: set[tuple[bool, bool, bool, bool]] = set()
    steps = 0
    for _ in range(24):
        while len(pair.live) < 8 and rng.random() < 0.6:
            pair.add(
                prompt(rng, rng.choice((1, 2, 9, 30, 75))),
                rng.choice((-1, -1, 0, 1, 2, 3)),
                prompt_logprobs=rng.random() < 0.2,
            )
        work = []
        left = rng.choice((3, 16, 40, 64))
        for live in rng.sample(pair.live, len(pair.live)):
            missing = len(live[0].token_ids) - live[0].num_computed
            count = min(left, missing if rng.random() < 0.5 else rng.randint(1, missing))
            if count and rng.random() < 0.8:
                work.append((live, count))
                left -= count
        if not work:
            continue
        steps += 1
        kinds.add(
            (
                any(live[0].num_computed and count == 1 for live, count in work),
                any(live[0].num_computed and count > 1 for live, count in work),
                any(not live[0].num_computed and count > 1 for live, count in work),
                any(live[0].adapter_slot >= 0 for live, _ in work),
            )
        )
        pair.step(work)
        for live in list(pair.live):
            if rng.random() < 0.1:
                pair.remove(live)
    assert pair.recorder.replays - replays == steps, "every step was small enough for a graph"
    assert len(kinds) >= 6
    assert any(decodes and chunks and lora for decodes, chunks, _, lora in kinds)


@pytest.mark.parametrize("architecture", ["mistral", "qwen3"])
def test_windows_and_normed_heads_are_the_same_in_graphs(
    architecture: str,
    tiny_model_path: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"sliding_window": 24} if architecture == "mistral" else {}
    path = tiny_model_path(architecture, **options)
    pair = Pair(path, [tiny_adapter(path, rank=12, targets=MODULES)], monkeypatch)
    rng = random.Random(3)
    first, second = pair.add(prompt(rng, 50), 0), pair.add(prompt(rng, 33))
    pair.step([(first, 50)])
    pair.step([(first, 1), (second, 20)])
    pair.step([(first, 1), (second, 13)])
    pair.step([(first, 1), (second, 1)])


def test_a_step_launched_before_the_last_is_read_takes_its_ids_from_the_device(
    tiny_model_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode whose token is still in flight, beside a prompt that begins."""
    pair = Pair(tiny_model_path("llama"), [], monkeypatch)
    rng = random.Random(4)
    prompts = prompt(rng, 20), prompt(rng, 12)
    drawn: list[list[list[int]]] = []
    for driver in (pair.eager, pair.graphs):
        first, second = (driver.add(ids) for ids in prompts)
        handle = driver.runner.launch(driver.batch([(first, 20)]))
        ahead = driver.batch([(first, 1)], in_flight=True)
        beside = driver.batch([(second, 12)])
        ahead.sequences += beside.sequences
        ahead.num_tokens += beside.num_tokens
        following = driver.runner.launch(ahead)
        drawn.append([handle.result().token_ids, following.result().token_ids])
    assert drawn[0] == drawn[1]
    assert [len(ids) for ids in drawn[0]] == [1, 2]
    for _ in range(6):  # more than there are buffers, which must not remember the id that was in flight
        pair.step([(pair.add(prompt(rng, 9)), 9)])


def test_a_decode_step_finds_an_adapter_that_came_to_other_pages_of_the_same_slot(
    tiny_model_path: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    adapters: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The work list of the last step is taken again only while it says the same."""
    pair = Pair(tiny_model_path("llama"), [adapters[3], adapters[1]], monkeypatch)  # of one page and of two
    live = [pair.add(prompt(random.Random(8), 7), 1), pair.add(prompt(random.Random(9), 9))]
    pair.step([(each, len(each[0].token_ids)) for each in live])
    for _ in range(2):
        pair.step([(each, 1) for each in live])
    pages = []
    other = tiny_adapter(tiny_model_path("llama"), seed=9, rank=12, targets=MODULES)
    # The second adapter's pages are taken first, and free at last.
    for folder, gone in ((adapters[1], [0]), (other, [0, 1])):
        for side, driver in enumerate((pair.eager, pair.graphs)):
            arena = driver.runner.arena
            for slot in gone:
                arena.free(slot)
            live[0][side].adapter_slot = driver.add_adapter(folder)
            assert live[0][side].adapter_slot == 0
        pages.append(pair.graphs.runner.arena.slot_pages[0, :2].tolist())
        for _ in range(2):
            pair.step([(each, 1) for each in live])
    assert pages[0] != pages[1]


def test_a_step_that_fits_no_graph_runs_without(
    tiny_model_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(tiny_model_path("llama"), [], monkeypatch, tokens=32)
    rng = random.Random(5)
    first, second = pair.add(prompt(rng, 40)), pair.add(prompt(rng, 30))
    pair.step([(first, 40)])
    assert pair.recorder.replays == 0
    pair.step([(first, 1), (second, 20)])
    assert pair.recorder.replays == 1
    monkeypatch.setattr(prefill_graphs, "_MAX_DECODE_CONTEXT", 41)
    pair.step([(first, 1), (second, 5)])
    assert pair.recorder.replays == 1, "a long decode context is split better by launches of its own"
    pair.step([(first, 1), (second, 1)])
    assert pair.recorder.replays == 1
    pair.step([(first, 1), (second, 1)])
    assert pair.recorder.replays == 1


def test_what_cannot_be_recorded_is_told_and_done_without(
    tiny_model_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read_memory_only(monkeypatch, TILE_ROWS)
    decode_recordings = 2 * 4  # batches of 1, 2, 4 and 8, with adapters and without
    told: list[str] = []
    recorder = FakeRecorder(fail_at=decode_recordings + 1)
    with caplog.at_level(logging.ERROR):
        driver = ModelDriver(tiny_model_path("llama"), max_batch_size=8, recorder=recorder, progress=told.append,
                             prefill_graph_tokens=32)  # fmt: skip
    assert "prefill graphs are OFF" in told[-1]
    assert "stream is capturing" in told[-1]
    assert "prefill_graph_tokens 32" in caplog.text
    info = driver.runner.info(0.0)
    assert (info.cuda_graph_batch_sizes, info.prefill_graph_tokens) == ((1, 2, 4, 8), ())
    seq = driver.add([5, 6, 7])
    assert len(driver.generate([seq], 3)[seq.handle]) == 3


def test_graphs_of_prefill_are_off_on_a_cpu_unless_asked_for(
    tiny_model_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_memory_only(monkeypatch, TILE_ROWS)
    recorder, told = FakeRecorder(), list[str]()
    driver = ModelDriver(tiny_model_path("llama"), max_batch_size=2, recorder=recorder, progress=told.append)
    assert recorder.recorded == 4
    assert driver.runner.info(0.0).prefill_graph_tokens == ()
    assert not any("prefill" in line for line in told)


def test_sizes_end_at_what_was_asked_for_and_the_kernels_can_do() -> None:
    assert prefill_graph_sizes(0) == ()
    assert prefill_graph_sizes(20) == (16, 20)
    assert prefill_graph_sizes(128) == (16, 32, 64, 96, 128)
    assert prefill_graph_sizes(512)[-1] == 512
    assert [most_prefill_tokens(-1, *cuda) for cuda in ((True, True), (True, False), (False, True))] == [
        512,
        0,
        0,
    ]
    assert most_prefill_tokens(64, True, True) == 64
    for wrong in (-2, 513):
        with pytest.raises(ValueError, match=f"prefill_graph_tokens is {wrong}; it must be 0"):
            prefill_graph_sizes(wrong)


def test_the_memory_plan_counts_the_graphs(tiny_model_path: Callable[..., Path]) -> None:
    model = ModelConfig.from_folder(tiny_model_path("llama"))
    small, large = (prefill_graph_bytes(model, tokens, 2, 8) for tokens in (128, 512))
    assert prefill_graph_bytes(model, 0, 2, 8) == 0
    assert 0 < small < large
