"""Decoding and the response channel against a stand-in for Triton's module, for what a real server rarely does."""

from __future__ import annotations

import importlib
import json
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from lorax_backend.errors import ValidationError
from lorax_backend.types import FinishReason, GenerationEvent, Token

FINAL = 1


class FakeTritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE, NOT_FOUND = range(4)

    def __init__(self, message: str, code: int) -> None:
        self.text, self.code = message, code


@dataclass
class FakeTensor:
    label: str
    array: np.ndarray

    def name(self) -> str:
        return self.label

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class FakeResponse:
    output_tensors: list[FakeTensor]
    error: FakeTritonError | None = None


@dataclass
class FakeSender:
    """Counts as closed as soon as the final flag is tried, like Triton's; refuses responses over `room` bytes."""

    room: int = 1 << 30
    sent: list[tuple[FakeResponse | None, int]] = field(default_factory=list)
    closed: bool = False

    def send(self, response: FakeResponse | None = None, flags: int = 0) -> None:
        if self.closed:
            raise RuntimeError("Response sender has been closed.")
        self.closed = flags == FINAL
        size = (
            sum(len(item) for tensor in response.output_tensors for item in tensor.array) if response else 0
        )
        if size > self.room:
            raise RuntimeError("Failed to increase the shared memory pool size")
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        assert not self.closed, "a real server crashes when asked about a request it has ended"
        return True


@dataclass
class FakeRequest:
    tensors: list[FakeTensor] = field(default_factory=list)
    parameters_json: str = "{}"
    outputs: tuple[str, ...] = ()

    def inputs(self) -> list[FakeTensor]:
        return self.tensors

    def parameters(self) -> str:
        return self.parameters_json

    def request_id(self) -> str:
        return "id"

    def requested_output_names(self) -> set[str]:
        return set(self.outputs)


@pytest.fixture
def triton_io(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake: Any = types.ModuleType("triton_python_backend_utils")
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    fake.Tensor, fake.InferenceResponse, fake.TritonError = FakeTensor, FakeResponse, FakeTritonError
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    monkeypatch.delitem(sys.modules, "lorax_backend.triton_io", raising=False)
    yield importlib.import_module("lorax_backend.triton_io")
    sys.modules.pop("lorax_backend.triton_io", None)


def last_event(text="end"):
    return GenerationEvent(text=text, tokens=[Token(1, text)], finish_reason=FinishReason.LENGTH)


def test_the_final_flag_is_sent_once_whatever_comes_after_it(triton_io):
    sender = FakeSender()
    channel = triton_io.TritonChannel(sender)

    channel.send(GenerationEvent(text="a"), None)
    channel.send(last_event(), None)
    channel.send(last_event("again"), None)
    channel.send_error(ValidationError("too late"))

    assert [flags for _, flags in sender.sent] == [0, FINAL]


def test_a_large_last_response_that_finds_no_room_leaves_the_channel_open_for_the_error(triton_io):
    sender = FakeSender(room=100_000)
    channel = triton_io.TritonChannel(sender)

    with pytest.raises(RuntimeError, match="shared memory"):
        channel.send(last_event("x" * 200_000), None)
    channel.send(GenerationEvent(error=ValidationError("no room").to_dict()), None)

    [(response, flags)] = sender.sent
    assert flags == FINAL
    assert json.loads(response.error.text)["error"] == "no room"


def test_a_large_last_response_is_followed_by_the_flag_alone(triton_io):
    sender = FakeSender()

    triton_io.TritonChannel(sender).send(last_event("x" * 200_000), None)

    assert [(response is None, flags) for response, flags in sender.sent] == [(False, 0), (True, FINAL)]


def test_a_caller_that_cannot_be_told_of_an_error_raises_nothing(triton_io):
    sender = FakeSender(closed=True)

    triton_io.TritonChannel(sender).send_error(ValidationError("bad"))

    assert sender.sent == []


def test_the_server_is_never_asked_about_a_request_that_has_ended(triton_io):
    channel = triton_io.TritonChannel(FakeSender())
    assert channel.is_cancelled()

    channel.send(last_event(), None)

    assert not channel.is_cancelled()


def test_an_error_carries_its_json_and_code(triton_io):
    sender = FakeSender()

    triton_io.TritonChannel(sender).send_error(ValidationError("top_p: too big"))

    error = sender.sent[0][0].error
    assert error.code == FakeTritonError.INVALID_ARG
    assert json.loads(error.text) == {
        "error": "top_p: too big",
        "error_type": "validation",
        "http_status": 422,
    }


def test_a_scalar_with_two_values_is_refused_by_name(triton_io):
    request = FakeRequest([FakeTensor("top_p", np.array([0.5, 0.6], np.float32))])

    with pytest.raises(ValidationError, match=r"top_p: expected one value .* got 2"):
        triton_io.decode_request(request)


def test_an_unknown_tensor_is_refused_by_name(triton_io):
    with pytest.raises(ValidationError, match="surprise"):
        triton_io.decode_request(FakeRequest([FakeTensor("surprise", np.array([1], np.int32))]))


def test_tensors_become_plain_values_and_tritons_own_parameters_are_dropped(triton_io):
    tensors = [
        FakeTensor("text_input", np.array([b"h\xc3\xa9"], np.object_)),
        FakeTensor("seed", np.array([2**64 - 1], np.uint64)),
        FakeTensor("stream", np.array([True])),
        FakeTensor("input_ids", np.array([1, 2], np.int32)),
    ]

    raw = triton_io.decode_request(
        FakeRequest(tensors, '{"top_k": 3, "triton_enable_empty_final_response": true}')
    )

    assert raw.fields == {"text_input": "hé", "seed": 2**64 - 1, "stream": True, "input_ids": [1, 2]}
    assert raw.parameters == {"top_k": 3}


def test_naming_an_output_asks_for_it_but_naming_all_asks_for_none(triton_io):
    every_name = tuple(spec.name for spec in triton_io.OUTPUTS)

    some = triton_io.decode_request(FakeRequest(outputs=("text_output", "finish_reason", "token_ids")))
    everything = triton_io.decode_request(FakeRequest(outputs=every_name))

    assert some.fields == {"return_finish_reason": True, "return_token_ids": True}
    assert everything.fields == {}
