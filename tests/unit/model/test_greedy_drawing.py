"""Steps that draw the argmax of every row: in a graph or without, ahead of their tokens or not, it is the same tokens
and log probabilities as ever, and nobody else's state changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_graphs import FakeRecorder, read_memory_only
from model_driver import ModelDriver
from torch.utils._python_dispatch import TorchDispatchMode

from lorax_backend.model.recorder import Recorded
from lorax_backend.model.sampler import SamplingInputs, sample
from lorax_backend.model.sampling_plan import SamplingPlanner
from lorax_backend.scheduler.sequence import ScheduledSequence, Sequence
from lorax_backend.types import SamplingParams
from lorax_kernels.greedy import IDS, NOTHING, SCORED, GreedyMemory, draw_greedy

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from greedy_cases import check_drawing, make_logits

pytest.importorskip("triton")
PLAIN = SamplingParams(max_new_tokens=50)
SCORING = SamplingParams(max_new_tokens=50, top_logprobs=0)
RANDOM = SamplingParams(max_new_tokens=50, do_sample=True, temperature=1.3, seed=4)
PENALISED = SamplingParams(max_new_tokens=50, repetition_penalty=1.4)
MARKED = SamplingParams(max_new_tokens=50, watermark=True)


def item(params: SamplingParams, slot: int = 0, generated: int = 0) -> ScheduledSequence:
    seq = Sequence(slot, 2, params, None, 0, 0.0, token_ids=[1, 2], slot=slot)
    return ScheduledSequence(seq, 1 + generated, 1, sample=True, generated_index=generated)


@pytest.fixture
def recorder() -> FakeRecorder:
    return FakeRecorder()


@pytest.fixture
def pair(
    tiny_model_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, recorder: FakeRecorder
) -> list[ModelDriver]:
    """The same model without graphs and with graphs of every step."""
    read_memory_only(monkeypatch, 64)
    path, options = tiny_model_path("llama"), {"max_batch_size": 8, "max_batch_tokens": 128}
    return [
        ModelDriver(path, **options),
        ModelDriver(path, recorder=recorder, prefill_graph_tokens=64, **options),
    ]


def begin(driver: ModelDriver, settings: list[SamplingParams]) -> list[Sequence]:
    """Sequences whose prompts are computed, and whose first token is known."""
    made = [
        driver.add([5 + (13 * i + 7 * k) % 300 for k in range(9 + i)], sampling=s)
        for i, s in enumerate(settings)
    ]
    for seq, token in zip(
        made,
        driver.runner.launch(driver.batch([(s, s.prompt_len) for s in made])).result().token_ids,
        strict=True,
    ):
        seq.token_ids.append(token)
    return made


def decode(driver: ModelDriver, sequences: list[Sequence], steps: int, ahead: bool) -> list[Any]:
    """Tokens and log probabilities of some steps, with a step always under way when the last is read or not."""
    seen: list[Any] = []
    under_way: list[Any] = []
    for step in range(steps):
        batch = driver.batch([(seq, 1) for seq in sequences], in_flight=ahead and step > 0)
        under_way.append(driver.runner.launch(batch))
        if len(under_way) == 1 + ahead:
            seen.append(under_way.pop(0).result())
            for seq, token in zip(sequences, seen[-1].token_ids, strict=True):
                seq.token_ids.append(token)
    for handle in under_way:
        seen.append(handle.result())
        for seq, token in zip(sequences, seen[-1].token_ids, strict=True):
            seq.token_ids.append(token)
    return seen


def test_only_an_argmax_and_its_log_probability_can_be_drawn_greedily() -> None:
    planner = SamplingPlanner(50, 4, torch.device("cpu"))
    assert planner.greedy_mode([]) == NOTHING
    assert planner.greedy_mode([item(PLAIN), item(PLAIN, 1)]) == IDS
    assert planner.greedy_mode([item(PLAIN), item(SCORING, 1)]) == SCORED
    for other in (
        RANDOM,
        PENALISED,
        MARKED,
        SamplingParams(9, top_logprobs=1),
        SamplingParams(9, logit_bias=((3, 1.0),)),
        SamplingParams(9, frequency_penalty=0.1),
    ):
        assert planner.greedy_mode([item(PLAIN), item(other, 1)]) == NOTHING
        assert planner.greedy_mode([item(PLAIN), item(PLAIN, 1)]) == IDS, "the slot has another owner now"
    waiting = SamplingParams(9, min_new_tokens=2, stop_token_ids=(7, 90))
    assert [planner.greedy_mode([item(waiting, 0, n)]) for n in range(4)] == [NOTHING, NOTHING, IDS, IDS]
    unstoppable = SamplingParams(9, min_new_tokens=2, stop_token_ids=(90,))
    assert planner.greedy_mode([item(unstoppable)]) == IDS
    assert planner.greedy_mode([item(SamplingParams(9, do_sample=True, temperature=0.0))]) == IDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_draws_the_lowest_best_id_and_its_log_probability(dtype: torch.dtype) -> None:
    check_drawing(44, 384, dtype, "cpu")


def test_rows_with_odd_logits_get_what_the_sampler_gives_them() -> None:
    logits = make_logits(44, 384, torch.float32)
    memory = GreedyMemory(torch.zeros(44, dtype=torch.int64), 44, 384, turns=1)
    rows = torch.arange(44)
    for mode, inputs in ((IDS, SamplingInputs()), (SCORED, SamplingInputs(logprob_rows=rows))):
        draw_greedy(logits, torch.tensor([mode, 0], dtype=torch.int32), rows, memory)
        drawn = sample(logits.clone(), inputs)
        assert memory.ids[0].tolist() == drawn.ids.tolist()
        if drawn.logprobs is not None:
            assert torch.equal(memory.logprobs[0], drawn.logprobs)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        [PLAIN] * 3,
        [PLAIN, SCORING, SCORING, PLAIN, SCORING],
        [PLAIN, RANDOM, PENALISED],
        [MARKED, PLAIN, SCORING],
    ],
    ids=["plain", "scored", "sampled", "marked"],
)
def test_graphs_and_overlap_show_in_no_token_and_no_log_probability(
    pair: list[ModelDriver], settings: list[SamplingParams], ahead: bool, recorder: FakeRecorder
) -> None:
    """A batch that draws in the graph, or one that must not: the watermark and penalties of a step ahead need the
    tokens drawn before it."""
    eager, graphs = pair
    want = decode(eager, begin(eager, settings), 9, ahead=False)
    replays = recorder.replays
    got = decode(graphs, begin(graphs, settings), 9, ahead)
    assert recorder.replays == replays + 10
    for one, other in zip(want, got, strict=True):
        assert other.token_ids == one.token_ids
        assert other.top_logprobs == one.top_logprobs
        for a, b, params in zip(one.logprobs, other.logprobs, settings, strict=True):
            assert (a is None) == (b is None) == (params.top_logprobs is None)
            assert a is None or b == pytest.approx(a, abs=1e-4)


def test_batches_that_change_between_greedy_and_sampled_keep_their_last_tokens(
    pair: list[ModelDriver],
) -> None:
    """Sequences that come and go beside one that stays, a step ahead: its next id is on the device alone."""
    answers = []
    for driver in pair:
        stays, marked, sampled = begin(driver, [PLAIN, MARKED, RANDOM])
        groups = [
            [stays],
            [stays, marked],
            [stays, sampled],
            [stays],
            [marked, sampled],
            [stays, marked],
            [stays],
        ]
        for group in groups:
            decode(driver, group, 4, ahead=True)
        answers.append([seq.token_ids for seq in (stays, marked, sampled)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("settings", [PLAIN, SCORING, RANDOM], ids=["plain", "scored", "sampled"])
def test_rows_of_nobody_change_no_ones_last_token(pair: list[ModelDriver], settings: SamplingParams) -> None:
    driver = pair[1]
    others = begin(driver, [PLAIN] * 3)
    driver._free_slots.sort()  # the ones that come now get the last slots
    sequences = begin(driver, [settings] * 3)  # of which a graph for 4 rows has one that is nobody's
    last_token = driver.runner._last_token
    last_token.fill_(123)
    for seq in others:
        last_token[seq.slot] = 200 + seq.slot
    [result] = decode(driver, sequences, 1, ahead=False)
    want = [200 + slot if slot in {seq.slot for seq in others} else 123 for slot in range(8)]
    for seq, token in zip(sequences, result.token_ids, strict=True):
        want[seq.slot] = token
    assert last_token.tolist() == want


class Launches(TorchDispatchMode):
    """Notes the operators that a device would have to launch, but not those in a recording."""

    # Views, and what a look at memory of the host by numpy does.
    _IDLE = ("view", "slice", "select", "detach", "to.dtype_layout", "resolve_conj", "resolve_neg")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.recording = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        if not self.recording and not name.startswith(self._IDLE):
            self.names.append(name)
        return function(*arguments, **(options or {}))


@contextmanager
def launches_of(driver: ModelDriver) -> Any:
    noted = Launches()
    kept = driver.runner._graphs._graphs
    driver.runner._graphs._graphs = {
        key: Recorded(_unseen(noted, recorded.replay), recorded.outputs) for key, recorded in kept.items()
    }
    try:
        with noted:
            yield noted.names
    finally:
        driver.runner._graphs._graphs = kept


def _unseen(noted: Launches, replay: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        noted.names.append("replay")
        noted.recording = True
        replay()
        noted.recording = False

    return run


@pytest.mark.parametrize("settings", [PLAIN, SCORING], ids=["plain", "scored"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_greedy_decode_step_is_one_copy_and_one_graph(
    pair: list[ModelDriver],
    settings: SamplingParams,
    with_adapter: bool,
    tiny_model_path: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
) -> None:
    driver = pair[1]
    sequences = begin(driver, [settings] * 3)
    if with_adapter:
        slot = driver.add_adapter(
            tiny_adapter(tiny_model_path("llama"), rank=12, targets=("q_proj", "down_proj"))
        )
        for seq in sequences[1:]:
            seq.adapter_slot = slot
    batch = driver.batch([(seq, 1) for seq in sequences])
    with launches_of(driver) as names:
        driver.runner.launch(batch)
    assert names == ["copy_.default", "replay"]
