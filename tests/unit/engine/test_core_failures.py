"""Steps that raise: who is told, and what is kept."""

from __future__ import annotations

import pytest
from fakes_engine import (
    FakeAdapter,
    FakeProvider,
    FakeRunner,
    expected_answer,
    make_core,
    make_request,
    make_settings,
)

from lorax_backend.engine.core import EngineCore, EngineSettings
from lorax_backend.errors import EngineDeadError, GenerationError, ValidationError
from lorax_backend.types import EngineRequest, TokenOutput


def run(core: EngineCore, *requests: EngineRequest) -> dict[int, list[TokenOutput]]:
    outputs: dict[int, list[TokenOutput]] = {request.handle: [] for request in requests}
    for request in requests:
        core.add(request)
    while core.has_work:
        for output in core.step():
            outputs[output.handle].append(output)
    core.check_integrity()
    return outputs


def assert_answered(outputs: list[TokenOutput], request: EngineRequest) -> None:
    assert ([output.token_id for output in outputs], outputs[-1].finish_reason) == expected_answer(request)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("place", ["fail_launch", "fail_result"])
def test_a_failed_step_ends_its_sequences_with_an_error_and_nobody_elses(depth: int, place: str) -> None:
    core, runner, _ = make_core(make_settings(max_num_seqs=2), depth=depth)
    getattr(runner, place).add(2)
    requests = [make_request(n, [n], max_new_tokens=6) for n in range(4)]
    outputs = run(core, *requests)
    for request in requests[:2]:
        *_, last = outputs[request.handle]
        assert last.error is not None
        assert last.error["error_type"] == "generation"
        assert "2 fails" in last.error["error"]
    for request in requests[2:]:
        assert_answered(outputs[request.handle], request)
    assert core.stats().blocks_used == 0


@pytest.mark.parametrize("place", ["fail_launch", "fail_result"])
@pytest.mark.parametrize("depth", [1, 2])
def test_prefixes_that_a_failed_step_should_have_written_are_not_used(depth: int, place: str) -> None:
    core, runner, _ = make_core(depth=depth)
    getattr(runner, place).add(0)
    prompt = range(1, 14)
    run(core, make_request(1, prompt))
    request = make_request(2, prompt)
    assert_answered(run(core, request)[2], request)


def test_a_step_launched_after_one_that_failed_is_computed_again() -> None:
    """Step 1 holds a newcomer that shares a prefix which the failed step 0 was to write."""
    core, runner, _ = make_core(make_settings(max_batch_tokens=64), depth=2)
    runner.fail_result.add(1)
    shared = list(range(1, 13))
    core.add(make_request(1, [50], max_new_tokens=40))
    core.step()
    core.add(make_request(2, [*shared, 60]))
    core.step()
    newcomer = make_request(3, [*shared, 70])
    core.add(newcomer)
    outputs = [output for _ in range(12) for output in core.step()]
    ends = {output.handle: output for output in outputs if output.error or output.finish_reason}
    assert ends[2].error is not None
    assert_answered([output for output in outputs if output.handle == 3], newcomer)


def test_the_engine_gives_up_after_three_failed_steps_in_a_row() -> None:
    core, runner, _ = make_core()
    runner.fail_launch.update({1, 3, 4, 5})
    for handle in range(1, 5):
        core.add(make_request(handle, max_new_tokens=1))
        core.step()
    for handle in (5, 6):
        core.add(make_request(handle, max_new_tokens=1))
        if handle == 5:
            [output] = core.step()
            assert output.error is not None
    with pytest.raises(
        EngineDeadError, match="3 steps in a row failed, the last with RuntimeError: launch 5"
    ):
        core.step()


def test_a_result_of_the_wrong_size_is_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    core, runner, _ = make_core()
    compute = runner._compute

    def lose_one(rows: list[object]) -> object:
        result = compute(rows)  # type: ignore[arg-type]
        result.token_ids.pop()
        return result

    monkeypatch.setattr(runner, "_compute", lose_one)
    outputs = run(core, make_request(1), make_request(2))
    assert all(output.error for [output] in outputs.values())


def test_freed_rows_are_told_again_when_the_launch_that_named_them_failed() -> None:
    core, runner, _ = make_core(make_settings(max_num_seqs=2))
    runner.fail_launch.add(1)  # which names the row of request 0
    run(core, make_request(0, max_new_tokens=1), make_request(1, max_new_tokens=5))
    requests = [make_request(n, [n]) for n in (2, 3)]
    outputs = run(core, *requests)
    for request in requests:
        assert_answered(outputs[request.handle], request)
    assert runner.violations == []


def test_control_answers_stats_adapters_and_checks() -> None:
    core, _, _ = make_core(provider=FakeProvider({"falcon": FakeAdapter()}))
    core.add(make_request(1, range(9), adapter="falcon"))
    core.step()
    assert core.control("stats", {})["running"] == 1
    assert core.control("adapters", {}) == {"adapters": [{"id": "falcon", "users": 1}]}
    assert core.control("check", {}) == {"ok": True}
    assert core.control("reset_prefix_cache", {}) == {"ok": True}
    with pytest.raises(ValidationError, match="'reboot' is not one of stats"):
        core.control("reboot", {})
    with pytest.raises(ValidationError, match="takes no arguments, got now"):
        core.control("stats", {"now": 1})


def test_control_passes_commands_about_adapters_on_and_lists_them() -> None:
    core, _, provider = make_core()
    assert core.control("adapter_pin", {"adapter_id": "falcon"}) == {"status": "ready"}
    assert provider.commands == [("adapter_pin", {"adapter_id": "falcon"})]
    with pytest.raises(ValidationError, match="adapter_preload, adapter_pin"):
        core.control("reboot", {})


def test_the_check_asks_the_adapters_too() -> None:
    core, _, provider = make_core()
    provider.users["falcon"] = -1
    with pytest.raises(GenerationError, match="adapters are used less"):
        core.control("check", {})


def test_the_check_raises_when_accounting_is_off() -> None:
    core, _, _ = make_core()
    core.add(make_request(1))
    core.step()
    core.scheduler._running[0].block_table.pop()
    with pytest.raises(GenerationError, match="accounting is off"):
        core.control("check", {})


def test_closing_drains_what_is_in_flight_and_closes_all_parts() -> None:
    core, runner, provider = make_core(depth=2)
    core.add(make_request(1))
    core.step()
    core.close()
    assert runner.closed
    assert provider.closed


@pytest.mark.parametrize("token_id", [-1, 17])
def test_a_token_id_outside_the_vocabulary_is_refused_before_it_can_fail_a_step(token_id: int) -> None:
    settings = EngineSettings(make_settings(), vocab_size=17)
    provider = FakeProvider()
    core = EngineCore(FakeRunner(settings.scheduler, provider), provider, settings)
    [output] = core.add(make_request(1, [0, 16, token_id]))
    assert output.error is not None
    assert output.error["error_type"] == "validation"
    assert output.error["error"] == f"input_ids: {token_id} is not a token of this model; its ids are 0 to 16"
    assert core.add(make_request(2, [0, 16])) == []


@pytest.mark.parametrize("depth", [0, 3])
def test_a_depth_that_the_runner_cannot_follow_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match="depth"):
        EngineSettings(make_settings(), depth)
