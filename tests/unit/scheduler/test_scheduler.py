"""Scenarios of the scheduler, run through the core with a fake model that notices wrong cache contents."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from fakes_engine import (
    STOP_TOKEN,
    FakeAdapter,
    FakeClock,
    FakeProvider,
    expected_answer,
    make_core,
    make_request,
    make_settings,
)

from lorax_backend.engine.core import EngineCore
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.types import EngineRequest, FinishReason, TokenOutput


def run(core: EngineCore, *requests: EngineRequest, steps: int = 500) -> dict[int, list[TokenOutput]]:
    """Add the requests, step until nothing is left to do; the outputs of each."""
    outputs = [output for request in requests for output in core.add(request)]
    for _ in range(steps):
        outputs += core.step()
        if core.stalled and not core.has_work:
            break
    core.check_integrity()
    by_handle: dict[int, list[TokenOutput]] = {request.handle: [] for request in requests}
    for output in outputs:
        by_handle[output.handle].append(output)
    return by_handle


def tokens(outputs: list[TokenOutput]) -> list[int | None]:
    assert all(output.error is None for output in outputs), outputs
    return [output.token_id for output in outputs]


def assert_answered(outputs: list[TokenOutput], request: EngineRequest) -> None:
    key = FakeProvider.key(request.adapter.id) if request.adapter else ""
    assert (tokens(outputs), outputs[-1].finish_reason) == expected_answer(request, key)


def steps_until_done(core: EngineCore, handle: int, feed: Callable[[int], EngineRequest], limit: int) -> int:
    """Step with a new request from `feed` at each step; how many steps until `handle` has its last output."""
    for step in range(limit):
        core.add(feed(step))
        if any(output.handle == handle and output.finish_reason for output in core.step()):
            return step
    pytest.fail(f"request {handle} was not answered within {limit} steps")


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_of_all_lengths_get_the_answers_they_get_alone(depth: int) -> None:
    core, _, _ = make_core(depth=depth)
    requests = [make_request(n, range(1, n + 2), max_new_tokens=1 + n % 7, seed=n) for n in range(1, 30)]
    answers = run(core, *requests)
    for request in requests:
        assert_answered(answers[request.handle], request)


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    core, runner, _ = make_core(make_settings(max_batch_tokens=8))
    core.add(make_request(1, [1, 2], max_new_tokens=20))
    core.step()
    core.add(make_request(2, range(1, 31), max_new_tokens=2))
    for _ in range(5):
        core.step()
    assert runner.batches[1:6] == [[(1, 1), (2, 7)]] * 4 + [[(1, 1), (2, 2)]]


@pytest.mark.parametrize(
    ("prompts", "steps"),
    [
        pytest.param([7], [[1, 7]], id="it fits a small step"),
        pytest.param([12], [[1, 7], [1, 5]], id="two small steps"),
        pytest.param([9, 5], [[1, 7], [1, 2, 5], [1, 1, 1]], id="several prompts"),
        pytest.param([30], [[1, 15], [1, 7], [1, 7], [1, 1]], id="more than two are worth large steps"),
    ],
)
def test_few_prompts_come_in_small_steps_beside_those_that_decode(
    prompts: list[int], steps: list[list[int]]
) -> None:
    core, runner, _ = make_core(make_settings(max_batch_tokens=16, small_step_tokens=8))
    core.add(make_request(1, [1, 2], max_new_tokens=20))
    core.step()
    for handle, length in enumerate(prompts, 2):
        core.add(make_request(handle, [handle] * length, max_new_tokens=4))
    for _ in steps:
        core.step()
    assert [[count for _, count in batch] for batch in runner.batches[1 : 1 + len(steps)]] == steps


def test_prompts_that_nobody_waits_beside_come_in_large_steps() -> None:
    core, runner, _ = make_core(make_settings(max_batch_tokens=16, small_step_tokens=8))
    core.add(make_request(1, [1] * 15, max_new_tokens=2))
    core.step()
    assert runner.batches == [[(1, 15)]]


def test_without_chunked_prefill_a_prompt_is_computed_whole() -> None:
    limits = make_settings(max_batch_tokens=8, max_input_length=30, chunked_prefill=False)
    core, runner, _ = make_core(limits)
    requests = [make_request(n, [n] * (10 * n), max_new_tokens=6) for n in (1, 2, 3)]
    answers = run(core, *requests)
    for request in requests:
        assert_answered(answers[request.handle], request)
    chunks = {handle: count for batch in reversed(runner.batches) for handle, count in batch}
    assert chunks == {1: 10, 2: 20, 3: 30}


def test_without_chunked_prefill_decodes_are_held_up_for_one_step_at_a_time() -> None:
    limits = make_settings(max_batch_tokens=8, max_input_length=16, chunked_prefill=False, num_blocks=64)
    core, runner, _ = make_core(limits)
    core.add(make_request(1, [1, 2], max_new_tokens=30))
    core.step()
    for handle in range(2, 6):
        core.add(make_request(handle, [handle] * 16, max_new_tokens=2))
    for _ in range(12):
        core.step()
    missed = [not any(handle == 1 for handle, _ in batch) for batch in runner.batches]
    assert any(missed)
    assert not any(a and b for a, b in pairwise(missed))


def test_without_chunked_prefill_no_sequence_misses_two_steps_for_the_prompts_of_others() -> None:
    limits = make_settings(max_batch_tokens=8, max_input_length=16, chunked_prefill=False, num_blocks=64)
    core, runner, _ = make_core(limits)
    for handle in range(1, 7):
        core.add(make_request(handle, [handle], max_new_tokens=30))
    core.step()
    for handle in range(7, 12):
        core.add(make_request(handle, [handle] * 12, max_new_tokens=1))
    for _ in range(8):
        core.step()
    for handle in range(1, 7):
        missed = [not any(handle == running for running, _ in batch) for batch in runner.batches]
        assert not any(a and b for a, b in pairwise(missed))
    assert any(len(batch) < 6 for batch in runner.batches), "no prompt was ever given the step"


def test_when_blocks_run_out_the_latest_arrival_is_preempted_and_loses_nothing() -> None:
    core, runner, _ = make_core(make_settings(num_blocks=8, prefix_caching=False))
    first = make_request(1, range(1, 9), max_new_tokens=20)
    second = make_request(2, range(11, 17), max_new_tokens=20)
    answers = run(core, first, second)
    assert core.scheduler.num_preemptions > 0
    assert_answered(answers[1], first)
    assert_answered(answers[2], second)
    last_of_first = max(n for n, batch in enumerate(runner.batches) if batch[0][0] == 1)
    assert all((1, 1) in batch for batch in runner.batches[1 : last_of_first + 1]), (
        "the first was never interrupted"
    )


def test_the_lowest_priority_is_preempted_before_the_latest_arrival() -> None:
    core, _, _ = make_core(make_settings(num_blocks=8, prefix_caching=False))
    unimportant = make_request(1, range(1, 9), max_new_tokens=12, priority=-1)
    important = make_request(2, range(11, 17), max_new_tokens=20)
    core.add(unimportant)
    core.step()
    core.add(important)
    while not core.scheduler.num_preemptions:
        core.step()
    running = core.scheduler._running
    assert [seq.handle for seq in running] == [2]


def test_a_sequence_preempted_with_its_token_under_way_waits_for_that_token() -> None:
    core, runner, _ = make_core(make_settings(num_blocks=4, prefix_caching=False), depth=2)
    scheduler = core.scheduler
    core.add(make_request(1, [1] * 7, max_new_tokens=8))
    core.add(make_request(2, [2] * 4, max_new_tokens=8))
    steps = []
    while not scheduler.num_preemptions:
        if len(steps) == 2:
            batch, launched = steps.pop(0)
            scheduler.update(batch, launched.result())
        batch = scheduler.schedule()
        assert batch is not None
        steps.append((batch, runner.launch(batch)))
    [preempted] = scheduler._waiting
    assert preempted.num_in_flight == 1
    known = len(preempted.token_ids)
    scheduler.cancel(1)  # there is room for the other now
    assert scheduler.schedule() is None
    for batch, launched in steps:
        scheduler.update(batch, launched.result())
    assert len(preempted.token_ids) == known + 1
    batch = scheduler.schedule()
    assert batch is not None
    assert [item.seq for item in batch.sequences] == [preempted]
    assert runner.violations == []


def test_a_newcomer_leaves_the_running_sequences_room_to_grow() -> None:
    core, _, _ = make_core(make_settings(num_blocks=8, prefix_caching=False))
    answers = run(
        core, make_request(1, range(4), max_new_tokens=4), make_request(2, range(27), max_new_tokens=2)
    )
    assert core.scheduler.num_preemptions == 0
    assert answers[2][-1].finish_reason is not None


@pytest.mark.parametrize("depth", [1, 2])
def test_preemption_never_shows_in_the_output(depth: int) -> None:
    def answers(num_blocks: int) -> tuple[dict[int, Any], int]:
        core, _, _ = make_core(make_settings(num_blocks=num_blocks), depth=depth)
        requests = [make_request(n, [n, 1, 2], max_new_tokens=24, seed=n) for n in range(6)]
        result = run(core, *requests)
        return {n: tokens(outputs) for n, outputs in result.items()}, core.scheduler.num_preemptions

    roomy, none = answers(100)
    tight, some = answers(9)
    assert none == 0
    assert some > 3
    assert tight == roomy


def test_a_preempted_sequence_finds_its_blocks_in_the_prefix_cache() -> None:
    core, runner, _ = make_core(make_settings(num_blocks=12))
    requests = [make_request(n, range(20 * n, 20 * n + 12), max_new_tokens=16) for n in (1, 2)]
    answers = run(core, *requests)
    assert core.scheduler.num_preemptions > 0
    for request in requests:
        assert_answered(answers[request.handle], request)
    resumed = [count for batch in runner.batches for handle, count in batch if handle == 2 and count > 1]
    assert sum(resumed) < 12 + 20, "everything was computed again"


@pytest.mark.parametrize("depth", [1, 2])
def test_a_shared_prefix_is_computed_once(depth: int) -> None:
    core, _, _ = make_core(depth=depth)
    system = list(range(1, 13))
    first = make_request(1, [*system, 50], max_new_tokens=3)
    second = make_request(2, [*system, 60], max_new_tokens=3)
    run(core, first)
    answers = run(core, second)
    assert answers[2][0].cached_tokens == 12
    assert_answered(answers[2], second)
    assert core.stats().cached_prompt_tokens == 12


def test_a_prompt_that_is_cached_whole_still_computes_its_last_block() -> None:
    core, _, _ = make_core()
    request = make_request(1, range(1, 9))
    again = make_request(2, range(1, 9))
    run(core, request)
    answers = run(core, again)
    assert answers[2][0].cached_tokens == 4
    assert_answered(answers[2], again)


def test_a_chat_turn_finds_the_answer_before_it_in_the_cache() -> None:
    core, _, _ = make_core()
    request = make_request(1, range(1, 9), max_new_tokens=9)
    answer = [token for token in tokens(run(core, request)[1]) if token is not None]
    following = make_request(2, [*request.prompt_ids, *answer, 1])
    assert run(core, following)[2][0].cached_tokens == 16


def test_adapters_do_not_share_each_others_prefixes() -> None:
    provider = FakeProvider({"falcon": FakeAdapter(), "otter": FakeAdapter()})
    core, _, _ = make_core(provider=provider)
    requests = [make_request(n, range(1, 14), adapter) for n, adapter in enumerate(["falcon", "otter", None])]
    for request in requests:
        answers = run(core, request)
        assert answers[request.handle][0].cached_tokens == 0
        assert_answered(answers[request.handle], request)


def test_a_stop_token_ends_the_answer_and_is_part_of_it() -> None:
    core, _, _ = make_core()
    requests = [
        make_request(n, [1, n], max_new_tokens=40, seed=n, stop_token_ids=(STOP_TOKEN,)) for n in range(5)
    ]
    for request, outputs in zip(requests, run(core, *requests).values(), strict=True):
        assert_answered(outputs, request)
        if outputs[-1].finish_reason is FinishReason.EOS:
            assert outputs[-1].token_id == STOP_TOKEN


def test_a_stop_token_drawn_before_min_new_tokens_does_not_end_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, _, _ = make_core()
    monkeypatch.setattr("fakes_engine.next_token", lambda *_: STOP_TOKEN)
    request = make_request(1, max_new_tokens=8, min_new_tokens=3, stop_token_ids=(STOP_TOKEN,))
    assert len(run(core, request)[1]) == 4


def test_length_wins_when_the_last_token_is_a_stop_token(monkeypatch: pytest.MonkeyPatch) -> None:
    core, _, _ = make_core()
    monkeypatch.setattr("fakes_engine.next_token", lambda *_: STOP_TOKEN)
    outputs = run(core, make_request(1, max_new_tokens=1, stop_token_ids=(STOP_TOKEN,)))[1]
    assert [output.finish_reason for output in outputs] == [FinishReason.LENGTH]


@pytest.mark.parametrize(
    ("changes", "prompt_len", "max_new_tokens", "words"),
    [
        ({}, 65, 1, ["prompt", "65", "max_input_length=64"]),
        ({}, 60, 60, ["max_new_tokens=60", "max_total_tokens=96"]),
        ({"num_blocks": 4}, 8, 10, ["max_new_tokens=10", "5 KV blocks of 4", "has 4"]),
        ({}, 0, 1, ["prompt"]),
        ({}, 4, 0, ["max_new_tokens", "0"]),
    ],
)
def test_a_request_that_can_never_fit_is_refused_with_the_limit(
    changes: dict[str, int], prompt_len: int, max_new_tokens: int, words: list[str]
) -> None:
    core, _, provider = make_core(make_settings(**changes))
    [output] = core.add(make_request(1, [1] * prompt_len, "falcon", max_new_tokens=max_new_tokens))
    assert output.error is not None
    assert output.error["error_type"] == "validation"
    assert all(word in output.error["error"] for word in words), output.error
    assert provider.num_wanted == 0


def test_a_request_that_just_fits_runs_alone() -> None:
    core, _, _ = make_core(make_settings(num_blocks=4))
    request = make_request(1, range(8), max_new_tokens=9)
    assert_answered(run(core, request)[1], request)


def test_higher_priority_is_admitted_first_and_equals_by_arrival() -> None:
    core, runner, _ = make_core(make_settings(max_num_seqs=1))
    for handle, priority in [(1, 0), (2, -1), (3, 5), (4, 0)]:
        core.add(make_request(handle, [handle], max_new_tokens=1, priority=priority))
    while core.has_work:
        core.step()
    assert [batch[0][0] for batch in runner.batches] == [3, 1, 4, 2]


def test_low_priority_does_not_starve_under_a_stream_of_high_priority() -> None:
    clock = FakeClock()
    core, _, _ = make_core(make_settings(max_num_seqs=1, priority_weight_s=10.0), clock=clock)
    core.add(make_request(10**6, [1], max_new_tokens=1, priority=0))

    def feed(step: int) -> EngineRequest:
        clock.now += 1.0
        return make_request(step, [1], max_new_tokens=1, priority=3)

    assert 20 <= steps_until_done(core, 10**6, feed, 100) <= 35


def test_a_large_prompt_is_passed_over_only_for_a_while() -> None:
    clock = FakeClock()
    core, _, _ = make_core(make_settings(num_blocks=8, prefix_caching=False, skip_bound_s=5.0), clock=clock)
    for handle in (1, 2):
        core.add(make_request(handle, [handle] * 6, max_new_tokens=4))
    core.step()
    core.add(make_request(10**6, [1] * 26, max_new_tokens=2))

    def feed(step: int) -> EngineRequest:
        clock.now += 1.0
        return make_request(100 + step, [1] * 6, max_new_tokens=4)

    steps = steps_until_done(core, 10**6, feed, 60)
    assert 5 < steps < 20, "small ones go first for the bound of 5 s, then room gathers for the large one"


def test_an_adapter_without_room_is_passed_over_only_for_a_while() -> None:
    clock = FakeClock()
    provider = FakeProvider({"falcon": FakeAdapter(), "otter": FakeAdapter()}, num_slots=1)
    core, _, _ = make_core(make_settings(skip_bound_s=5.0), provider, clock=clock)
    core.add(make_request(1, [1], "falcon", max_new_tokens=8))
    core.step()
    core.add(make_request(10**6, [1], "otter", max_new_tokens=1))

    def feed(step: int) -> EngineRequest:
        clock.now += 1.0
        return make_request(100 + step, [1], "falcon", max_new_tokens=8)

    assert 5 < steps_until_done(core, 10**6, feed, 60) < 20


def test_many_requests_of_an_adapter_without_room_do_not_hold_up_the_base_model() -> None:
    provider = FakeProvider({"falcon": FakeAdapter(), "otter": FakeAdapter()}, num_slots=1)
    core, runner, _ = make_core(provider=provider)
    core.add(make_request(1, [1], "falcon", max_new_tokens=50))
    core.step()
    for handle in range(2, 100):
        core.add(make_request(handle, [1], "otter"))
    core.add(make_request(100, [1]))
    core.step()
    assert [handle for handle, _ in runner.batches[-1]] == [1, 100]


def test_requests_whose_adapter_is_loading_hold_up_nobody() -> None:
    provider = FakeProvider({"late": FakeAdapter(polls=None)})
    core, _, _ = make_core(provider=provider)
    waiting, other = make_request(1, adapter="late"), make_request(2)
    answers = run(core, waiting, other)
    assert answers[1] == []
    assert_answered(answers[2], other)
    provider.finish_loading("late")
    outputs = [output for _ in range(10) for output in core.step()]
    assert_answered(outputs, waiting)


def test_an_adapter_that_cannot_be_loaded_ends_only_its_own_requests() -> None:
    core, _, provider = make_core(provider=FakeProvider({"broken": FakeAdapter(fails=True)}))
    good = make_request(2)
    answers = run(core, make_request(1, adapter="broken"), good)
    assert [output.error["error_type"] for output in answers[1] if output.error] == ["adapter_not_found"]
    assert_answered(answers[2], good)
    assert provider.num_wanted == 0


def test_a_request_whose_adapter_is_unloaded_while_it_waits_goes_on_waiting() -> None:
    provider = FakeProvider({"falcon": FakeAdapter()})
    core, _, _ = make_core(make_settings(max_num_seqs=1), provider)
    running, waiting = make_request(1, max_new_tokens=3), make_request(2, adapter="falcon")
    core.add(running)
    core.add(waiting)
    core.step()
    provider.unload("falcon")
    outputs = [output for _ in range(6) for output in core.step()]
    assert {output.handle for output in outputs} == {1}
    provider.finish_loading("falcon")
    assert_answered([output for _ in range(6) for output in core.step()], waiting)


def test_an_adapter_larger_than_the_device_is_refused() -> None:
    core, _, provider = make_core(provider=FakeProvider({"huge": FakeAdapter(pages=9)}))
    [output] = run(core, make_request(1, adapter="huge"))[1]
    assert output.error is not None
    assert output.error["error_type"] == "adapter_too_large"
    assert "local:huge" in output.error["error"]
    assert provider.num_wanted == 0


def test_an_adapter_is_not_overwritten_while_a_launched_step_reads_it() -> None:
    provider = FakeProvider({"falcon": FakeAdapter(), "otter": FakeAdapter()}, num_slots=1)
    core, runner, _ = make_core(provider=provider, depth=2)
    core.add(make_request(1, [1], "falcon", max_new_tokens=10))
    core.add(make_request(2, [1], "otter", max_new_tokens=2))
    for _ in range(4):
        core.step()
    core.cancel(1)  # the step in flight still reads falcon's pages; the fake would notice
    outputs = [output for _ in range(8) for output in core.step()]
    assert_answered(outputs, make_request(2, [1], "otter", max_new_tokens=2))
    assert runner.violations == []


@pytest.mark.parametrize("depth", [1, 2])
def test_a_cancelled_request_frees_everything_and_says_nothing_more(depth: int) -> None:
    provider = FakeProvider({"falcon": FakeAdapter()})
    core, _, _ = make_core(provider=provider, depth=depth)
    core.add(make_request(1, range(30), "falcon", max_new_tokens=30))
    for _ in range(6):
        core.step()
    core.cancel(1)
    assert core.stats().blocks_used == 0
    assert [output for _ in range(3) for output in core.step()] == []
    assert provider.users == {"falcon": 0}
    assert provider.num_wanted == 0


def test_no_step_is_launched_for_a_sequence_whose_last_token_is_under_way() -> None:
    core, runner, _ = make_core(depth=2)
    run(core, make_request(1, [1], max_new_tokens=3))
    assert runner.launches == 3


def test_a_row_is_told_to_the_runner_when_it_becomes_free() -> None:
    """The fake refuses a row whose owner changed without notice; here one row serves many."""
    core, runner, _ = make_core(make_settings(max_num_seqs=1), depth=2)
    requests = [make_request(n, [n], max_new_tokens=2) for n in range(5)]
    answers = run(core, *requests)
    for request in requests:
        assert_answered(answers[request.handle], request)
    assert {len(batch) for batch in runner.batches} == {1}


def test_more_rows_than_step_tokens_are_never_used() -> None:
    core, runner, _ = make_core(make_settings(max_num_seqs=8, max_batch_tokens=3))
    requests = [make_request(n, [n], max_new_tokens=6) for n in range(8)]
    answers = run(core, *requests)
    for request in requests:
        assert_answered(answers[request.handle], request)
    assert max(map(len, runner.batches)) == 3


def test_queue_time_is_measured_from_submission_to_the_first_step() -> None:
    clock = FakeClock()
    core, _, _ = make_core(make_settings(max_num_seqs=1), clock=clock)
    core.add(make_request(1, max_new_tokens=1))
    core.add(make_request(2, max_new_tokens=1))
    clock.now = 2.5
    assert [output.queue_s for output in core.step()] == [2.5]
    clock.now = 4.0
    assert [output.queue_s for output in core.step()] == [4.0]


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "max_num_seqs", "max_batch_tokens"])
def test_a_budget_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make_settings(**{name: 0})


def test_the_fake_runner_notices_a_foreign_block() -> None:
    """The tests above rest on this."""
    settings: SchedulerSettings = make_settings(prefix_caching=False)
    core, runner, _ = make_core(settings)
    core.add(make_request(1, range(6), max_new_tokens=8))
    core.step()
    runner.cache[core.scheduler._running[0].block_table[0]][1] = ("", 1, 99)
    [output] = core.step()
    assert output.error is not None
    assert "wrong cache contents" in output.error["error"]
    assert runner.violations == ["wrong cache contents"]


@pytest.mark.parametrize("depth", [1, 2])
def test_prompt_log_probabilities_come_whole_with_the_first_token_whatever_is_cached_or_preempted(
    depth: int,
) -> None:
    """The fake model's log probability of a prompt token is the token itself."""
    core, _, _ = make_core(make_settings(num_blocks=9, max_batch_tokens=8), depth=depth)
    requests = [
        make_request(n, range(n, n + 12), max_new_tokens=14, prompt_logprobs=n != 2) for n in (1, 1, 2, 3)
    ]
    for handle, request in enumerate(requests):
        request.handle = handle
    answers = run(core, *requests)
    assert core.scheduler.num_preemptions > 0
    for request in requests:
        first, *others = answers[request.handle]
        asked = request.sampling.prompt_logprobs
        assert first.prompt_logprobs == (tuple(map(float, request.prompt_ids[1:])) if asked else None)
        assert all(output.prompt_logprobs is None for output in others)
        assert asked <= (first.cached_tokens == 0)
        assert_answered(answers[request.handle], request)


def test_a_request_without_a_right_to_its_adapter_waits_while_others_run_with_it() -> None:
    core, _, provider = make_core(provider=FakeProvider({"falcon": FakeAdapter()}))
    provider.withheld.add(1)
    held, other = make_request(1, adapter="falcon"), make_request(2, adapter="falcon")
    answers = run(core, held, other)
    assert answers[1] == []
    assert_answered(answers[2], other)
    provider.withheld.clear()
    assert_answered([output for _ in range(6) for output in core.step()], held)
