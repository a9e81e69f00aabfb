"""Greedy drawing on a CUDA device: its kernel, and the steps that draw with it, with graphs and without."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_driver import ModelDriver

from lorax_backend.types import SamplingParams
from lorax_kernels import dispatch
from lorax_kernels.greedy import NOTHING, SCORED, GreedyMemory, draw_greedy, newest_ids

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from greedy_cases import check_drawing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PLAIN = SamplingParams(max_new_tokens=50)
SCORING = SamplingParams(max_new_tokens=50, top_logprobs=0)
RANDOM = SamplingParams(max_new_tokens=50, do_sample=True, temperature=1.3, seed=4)
MARKED = SamplingParams(max_new_tokens=50, watermark=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 128_256), (44, 128_256), (128, 32_000), (600, 4099)])
def test_drawing_gives_the_lowest_best_id_and_its_log_probability(
    rows: int, vocab: int, dtype: torch.dtype
) -> None:
    check_drawing(rows, vocab, dtype, "cuda")


def test_the_torch_twin_draws_on_a_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_uses_triton", lambda tensor: False)
    logits = torch.rand(4, 4099, device="cuda")
    best = torch.tensor([7, 4098, 0, 99], device="cuda")
    logits.scatter_(1, best[:, None], 9.0)
    memory = GreedyMemory(torch.zeros(5, dtype=torch.int64, device="cuda"), 4, 4099, turns=2)
    slots = torch.tensor([4, -1, 0, 2], device="cuda")
    draw_greedy(logits, torch.tensor([SCORED, 1], dtype=torch.int32, device="cuda"), slots, memory)
    assert memory.ids[1].tolist() == [7, 0, 0, 99]
    assert memory.last_token.tolist() == [0, 0, 99, 0, 7]
    want = torch.log_softmax(logits, 1).max(1).values
    assert memory.logprobs[1][0].item() == pytest.approx(want[0].item(), abs=1e-5)


def test_the_host_reads_what_a_recorded_drawing_wrote_once_its_event_is_over() -> None:
    """Page-locked memory is written by the kernel itself, at the place in turn that device memory names."""
    rows, vocab = 32, 128_256
    memory = GreedyMemory(torch.zeros(rows, dtype=torch.int64, device="cuda"), rows, vocab, turns=4)
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda")
    control = torch.zeros(2, dtype=torch.int32, device="cuda")
    slots = torch.arange(rows, device="cuda")
    draw_greedy(logits, control, slots, memory)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw_greedy(logits, control, slots, memory)
    assert not memory.ids.any()
    events = [torch.cuda.Event() for _ in range(4)]
    hosts = [torch.tensor([SCORED, turn], dtype=torch.int32).pin_memory() for turn in range(4)]
    for step in range(40):
        logits.zero_()
        logits[:, 3 * step] = 5.0
        control.copy_(hosts[step % 4], non_blocking=True)
        graph.replay()
        events[step % 4].record()
        if step >= 2:
            before = (step - 2) % 4
            events[before].synchronize()
            assert memory.ids[before].tolist() == [3 * (step - 2)] * rows
            want = -math.log1p((vocab - 1) * math.exp(-5.0))
            assert memory.logprobs[before].tolist() == pytest.approx([want] * rows, abs=1e-5)
    control.fill_(NOTHING)
    memory.last_token.fill_(7)
    graph.replay()
    assert memory.last_token.tolist() == [7] * rows


def test_pending_ids_are_those_drawn_last() -> None:
    last_token = torch.tensor([50, 51, 52], device="cuda")
    ids = torch.arange(300, dtype=torch.int32, device="cuda") + 100
    pending = (torch.arange(300, dtype=torch.int32, device="cuda") % 4) - 1
    want = [100 + row if row % 4 == 0 else 49 + row % 4 for row in range(300)]
    assert newest_ids(ids, pending, last_token).tolist() == want


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    "settings",
    [[PLAIN], [PLAIN, SCORING, SCORING], [PLAIN, RANDOM, SCORING], [MARKED, PLAIN, SCORING]],
    ids=["plain", "scored", "sampled", "marked"],
)
def test_graphs_and_overlap_show_in_no_token_and_no_log_probability(
    settings: list[SamplingParams], ahead: bool, tiny_model_path: Callable[..., Path]
) -> None:
    answers = []
    for graphs in (False, True):
        driver = ModelDriver(tiny_model_path("llama"), dtype="float32", device="cuda", cuda_graphs=graphs,
                             max_batch_size=8)  # fmt: skip
        sequences = [
            driver.add([5 + (13 * i + 7 * k) % 300 for k in range(9 + i)], sampling=s)
            for i, s in enumerate(settings)
        ]
        ids: list[list[int]] = []
        logprobs: list[list[float | None]] = []
        under_way = [driver.runner.launch(driver.batch([(seq, seq.prompt_len) for seq in sequences]))]
        for _ in range(12):
            if graphs and ahead:
                under_way.append(
                    driver.runner.launch(driver.batch([(s, 1) for s in sequences], in_flight=True))
                )
            result = under_way.pop(0).result()
            ids.append(result.token_ids)
            logprobs.append(result.logprobs)
            for seq, token in zip(sequences, result.token_ids, strict=True):
                seq.token_ids.append(token)
            if not under_way:
                under_way.append(driver.runner.launch(driver.batch([(s, 1) for s in sequences])))
        answers.append((ids, logprobs))
        driver.runner.close()
    (want, scores), (got, others) = answers
    assert got == want
    for one, other in zip(scores, others, strict=True):
        for a, b, params in zip(one, other, settings, strict=True):
            assert (a is None) == (b is None) == (params.top_logprobs is None)
            assert a is None or b == pytest.approx(a, abs=1e-4)
