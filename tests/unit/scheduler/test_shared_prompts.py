"""Prompts that begin alike and come at once: the common part is computed once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from fakes_engine import (
    FakeAdapter,
    FakeClock,
    FakeProvider,
    FakeRunner,
    expected_answer,
    make_core,
    make_request,
    make_settings,
)

from lorax_backend.engine.core import EngineCore
from lorax_backend.types import EngineRequest, TokenOutput

_PROMPT = [token % 7 for token in range(64)]


def roomy(**changes: Any) -> Any:
    values = {"num_blocks": 256, "block_size": 16, "max_num_seqs": 32, "max_batch_tokens": 2048}
    return make_settings(**{**values, "max_input_length": 400, "max_total_tokens": 500, **changes})


def finish(core: EngineCore, requests: Iterable[EngineRequest], done: Iterable[TokenOutput] = ()) -> None:
    """Step to the end; every request must get the answer it gets alone."""
    answers: dict[int, list[int | None]] = {}
    outputs = [*done, *core.step()]  # which also finds the adapters loaded
    while core.has_work:
        outputs += core.step()
        core.check_integrity()
    for output in outputs:
        assert output.error is None
        answers.setdefault(output.handle, []).append(output.token_id)
    for request in requests:
        key = FakeProvider.key(request.adapter.id) if request.adapter else ""
        assert answers[request.handle] == expected_answer(request, key)[0]


def computed(runner: FakeRunner) -> int:
    return sum(count for batch in runner.batches for _, count in batch)


@pytest.mark.parametrize("adapter", [None, "falcon"])
@pytest.mark.parametrize("depth", [1, 2])
def test_several_answers_to_one_prompt_compute_it_once(depth: int, adapter: str | None) -> None:
    provider = FakeProvider({"falcon": FakeAdapter()})
    core, runner, _ = make_core(roomy(), provider, depth)
    requests = [make_request(n, _PROMPT, adapter, max_new_tokens=1, seed=n) for n in range(4)]
    for request in requests:
        core.add(request)
    finish(core, requests)
    assert computed(runner) == 64 + 3 * 16  # the last block is computed by each: its logits are needed
    assert [len(batch) for batch in runner.batches] == [1, 3]
    assert core.stats().cached_prompt_tokens == 3 * 48


@pytest.mark.parametrize("depth", [1, 2])
def test_many_requests_with_one_system_prompt_compute_it_once(depth: int) -> None:
    core, runner, _ = make_core(roomy(), depth=depth)
    requests = [make_request(n, [*_PROMPT, n % 7, n // 7, 1, 2, 3], max_new_tokens=1) for n in range(32)]
    for request in requests:
        core.add(request)
    finish(core, requests)
    assert computed(runner) == 64 + 32 * 5


def test_a_prompt_under_way_is_waited_for_through_all_its_chunks() -> None:
    core, runner, _ = make_core(roomy(max_batch_tokens=24))
    requests = [make_request(n, _PROMPT, max_new_tokens=1, seed=n) for n in range(3)]
    for request in requests:
        core.add(request)
    finish(core, requests)
    assert computed(runner) == 64 + 2 * 16


def test_requests_that_wait_for_a_prefix_hold_up_nobody_behind_them() -> None:
    core, runner, _ = make_core(roomy(max_batch_tokens=40))
    requests = [make_request(n, _PROMPT, max_new_tokens=1) for n in range(3)]
    other = make_request(9, [5, 5], max_new_tokens=1)
    for request in (*requests, other):
        core.add(request)
    outputs = [output for _ in range(2) for output in core.step()]
    assert runner.batches == [[(0, 40)], [(0, 24), (9, 2)]]
    finish(core, [*requests, other], outputs)


@pytest.mark.parametrize("how", ["cancelled", "preempted"])
@pytest.mark.parametrize("depth", [1, 2])
def test_when_the_one_that_computes_the_prefix_stops_the_next_goes_on_from_there(
    depth: int, how: str
) -> None:
    core, runner, _ = make_core(roomy(max_batch_tokens=24), depth=depth)
    requests = [make_request(n, _PROMPT, max_new_tokens=2, seed=n) for n in range(3)]
    for request in requests:
        core.add(request)
    core.step()
    assert [handle for handle, _ in runner.batches[-1]] == [0]
    if how == "cancelled":
        core.cancel(0)
    else:
        core.scheduler._preempt(core.scheduler._running[0])
    finish(core, requests[how == "cancelled" :])
    prompts = computed(runner) - (2 if how == "cancelled" else 3)
    # The first block was whole when it stopped, the eight tokens behind it were lost.
    assert prompts == (24 + 48 + 16 if how == "cancelled" else 24 + 48 + 16 + 16)


@pytest.mark.parametrize("how", ["no prefix caching", "prompt_logprobs"])
def test_nobody_waits_who_could_not_take_the_prefix_up(how: str) -> None:
    core, runner, _ = make_core(roomy(prefix_caching=how == "prompt_logprobs"))
    asked = how == "prompt_logprobs"
    requests = [make_request(n, _PROMPT, max_new_tokens=1, prompt_logprobs=asked) for n in range(4)]
    for request in requests:
        core.add(request)
    finish(core, requests)
    assert [len(batch) for batch in runner.batches] == [4]


def test_other_adapters_prompts_are_not_waited_for() -> None:
    core, runner, _ = make_core(roomy(), FakeProvider({"falcon": FakeAdapter(), "otter": FakeAdapter()}))
    names = (None, "falcon", "otter")
    requests = [make_request(n, _PROMPT, name, max_new_tokens=1) for n, name in enumerate(names)]
    for request in requests:
        core.add(request)
    finish(core, requests)
    assert [len(batch) for batch in runner.batches] == [3]


def test_a_prefix_that_is_little_of_the_prompt_is_not_waited_for() -> None:
    core, runner, _ = make_core(roomy())
    requests = [make_request(n, [*_PROMPT[:16], *[n] * 100], max_new_tokens=1) for n in range(3)]
    for request in requests:
        core.add(request)
    finish(core, requests)
    assert [len(batch) for batch in runner.batches] == [3]


def test_a_prefix_is_waited_for_no_longer_than_a_prompt_without_room_is_passed_over() -> None:
    """Somebody computes the prefix over and over again and never gets there, as under a storm of preemptions."""
    clock = FakeClock()
    core, runner, _ = make_core(roomy(skip_bound_s=5.0), clock=clock)
    core.add(make_request(1, _PROMPT, max_new_tokens=1))
    announced = core.scheduler.blocks._announced
    core.scheduler.blocks.match(next(iter(core.scheduler._waiting)))
    hashes = next(iter(core.scheduler._waiting)).block_hashes
    announced.update(dict.fromkeys(hashes, 1))
    for now in range(6):
        clock.now = float(now)
        core.step()
    assert runner.batches == []
    clock.now = 5.1
    core.step()
    assert runner.batches == [[(1, 64)]]


def test_no_row_is_taken_back_for_a_request_that_waits_for_a_prefix() -> None:
    """The waiting one has a right to a row of the flood's, and will use it when it can."""
    provider = FakeProvider({"a": FakeAdapter(), "b": FakeAdapter()})
    limits = make_settings(num_blocks=256, max_total_tokens=200, adapter_weights={"b": 10.0})
    core, _, _ = make_core(limits, provider)
    core.add(make_request(99, [1], "b", max_new_tokens=1))  # so that one row is kept from the flood
    core.step()
    for n in range(20):
        core.add(make_request(n, [n], "a", max_new_tokens=90))
    for _ in range(2):
        core.step()
    for n in (100, 101):
        core.add(make_request(n, [1, *range(59)], "b", max_new_tokens=20))
    for _ in range(5):
        core.step()
    leader = next(seq for seq in core.scheduler._running if seq.handle == 100)
    assert leader.num_computed < leader.prompt_len, "the prompt is still being computed"
    assert core.scheduler.num_running == 8
    assert core.scheduler.num_preemptions == 0
    for _ in range(5):
        core.step()
    assert core.scheduler.num_preemptions == 1


def test_a_flood_of_requests_that_wait_for_a_prefix_is_not_looked_through_in_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, runner, _ = make_core(roomy(max_batch_tokens=100))
    looked_at: list[int] = []
    match = core.scheduler.blocks.match
    monkeypatch.setattr(
        core.scheduler.blocks, "match", lambda seq: (looked_at.append(seq.handle), match(seq))[1]
    )
    for n in range(300):
        core.add(make_request(n, _PROMPT, max_new_tokens=1))
    core.step()
    assert runner.batches == [[(0, 64)]]
    assert len(looked_at) == 33
