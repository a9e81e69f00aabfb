"""The serving side around a fake engine: delivery, stop strings, cancellation, failures, drain."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fakes_serving import WAIT_S, FakeEngine, RecordingChannel

from lorax_backend.config import ServerConfig
from lorax_backend.errors import CancelledError, ShuttingDownError, ValidationError, error_from_dict
from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.service import GenerationService
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import EngineRequest, EngineStats, FinishReason, GenerateRequest, GenerationEvent

EOS = 2
MakeService = Callable[..., GenerationService]


def submit(service: GenerationService, request_id: str = "", **fields: Any) -> RecordingChannel:
    channel = RecordingChannel()
    service.submit(RawRequest(request_id, {"text_input": "hello"} | fields), channel)
    return channel


@pytest.fixture
def echo(byte_level: TokenizerPool) -> Callable[[EngineRequest], Sequence[int]]:
    """A reply that repeats the prompt and ends."""
    return lambda request: [*request.prompt_ids, EOS]


def test_streamed_pieces_join_to_the_whole_text(make_service: MakeService, echo: Any) -> None:
    service = make_service(FakeEngine(echo))
    text = "hello world, 你好 👍 naïve"
    channel = submit(service, text_input=text, stream=True)
    final = channel.wait_final()
    assert channel.text == text == final.generated_text
    assert final.finish_reason is FinishReason.EOS
    assert final.generated_tokens == final.prompt_tokens + 1  # the end token counts


def test_without_stream_there_is_exactly_one_event(make_service: MakeService, echo: Any) -> None:
    service = make_service(FakeEngine(echo))
    channel = submit(service, text_input="hello world", stream=False, return_tokens=True)
    final = channel.wait_final()
    assert len(channel.events) == 1
    assert final.text == final.generated_text == "hello world"
    assert len(final.tokens) == final.generated_tokens
    assert "".join(token.text for token in final.tokens if not token.special) == "hello world"


def test_many_streams_at_once_get_their_own_text_in_order(make_service: MakeService, echo: Any) -> None:
    service = make_service(FakeEngine(echo), max_concurrent_requests=300)
    texts = [f"stream {i} says {'héllo 好 ' * (i % 7)}{i}" for i in range(200)]
    channels = [submit(service, text_input=text, stream=i % 3 > 0) for i, text in enumerate(texts)]
    for text, channel in zip(texts, channels, strict=True):
        assert channel.wait_final().generated_text == text
        assert channel.text == text
        counts = [event.generated_tokens for event in channel.events]
        assert counts == sorted(counts)


def test_tokens_that_arrive_during_a_send_leave_in_one_event(
    make_service: MakeService, byte_level: TokenizerPool
) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    channel = submit(service, stream=True)
    handle = engine.wait_submitted(1)[0].handle
    channel.gate.clear()
    ids = byte_level.encode("abcdefghij")
    engine.emit(handle, ids[:1])
    assert channel.entered.wait(WAIT_S)
    for token_id in ids[1:]:
        engine.emit(handle, [token_id])
    channel.gate.set()
    events = channel.wait_events(2)
    assert [event.text for event in events] == ["a", "bcdefghij"]
    assert len(events[1].tokens) == 9


def test_an_idle_sender_sends_every_token_at_once(
    make_service: MakeService, byte_level: TokenizerPool
) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    channel = submit(service, stream=True)
    handle = engine.wait_submitted(1)[0].handle
    for count, letter in enumerate("abc", start=1):
        engine.emit(handle, byte_level.encode(letter))
        assert channel.wait_events(count)[-1].text == letter


def test_a_stop_string_across_tokens_ends_the_request_and_frees_the_engine(
    make_service: MakeService, byte_level: TokenizerPool
) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    channel = submit(service, stream=True, stop=["cd"])
    handle = engine.wait_submitted(1)[0].handle
    engine.emit(handle, byte_level.encode("abcdef"))
    final = channel.wait_final()
    assert channel.text == final.generated_text == "abcd"
    assert final.finish_reason is FinishReason.STOP
    assert final.generated_tokens == 4
    engine.wait_cancelled(handle)


def test_a_dropped_stop_string_is_never_shown_in_part(
    make_service: MakeService, byte_level: TokenizerPool
) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    options = {"stop": ["END"], "sampling_parameters": '{"include_stop_str_in_output": false}'}
    channel = submit(service, stream=True, **options)
    handle = engine.wait_submitted(1)[0].handle
    for token_id in byte_level.encode("aENbEND!"):
        engine.emit(handle, [token_id])
    channel.wait_final()
    assert channel.text == "aENb"
    shown = ""
    for event in channel.events:
        shown += event.text
        assert "aENb".startswith(shown)


def test_cancel_by_id_ends_every_request_of_that_id_and_no_other(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    same = [submit(service, "twin") for _ in range(2)]
    other = submit(service, "other")
    handles = {request.handle for request in engine.wait_submitted(3)}
    assert service.cancel("twin") is True
    for channel in same:
        assert channel.error["error_type"] == "cancelled"
    assert service.cancel("twin") is False
    assert service.num_live == 1
    assert not other.events
    assert set(engine.cancelled) < handles
    assert len(engine.cancelled) == 2


def test_a_client_that_goes_away_frees_its_request_while_queued(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    channel = submit(service)
    handle = engine.wait_submitted(1)[0].handle
    channel.cancelled = True
    assert channel.error["error_type"] == "cancelled"
    engine.wait_cancelled(handle)
    assert service.drain(WAIT_S)


def test_a_channel_that_cannot_say_whether_it_lives_counts_as_gone(make_service: MakeService) -> None:
    class Broken(RecordingChannel):
        def is_cancelled(self) -> bool:
            raise OSError("no server")

    engine = FakeEngine()
    service = make_service(engine)
    channel = Broken()
    service.submit(RawRequest("", {"text_input": "hello"}), channel)
    assert channel.error["error_type"] == "cancelled"


def test_a_send_that_raises_ends_its_own_request_only(make_service: MakeService, byte_level: Any) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    bad, good = submit(service, stream=True), submit(service, stream=True)
    first, second = (request.handle for request in engine.wait_submitted(2))
    by_handle = {live.handle: live.channel for live in service._live.snapshot()}
    if by_handle[first] is not bad:
        first, second = second, first
    bad.fail = OSError("shared memory is full")
    engine.emit(first, byte_level.encode("a"))
    engine.wait_cancelled(first)
    engine.emit(second, [*byte_level.encode("ok"), EOS], FinishReason.EOS)
    assert good.wait_final().generated_text == "ok"
    assert service.ready


def test_a_refused_request_costs_nobody_else_anything(make_service: MakeService, echo: Any) -> None:
    engine = FakeEngine(echo)
    service = make_service(engine)
    bad = submit(service, temperature=-1.0)
    good = submit(service)
    assert "temperature" in bad.error["error"]
    assert good.wait_final().generated_text == "hello"
    assert len(engine.submitted) == 1


def test_more_requests_than_allowed_are_refused_at_once_and_room_comes_back(
    make_service: MakeService,
) -> None:
    engine = FakeEngine()
    service = make_service(engine, max_concurrent_requests=2)
    first, second, third = (submit(service, str(i)) for i in range(3))
    assert third.error["error_type"] == "overloaded"
    assert "max_concurrent_requests" in third.error["error"]
    service.cancel("0")
    first.wait_final()
    assert service.drain(0) is False  # the second is still there
    service._draining = False
    fourth = submit(service)
    engine.wait_submitted(3)
    assert not fourth.events
    assert not second.events


def test_drain_waits_for_live_requests_and_refuses_new_ones(
    make_service: MakeService, byte_level: Any
) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    live = submit(service, stream=True)
    handle = engine.wait_submitted(1)[0].handle
    assert service.drain(0) is False
    assert not service.ready
    assert submit(service).error["error_type"] == "shutting_down"
    engine.emit(handle, [*byte_level.encode("bye"), EOS], FinishReason.EOS)
    assert service.drain(WAIT_S) is True
    assert live.wait_final().generated_text == "bye"


def test_a_dead_engine_ends_every_request_and_readiness(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    channels = [submit(service, stream=bool(i % 2)) for i in range(20)]
    engine.wait_submitted(20)
    assert service.ready
    engine.die("killed by signal 9")
    for channel in channels:
        assert channel.error["error_type"] == "engine_dead"
        assert "signal 9" in channel.error["error"]
    assert not service.ready
    assert submit(service).error["error_type"] == "engine_dead"


def test_an_error_of_the_engine_reaches_its_request(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    channel = submit(service)
    handle = engine.wait_submitted(1)[0].handle
    engine.fail(handle, {"error": "no such folder", "error_type": "adapter_not_found", "http_status": 404})
    assert channel.error["error_type"] == "adapter_not_found"


def test_a_failure_in_a_service_thread_tells_everyone(
    make_service: MakeService, byte_level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    waiting = [submit(service) for _ in range(8)]
    doomed = submit(service)
    handles = {request.handle for request in engine.wait_submitted(9)}
    handle = next(live.handle for live in service._live.snapshot() if live.channel is doomed)
    assert handle in handles

    def broken(live: Any, event: GenerationEvent) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(service, "_finish", broken)
    engine.emit(handle, [EOS], FinishReason.EOS)
    doomed.wait_final()
    for channel in waiting:
        assert channel.error["error_type"] == "engine_dead"
        assert "a bug" in channel.error["error"]
    assert not service.ready
    assert service.drain(WAIT_S)
    doomed.wait_final()  # still its only final event


def test_stop_ends_what_is_left_with_an_error(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    channel = submit(service)
    engine.wait_submitted(1)
    service.stop()
    assert channel.error["error_type"] == "shutting_down"
    assert submit(service).error["error_type"] == "shutting_down"
    assert not engine.alive


def test_a_thousand_requests_leave_nothing_behind(make_service: MakeService, echo: Any) -> None:
    engine = FakeEngine(echo)
    service = make_service(engine, max_concurrent_requests=64)
    threads = threading.active_count()
    gone: list[weakref.ref[RecordingChannel]] = []
    for start in range(0, 1000, 50):
        batch = [
            submit(service, f"r{i % 7}", text_input=f"text {i}", stream=bool(i % 2))
            for i in range(start, start + 50)
        ]
        for channel in batch:
            channel.wait_final()
        assert service.drain(WAIT_S)
        service._draining = False
        gone += [weakref.ref(channel) for channel in batch]
        del batch, channel
    assert service.num_live == 0
    assert not service._live._by_request_id
    assert not engine.running
    assert threading.active_count() <= threads + 2  # the validation pool grows to its two workers
    submit(service).wait_final()  # the threads let go of the last request they held
    service.drain(WAIT_S)
    gc.collect()
    assert sum(ref() is not None for ref in gone) <= len(service._senders) + 2
    registry = service.metrics
    assert registry.value("lorax_request_success") == 1001
    assert registry.value("lorax_requests_in_flight") == 0


def test_cancels_at_random_moments_give_each_client_one_final_event(
    make_service: MakeService, echo: Any
) -> None:
    service = make_service(FakeEngine(echo))
    rng = random.Random(7)
    channels = []
    for i in range(300):
        channel = submit(service, str(i), text_input="some text to repeat", stream=bool(i % 2))
        channels.append(channel)
        victim = rng.randrange(len(channels))
        if i % 3 == 0:
            channels[victim].cancelled = True
        elif i % 3 == 1:
            service.cancel(str(victim))
    for channel in channels:
        final = channel.wait_final()
        assert final.generated_text == "some text to repeat" or final.error["error_type"] == "cancelled"  # type: ignore[index]
    assert service.drain(WAIT_S)


def test_generate_yields_events_and_raises_errors(make_service: MakeService, echo: Any) -> None:
    service = make_service(FakeEngine(echo))
    events = list(service.generate(service.request("hello world", stream=True)))
    assert "".join(event.text for event in events) == "hello world"
    too_long = GenerateRequest("", service.request("x").sampling, input_ids=[5] * 256)
    with pytest.raises(ValidationError, match="256 tokens"):
        list(service.generate(too_long))


def test_closing_the_iterator_cancels_the_request(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    stream = service.generate(service.request("hello", stream=True))
    handle = engine.wait_submitted(1)[0].handle
    stream.close()
    engine.wait_cancelled(handle)
    assert service.drain(WAIT_S)
    assert list(stream) == []


def test_a_sampled_request_reports_its_seed_and_a_greedy_one_none(
    make_service: MakeService, echo: Any
) -> None:
    engine = FakeEngine(echo)
    service = make_service(engine)
    assert submit(service).wait_final().seed is None
    assert submit(service, temperature=0.5, seed=11).wait_final().seed == 11
    drawn = [submit(service, temperature=0.5).wait_final().seed for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert engine.submitted[-1].sampling.seed == drawn[1]


def test_lengths_are_checked_after_truncation(make_service: MakeService, echo: Any) -> None:
    engine = FakeEngine(echo, max_input_length=8, max_total_tokens=12)
    service = make_service(engine)
    error = submit(service, input_ids=list(range(10, 30)), text_input=None).error
    assert "20 tokens" in error["error"]
    assert "truncate" in error["error"]
    channel = RecordingChannel()
    parameters = {"truncate": 4, "max_new_tokens": 8}
    service.submit(RawRequest("", {"input_ids": list(range(10, 30))}, parameters), channel)
    channel.wait_final()
    assert engine.submitted[-1].prompt_ids == [26, 27, 28, 29]
    assert engine.submitted[-1].sampling.max_new_tokens == 8
    assert "at most 4" in submit(service, input_ids=[5] * 8, text_input=None, max_tokens=5).error["error"]


def test_max_tokens_defaults_to_what_the_limit_leaves(make_service: MakeService, echo: Any) -> None:
    engine = FakeEngine(echo, max_input_length=20, max_total_tokens=32)
    service = make_service(engine)
    submit(service, input_ids=[5] * 10, text_input=None).wait_final()
    assert engine.submitted[-1].sampling.max_new_tokens == 22


def test_end_tokens_reach_the_engine_unless_ignored(make_service: MakeService) -> None:
    engine = FakeEngine(lambda request: [5] * 256)
    service = make_service(engine)
    submit(service, max_tokens=2).wait_final()
    assert engine.submitted[-1].sampling.stop_token_ids == (EOS,)
    submit(
        service, max_tokens=2, sampling_parameters='{"ignore_eos": true, "stop_token_ids": [7]}'
    ).wait_final()
    assert engine.submitted[-1].sampling.stop_token_ids == (7,)


def test_ids_outside_the_vocabulary_never_reach_the_engine(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    for ids in ([1, 384], [-1]):
        assert "input_ids[" in submit(service, input_ids=ids, text_input=None).error["error"]
    assert not engine.submitted


def test_the_prompt_comes_before_the_text_where_asked(make_service: MakeService, echo: Any) -> None:
    service = make_service(FakeEngine(echo))
    whole = submit(service, exclude_input_in_output=False).wait_final()
    assert whole.text == whole.generated_text == "hellohello"
    streamed = submit(service, exclude_input_in_output=False, stream=True)
    assert streamed.wait_final().generated_text == "hellohello"
    assert streamed.text == "hello"


def test_timings_and_metrics_follow_a_request(make_service: MakeService, echo: Any) -> None:
    engine = FakeEngine(echo)
    service = make_service(engine)
    final = submit(service, stream=True).wait_final()
    assert final.timings is not None
    assert set(final.timings) == {"validation", "queue", "first_token", "inference", "total"}
    assert 0 < final.timings["first_token"] <= final.timings["total"]
    submit(service, temperature=-1.0).wait_final()
    assert service.drain(WAIT_S)
    value = service.metrics.value
    assert value("lorax_request_count", (("method", "stream"),)) == 1
    assert value("lorax_request_success") == 1
    assert value("lorax_request_failure", (("err", "validation"),)) == 1
    assert value("lorax_request_generated_tokens") == final.generated_tokens
    engine.report(EngineStats(running=3, blocks_total=10, blocks_used=4, generated_tokens=99))
    assert value("lorax_batch_current_size") == 3
    assert value("lorax_generated_tokens_total") == 99
    assert service.stats.blocks_used == 4


def test_control_answers_commands_and_names_the_known_ones(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine)
    channel = submit(service, "a")
    engine.wait_submitted(1)
    assert service.control("cancel", {"request_id": "a"}) == {"cancelled": True}
    channel.wait_final()
    assert service.control("cancel", {"request_id": "a"}) == {"cancelled": False}
    assert service.control("info")["max_total_tokens"] == 256
    assert "lorax_request_count" in service.control("metrics")["prometheus"]
    assert service.control("adapters") == {"command": "adapters"}
    for command, arguments in (("fly", {}), ("cancel", {}), ("check", {})):
        with pytest.raises(ValidationError):
            service.control(command, arguments)


def test_a_failed_start_stops_everything_and_tells_why(byte_level: TokenizerPool) -> None:
    class Unloadable(FakeEngine):
        def start(self, events: Any) -> None:
            raise RuntimeError("no such weights")

    threads = threading.active_count()
    service = GenerationService(Unloadable(), byte_level, ServerConfig())
    with pytest.raises(RuntimeError, match="no such weights"):
        service.start()
    assert not service.ready
    assert threading.active_count() == threads
    service.stop()


def test_errors_survive_the_way_to_the_client_and_back() -> None:
    for error in (CancelledError("a"), ShuttingDownError("b"), ValidationError("c")):
        assert type(error_from_dict(error.to_dict())) is type(error)


def test_control_tokenizes_a_text(make_service: MakeService, byte_level: TokenizerPool) -> None:
    service = make_service(FakeEngine())
    answer = service.control("tokenize", {"inputs": "hello world"})
    assert [token["id"] for token in answer["tokens"]] == byte_level.encode("hello world")
    assert answer["tokens"][-1]["stop"] == len("hello world")
    plain = service.control("tokenize", {"inputs": "hello", "add_special_tokens": False})["tokens"]
    assert [token["id"] for token in plain] == byte_level.encode("hello", add_special_tokens=False)
    for arguments in ({}, {"inputs": ""}, {"inputs": 5}, {"inputs": "a", "add_special_tokens": "x"}):
        with pytest.raises(ValidationError, match=r"control\."):
            service.control("tokenize", arguments)
