"""Several sequences for one request: indices, the best of them, failures and cancellation."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from fakes_serving import WAIT_S, FakeEngine, RecordingChannel

from lorax_backend.errors import GenerationError
from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.sequences import mean_logprob
from lorax_backend.serving.service import GenerationService
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import FinishReason, GenerationEvent

MakeService = Callable[..., GenerationService]
LENGTH = FinishReason.LENGTH


class Sequences:
    """A running request for several sequences, and the engine's handles of them by index."""

    def __init__(
        self, make_service: MakeService, tokenizer: TokenizerPool, count: int, **fields: Any
    ) -> None:
        self.engine = FakeEngine()
        self.service = make_service(self.engine, max_best_of=8, **fields.pop("config", {}))
        self.channel = RecordingChannel()
        self.tokenizer = tokenizer
        parameters = fields.pop("parameters")
        self.service.submit(RawRequest("r", {"text_input": "hello", **fields}, parameters), self.channel)
        self.requests = self.engine.wait_submitted(count)
        self.handles = [request.handle for request in self.requests]

    def emit(self, index: int, text: str, finish: FinishReason | None = None, logprob: float = -1.0) -> None:
        self.engine.emit(self.handles[index], self.tokenizer.encode(text), finish, logprob=logprob)


def test_g06_p06_the_highest_mean_log_probability_wins_and_the_others_are_reported(
    make_service: MakeService, byte_level: TokenizerPool
) -> None:
    run = Sequences(
        make_service, byte_level, 3, return_details=True, parameters={"best_of": 3, "do_sample": True}
    )
    run.emit(2, "xyz", LENGTH, -0.9)
    run.emit(0, "a", LENGTH, -1.0)  # the least total loss, but not the least per token
    assert run.channel.events == []
    run.emit(1, "uvwxyz", LENGTH, -0.5)
    final = run.channel.wait_final()
    assert len(run.channel.events) == 1
    assert final.generated_text == "uvwxyz"
    assert (final.index, final.more) == (0, False)
    assert final.best_of_sequences is not None
    assert [other.generated_text for other in final.best_of_sequences] == ["xyz", "a"]
    assert final.seed == run.requests[1].sampling.seed
    assert len({request.sampling.seed for request in run.requests}) == 3
    assert run.service.drain(WAIT_S)
    assert run.service.metrics.value("lorax_request_success") == 1
    assert run.service.metrics.value("lorax_request_count", (("method", "generate"),)) == 1


def test_streamed_sequences_carry_their_index_and_only_the_last_end_is_final(
    make_service: MakeService, byte_level: TokenizerPool
) -> None:
    run = Sequences(make_service, byte_level, 2, stream=True, parameters={"n": 2})
    run.emit(1, "b")
    run.channel.wait_events(1)
    run.emit(0, "a", LENGTH)
    run.channel.wait_events(2)
    run.emit(1, "c", LENGTH)
    run.channel.wait_final()
    seen = [(event.index, event.text, event.more, event.final) for event in run.channel.events]
    assert seen == [(1, "b", False, False), (0, "a", True, False), (1, "c", False, True)]
    assert run.channel.events[-1].generated_text == "bc"


def test_without_streaming_every_sequence_has_one_event(
    make_service: MakeService, byte_level: TokenizerPool
) -> None:
    run = Sequences(make_service, byte_level, 3, parameters={"n": 3, "temperature": 0.8, "seed": 40})
    assert [request.sampling.seed for request in run.requests] == [40, 41, 42]
    for index in (2, 0, 1):
        run.emit(index, f"t{index}", LENGTH)
    run.channel.wait_final()
    assert [(event.index, event.generated_text) for event in run.channel.events] == [
        (2, "t2"), (0, "t0"), (1, "t1"),
    ]  # fmt: skip


def test_the_n_best_of_more_come_in_their_order(make_service: MakeService, byte_level: TokenizerPool) -> None:
    run = Sequences(make_service, byte_level, 3, parameters={"n": 2, "best_of": 3, "do_sample": True})
    for index, logprob in enumerate((-3.0, -1.0, -2.0)):
        run.emit(index, f"t{index}", LENGTH, logprob)
    run.channel.wait_final()
    assert [(event.index, event.generated_text, event.more) for event in run.channel.events] == [
        (0, "t1", True), (1, "t2", False),
    ]  # fmt: skip


