"""Steps launched ahead of the tokens of the last show in nothing that a caller sees.

The owner of a request may end it by what it reads, as a stop string does, or at some number of tokens, as a caller who
goes away does. With overlap a step is under way by then, and its token must be dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes_engine import (
    STOP_TOKEN,
    FakeAdapter,
    FakeProvider,
    expected_answer,
    make_core,
    make_request,
    make_settings,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_backend.config import load_config
from lorax_backend.engine.build import build_engine
from lorax_backend.engine.core import EngineCore, EngineSettings
from lorax_backend.types import EngineRequest, FinishReason, SamplingParams

_MAX_STEPS = 3000


@dataclass(frozen=True)
class Call:
    """A request, the step at which it comes, and what makes its owner end it: one token straight after the other, or
    a number of tokens."""

    at_step: int
    request: EngineRequest
    stop_string: tuple[int, int] | None = None
    cancelled_at: int | None = None

    def is_enough(self, answer: Sequence[int | None]) -> bool:
        stopped = self.stop_string is not None and tuple(answer[-2:]) == self.stop_string
        return stopped or len(answer) == self.cancelled_at


def serve(core: EngineCore, calls: Sequence[Call]) -> dict[int, tuple[list[int | None], FinishReason | None]]:
    """Answer all; of each the tokens that its owner took, and why it ended if the owner did not end it."""
    answers: dict[int, tuple[list[int | None], FinishReason | None]] = {}
    live: dict[int, Call] = {}
    coming = sorted(calls, key=lambda call: call.at_step)
    for step in range(_MAX_STEPS):
        while coming and coming[0].at_step <= step:
            call = coming.pop(0)
            live[call.request.handle], answers[call.request.handle] = call, ([], None)
            core.add(call.request)
        for output in core.step():
            assert output.error is None
            assert output.handle in live, "an output of a request that is over"
            answer = answers[output.handle][0]
            answer.append(output.token_id)
            if output.finish_reason is not None or live[output.handle].is_enough(answer):
                answers[output.handle] = (answer, output.finish_reason)
                core.cancel(output.handle)
                del live[output.handle]
        core.check_integrity()
        if not coming and not live:
            break
    assert not live
    while not core.stalled:
        assert core.step() == []
    assert core.stats().blocks_used == 0
    return answers


_CALLS = st.lists(
    st.tuples(
        st.integers(0, 20),  # the step at which it comes
        st.lists(st.integers(1, 3), min_size=1, max_size=14),  # prompt
        st.sampled_from([None, None, "a", "b"]),  # adapter
        st.integers(1, 18),  # max_new_tokens
        st.none() | st.integers(0, 16),  # which two tokens of its answer are the stop string
        st.none() | st.integers(1, 10),  # cancelled at
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=120, deadline=None)
@given(
    drawn=_CALLS,
    num_blocks=st.integers(9, 24),
    rows=st.integers(1, 5),
    budget=st.integers(2, 24),
    caching=st.booleans(),
)
def test_overlap_never_shows_in_an_answer(
    drawn: list[tuple[int, list[int], str | None, int, int | None, int | None]],
    num_blocks: int,
    rows: int,
    budget: int,
    caching: bool,
) -> None:
    calls = []
    for handle, (at_step, prompt, adapter, max_new_tokens, stop_at, cancelled_at) in enumerate(drawn):
        request = make_request(
            handle, prompt, adapter, max_new_tokens=max_new_tokens, stop_token_ids=(STOP_TOKEN,), seed=handle
        )
        alone = expected_answer(request, FakeProvider.key(adapter) if adapter else "")[0]
        stop_string = None
        if stop_at is not None and len(alone) > 1:
            place = stop_at % (len(alone) - 1)
            stop_string = (alone[place], alone[place + 1])
        calls.append(Call(at_step, request, stop_string, cancelled_at))
    limits = make_settings(
        num_blocks=num_blocks, max_num_seqs=rows, max_batch_tokens=budget, prefix_caching=caching
    )
    answers = []
    for depth in (1, 2):
        adapters = {"a": FakeAdapter(), "b": FakeAdapter(polls=3)}
        core, runner, provider = make_core(limits, FakeProvider(adapters, num_slots=1), depth)
        answers.append(serve(core, calls))
        assert runner.violations == []
        assert not any(provider.users.values())
    assert answers[0] == answers[1]
    for call in calls:
        key = FakeProvider.key(call.request.adapter.id) if call.request.adapter else ""
        alone, reason = expected_answer(call.request, key)
        ends = [n for n in range(1, len(alone)) if call.is_enough(alone[:n])]
        expected = (alone[: ends[0]], None) if ends else (alone, reason)
        assert answers[0][call.request.handle] == expected


@pytest.mark.parametrize("num_blocks", [64, 26])
def test_overlap_never_shows_in_an_answer_of_a_real_model(
    num_blocks: int, tiny_model_path: Callable[..., Path]
) -> None:
    """Greedy, penalised and sampled, ended by tokens, lengths, stop strings and cancellations; with few blocks, also
    preempted in between."""
    samplings = [
        SamplingParams(24),
        SamplingParams(17, repetition_penalty=1.4),
        SamplingParams(24, do_sample=True, temperature=1.2, seed=5),
    ]
    requests = [EngineRequest(n, [*range(10, 22), *[30 + n] * (n % 5)], samplings[n % 3]) for n in range(12)]

    def core_of(depth: int) -> EngineCore:
        texts = {"device": "cpu", "num_blocks": str(num_blocks), "block_size": "4", "adapter_pages": "8"}
        more = {"max_batch_size": "6", "max_batch_tokens": "32", "max_total_tokens": "64"}
        built = build_engine(load_config({**texts, **more}, {}), tiny_model_path(), lambda line: None).core
        settings = EngineSettings(built.scheduler.settings, depth)
        return EngineCore(built._runner, built.adapters, settings)

    plain_core = core_of(1)
    plain = serve(plain_core, [Call(0, request) for request in requests])
    plain_core.close()
    calls = []
    for n, request in enumerate(requests):
        tokens = [token for token in plain[n][0] if token is not None]
        stop_string = (tokens[6], tokens[7]) if n % 3 == 1 else None
        calls.append(Call(n, request, stop_string, cancelled_at=5 if n % 4 == 3 else None))
    answers = []
    for depth in (1, 2):
        core = core_of(depth)
        answers.append(serve(core, calls))
        assert (core.stats().preemptions > 0) == (num_blocks == 26)
        core.close()
    assert answers[0] == answers[1]
    for call in calls:
        answer, reason = answers[0][call.request.handle]
        assert answer == plain[call.request.handle][0][: len(answer)]
        assert reason is not None or call.is_enough(answer)
