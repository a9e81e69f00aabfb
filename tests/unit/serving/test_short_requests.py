"""A short request that comes alone is prepared by the thread that brings it; nothing else keeps that thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fakes_serving import WAIT_S, FakeEngine, RecordingChannel

from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.intake import is_short
from lorax_backend.serving.service import GenerationService
from lorax_backend.types import EngineRequest

MakeService = Callable[..., GenerationService]


class ThreadNotingEngine(FakeEngine):
    """Notes which thread brought each request."""

    def __init__(self) -> None:
        super().__init__(max_input_length=10_000, max_total_tokens=12_000)
        self.threads: list[threading.Thread] = []

    def submit(self, request: EngineRequest) -> None:
        self.threads.append(threading.current_thread())
        super().submit(request)


def submit(service: GenerationService, **fields: Any) -> RecordingChannel:
    channel = RecordingChannel()
    service.submit(RawRequest("", {"stream": True} | fields), channel)
    return channel


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Callable[[GenerationService], threading.Event]:
    """`blocked(service)` -> the event for which tokenizing a text that begins with "wait" waits from now on."""

    def block(service: GenerationService) -> threading.Event:
        released, encode = threading.Event(), service.tokenizer.encode

        def waiting(text: str, add_special_tokens: bool = True) -> list[int]:
            if text.startswith("wait"):
                assert released.wait(WAIT_S)
            return encode(text, add_special_tokens)

        monkeypatch.setattr(service.tokenizer, "encode", waiting)
        return released

    return block


@pytest.mark.parametrize("prompt", [{"text_input": "hello"}, {"input_ids": [4, 5, 6]}])
def test_a_short_prompt_is_with_the_engine_when_submit_returns(
    make_service: MakeService, prompt: dict[str, Any]
) -> None:
    engine = ThreadNotingEngine()
    service = make_service(engine)
    submit(service, **prompt)
    assert engine.threads == [threading.current_thread()]


@pytest.mark.parametrize(
    "fields",
    [
        {"text_input": "hello " * 1000},
        {"input_ids": [5] * 5000},
        {"text_input": "hello", "n": 2},
        {"text_input": "hello", "sampling_parameters": "{}" + " " * 3000},
        {"messages": '[{"role": "user", "content": "hello"}]'},
        {"text_input": "hello", "apply_chat_template": True},
    ],
)
def test_what_may_take_longer_is_prepared_elsewhere(
    make_service: MakeService, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ThreadNotingEngine()
    service = make_service(engine, max_n=2)
    monkeypatch.setattr(service.tokenizer, "render_chat", lambda *_: "rendered")
    submit(service, **fields)
    engine.wait_submitted(1)
    assert threading.current_thread() not in engine.threads


def test_a_short_request_does_not_overtake_those_that_wait_to_be_prepared(
    make_service: MakeService, blocked: Callable[[GenerationService], threading.Event]
) -> None:
    engine = ThreadNotingEngine()
    service = make_service(engine, validation_workers=1)
    released = blocked(service)
    submit(service, text_input="wait " * 1000)
    submit(service, text_input="short")  # returns, although the only worker is held
    assert engine.threads == []
    released.set()
    first, second = engine.wait_submitted(2)
    assert len(first.prompt_ids) > len(second.prompt_ids)
    assert threading.current_thread() not in engine.threads


def test_a_short_request_goes_the_short_way_again_once_the_others_are_prepared(
    make_service: MakeService, blocked: Callable[[GenerationService], threading.Event]
) -> None:
    engine = ThreadNotingEngine()
    service = make_service(engine)
    released = blocked(service)
    submit(service, text_input="wait " * 1000)
    released.set()
    engine.wait_submitted(1)
    for _ in range(1000):  # the worker is done with a request a moment after the engine has it
        submit(service, text_input="short")
        if engine.threads[-1] is threading.current_thread():
            break
        engine.wait_submitted(len(engine.threads))
    assert engine.threads[-1] is threading.current_thread()


def test_a_short_request_that_is_refused_hears_of_it_and_nobody_else_does(make_service: MakeService) -> None:
    service = make_service(FakeEngine())
    channel = submit(service, text_input="hello", nonsense=1)
    error = channel.wait_final().error
    assert error is not None
    assert error["error_type"] == "validation"
    assert service.ready


def test_a_short_request_after_the_end_is_told_that_the_server_has_stopped(make_service: MakeService) -> None:
    service = make_service(FakeEngine())
    service._intake.stop()
    for text in ("hello", "hello " * 1000):
        error = submit(service, text_input=text).wait_final().error
        assert error is not None
        assert error["error_type"] == "shutting_down"


def test_a_request_is_short_by_all_that_was_sent_with_it() -> None:
    assert is_short(RawRequest("", {"text_input": "x" * 2048, "max_tokens": 5}, {"temperature": 0.5}))
    assert not is_short(RawRequest("", {"text_input": "x", "sampling_parameters": "x" * 2049}))
    assert not is_short(RawRequest("", {"text_input": "x"}, {"guideline": "x" * 2049}))
    assert not is_short(RawRequest("", {"input_ids": [1] * 4097}))


class AskedChannel(RecordingChannel):
    """Counts how often it was asked whether its caller has gone."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def is_cancelled(self) -> bool:
        self.asked += 1
        return super().is_cancelled()


def test_a_caller_is_not_asked_after_while_the_request_goes_to_the_engine(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine, cancel_poll_interval_s=3600.0)
    channel = AskedChannel()
    service.submit(RawRequest("", {"text_input": "hello", "stream": True}), channel)
    [request] = engine.wait_submitted(1)
    engine.emit(request.handle, [5])
    channel.wait_events(1)
    assert channel.asked == 0


def test_a_stream_that_is_closed_is_looked_at_at_once_whatever_the_interval(
    make_service: MakeService,
) -> None:
    engine = FakeEngine()
    service = make_service(engine, cancel_poll_interval_s=3600.0)
    stream = service.generate(service.request("hello", stream=True))
    [request] = engine.wait_submitted(1)
    stream.close()
    engine.wait_cancelled(request.handle)
