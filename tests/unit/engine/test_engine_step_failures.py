"""Steps that raise, in both kinds of engine: every caller hears of one end, and the engine goes on or says that it is
dead."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from fakes_engine import FakeProvider, expected_answer, make_request
from recording_owner import RecordingOwner

from lorax_backend.engine.client import EngineClientBase
from lorax_backend.errors import EngineDeadError
from lorax_backend.types import EngineRequest

Start = Callable[..., tuple[EngineClientBase, RecordingOwner]]


def make_requests(count: int) -> list[EngineRequest]:
    adapters = (None, "falcon", "otter")
    return [
        make_request(n, [1 + n % 2] * (1 + n % 40), adapters[n % 3], max_new_tokens=1 + n % 9, seed=n)
        for n in range(count)
    ]


def ends_of(owner: RecordingOwner, request: EngineRequest) -> list[dict[str, Any] | None]:
    """The error of each end that the owner was told of, None for a good one."""
    outputs = owner.of(request.handle)
    ends = [place for place, output in enumerate(outputs) if output.finish_reason or output.error]
    assert not ends or ends[0] == len(outputs) - 1, "an output after the end"
    return [outputs[place].error for place in ends]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", [1, 2])
def test_steps_that_fail_now_and_then_end_their_own_requests_only(
    start: Start, seed: int, depth: int
) -> None:
    draw = random.Random(seed)
    # Far enough apart that the engine does not give up, even though a step launched ahead is lost too.
    failing = list(range(draw.randrange(3), 400, draw.randrange(5, 9)))
    in_launch = {number for number in failing if draw.random() < 0.5}
    engine, owner = start(
        depth=depth, fail_launch=tuple(in_launch), fail_result=tuple(set(failing) - in_launch)
    )
    requests = make_requests(40)
    for request in requests:
        engine.submit(request)
    owner.wait(lambda: all(owner.is_over(request.handle) for request in requests))
    errors = 0
    for request in requests:
        [error] = ends_of(owner, request)
        key = FakeProvider.key(request.adapter.id) if request.adapter else ""
        tokens = [output.token_id for output in owner.of(request.handle) if output.token_id is not None]
        if error is None:
            owner.assert_answered(request)
        else:
            errors += 1
            assert error["error_type"] == "generation"
            assert "fails" in error["error"]
            assert tokens == expected_answer(request, key)[0][: len(tokens)]
    assert errors
    assert engine.alive
    assert engine.control("check", {}, timeout=60.0) == {"ok": True}
    stats = engine.control("stats", {}, timeout=60.0)
    assert (stats["running"], stats["waiting"], stats["blocks_used"]) == (0, 0, 0)
    assert owner.deaths == []


@pytest.mark.parametrize("depth", [1, 2])
def test_when_no_step_comes_to_its_end_any_more_everybody_is_told(start: Start, depth: int) -> None:
    engine, owner = start(depth=depth, fail_result=tuple(range(6, 400)))
    requests = make_requests(40)
    with suppress(EngineDeadError):  # it may die before all have come
        for request in requests:
            engine.submit(request)
        for handle in range(100, 103):  # each failed step ends all that run, so the next needs others
            owner.wait(lambda: owner.deaths or all(owner.is_over(request.handle) for request in requests))
            requests.append(make_request(handle))
            engine.submit(requests[-1])
    owner.wait(lambda: owner.deaths)
    [reason] = owner.deaths
    assert "3 steps in a row failed" in reason
    assert not engine.alive
    assert all(len(ends_of(owner, request)) <= 1 for request in requests)
    with pytest.raises(EngineDeadError, match="3 steps in a row"):
        engine.submit(make_request(100))


def test_a_device_that_is_lost_is_the_end_at_once(start: Start) -> None:
    """No step would ever succeed again, so nobody else's request is tried on it."""
    engine, owner = start(fault="device", fail_result=(0,))
    engine.submit(make_request(1))
    owner.wait(lambda: owner.deaths)
    assert owner.deaths == [
        "the device cannot be used any more (RuntimeError: the device is lost), since a step failed with "
        "RuntimeError: step 0 fails"
    ]
    assert not engine.alive


def test_what_raises_outside_of_a_step_is_the_end_of_the_engine_and_not_a_silence(start: Start) -> None:
    engine, owner = start(fault="poll")
    engine.submit(make_request(1, adapter="falcon"))
    owner.wait(lambda: owner.deaths)
    assert owner.deaths == ["the table of adapters is torn"]
    assert not engine.alive