@pytest.mark.parametrize("parameters", [{"n": 3}, {"best_of": 3, "do_sample": True}])
def test_one_failure_ends_the_request_and_frees_the_other_sequences(
    parameters: dict[str, Any], make_service: MakeService, byte_level: TokenizerPool
) -> None:
    run = Sequences(make_service, byte_level, 3, parameters=parameters)
    run.emit(0, "a", LENGTH)
    run.engine.fail(run.handles[1], GenerationError("broken").to_dict())
    assert run.channel.error["error"] == "broken"
    run.engine.wait_cancelled(run.handles[2])
    assert run.service.drain(WAIT_S)
    assert sum(event.final for event in run.channel.events) == 1
    assert run.service.metrics.value("lorax_request_failure", (("err", "generation"),)) == 1
    assert run.service.metrics.value("lorax_request_failure", (("err", "dropped"),)) == 0


@pytest.mark.parametrize("by_id", [True, False])
def test_a_cancelled_request_frees_all_its_sequences_and_is_told_once(
    by_id: bool, make_service: MakeService, byte_level: TokenizerPool
) -> None:
    run = Sequences(make_service, byte_level, 3, stream=True, parameters={"n": 3})
    if by_id:
        assert run.service.cancel("r")
    else:
        run.channel.cancelled = True
    assert run.channel.error["error_type"] == "cancelled"
    for handle in run.handles:
        run.engine.wait_cancelled(handle)
    assert run.service.drain(WAIT_S)
    assert run.service.metrics.value("lorax_request_failure", (("err", "dropped"),)) == 1


def test_a_stop_string_ends_one_sequence_alone(make_service: MakeService, byte_level: TokenizerPool) -> None:
    run = Sequences(make_service, byte_level, 2, stop=["b"], parameters={"n": 2})
    run.emit(0, "abc")
    run.engine.wait_cancelled(run.handles[0])
    run.emit(1, "xyz", LENGTH)
    run.channel.wait_final()
    texts = {event.index: event.generated_text for event in run.channel.events}
    assert texts == {0: "ab", 1: "xyz"}


def test_an_answer_that_cannot_be_sent_ends_the_request(
    make_service: MakeService, byte_level: TokenizerPool
) -> None:
    run = Sequences(make_service, byte_level, 2, stream=True, parameters={"n": 2})
    run.channel.fail = RuntimeError("no room")
    run.emit(0, "a")
    for handle in run.handles:
        run.engine.wait_cancelled(handle)
    assert run.service.drain(WAIT_S)


def test_a_dead_engine_ends_a_request_for_several_once(
    make_service: MakeService, byte_level: TokenizerPool
) -> None:
    run = Sequences(make_service, byte_level, 3, parameters={"n": 3})
    run.engine.die("gone")
    assert run.channel.error["error_type"] == "engine_dead"
    assert run.service.drain(WAIT_S)
    assert len(run.channel.events) == 1


def test_an_answer_without_log_probabilities_never_wins() -> None:
    known = GenerationEvent(generated_tokens=4, cumulative_logprob=-8.0)
    assert mean_logprob(known) == -2.0
    assert mean_logprob(GenerationEvent(generated_tokens=4)) < mean_logprob(known)


def test_many_requests_for_several_cancelled_at_random_leave_nothing_behind(
    make_service: MakeService,
) -> None:
    chance = random.Random(4)
    engine = FakeEngine(lambda request: [*request.prompt_ids * 3, 2])
    service = make_service(engine, max_concurrent_requests=1000, max_best_of=4, max_requests_per_adapter=500)
    channels = []
    for number in range(120):
        kind = chance.choice([{"n": 3}, {"best_of": 4, "do_sample": True}, {"n": 2, "temperature": 0.5}, {}])
        fields = {"text_input": "some text", "adapter_id": f"a{number % 3}", "stream": "best_of" not in kind}
        channel = RecordingChannel()
        service.submit(RawRequest(str(number), fields, dict(kind)), channel)
        channels.append(channel)
        victim = chance.randrange(len(channels))
        if number % 3 == 0:
            channels[victim].cancelled = True
        elif number % 3 == 1:
            service.cancel(str(victim))
    for channel in channels:
        final = channel.wait_final()
        assert final.finish_reason is not None or final.error["error_type"] == "cancelled"  # type: ignore[index]
    assert service.drain(WAIT_S)
    assert not service.admission._by_adapter
    value = service.metrics.value
    failed = value("lorax_request_failure", (("err", "dropped"),))
    assert value("lorax_request_success") + failed == len(channels)
