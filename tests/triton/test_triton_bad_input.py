"""Bad requests: each is told what is wrong and what to do, and costs nobody else anything."""

from __future__ import annotations

import time

import pytest
from triton_calls import http_post

pytestmark = pytest.mark.triton

PROMPT = "hello world"
# name -> (inputs, request parameters, error_type, words the message must hold)
BAD_REQUESTS = {
    "no prompt": ({}, {}, "validation", ["text_input", "missing"]),
    "empty prompt": ({"text_input": ""}, {}, "validation", ["text_input", "empty"]),
    "two prompts": ({"text_input": "a", "input_ids": [5]}, {}, "validation", ["text_input", "input_ids"]),
    "prompt too long": ({"text_input": "a " * 5000}, {}, "validation", ["text_input", "4095"]),
    "prompt of 10 MB": ({"text_input": "a" * 10_000_000}, {}, "validation", ["text_input", "max_prompt_bytes"]),
    "ids outside the vocabulary": ({"input_ids": [5, 99999]}, {}, "validation", ["input_ids", "99999"]),
    "negative temperature": ({"text_input": PROMPT, "temperature": -1.0}, {}, "validation", ["temperature", "-1"]),
    "top_p of 2": ({"text_input": PROMPT, "top_p": 2.0}, {}, "validation", ["top_p", "2", "at most 1"]),
    "no tokens asked": ({"text_input": PROMPT, "max_tokens": 0}, {}, "validation", ["max_tokens", "0"]),
    "too many tokens asked": ({"text_input": PROMPT, "max_tokens": 5000}, {}, "validation", ["max_tokens", "4096"]),
    "malformed JSON": (
        {"text_input": PROMPT, "sampling_parameters": '{"top_k": '}, {}, "validation", ["sampling_parameters", "JSON"],
    ),
    "misspelled key": (
        {"text_input": PROMPT, "sampling_parameters": '{"temprature": 1}'}, {}, "validation", ["mean temperature"],
    ),
    "misspelled parameter": ({"text_input": PROMPT}, {"max_tokenz": 3}, "validation", ["max_tokenz", "max_tokens"]),
    "invalid UTF-8 in the prompt": ({"text_input": b"ab\xff\xfe"}, {}, "validation", ["text_input", "UTF-8", "byte 2"]),
    "invalid UTF-8 in a list": (
        {"text_input": PROMPT, "stop_words": [b"ok", b"\xc3"]}, {}, "validation", ["stop_words", "UTF-8"],
    ),
    "unsupported feature": ({"text_input": PROMPT}, {"min_p": 0.5}, "unsupported", ["min_p"]),
    "best_of without sampling": ({"text_input": PROMPT}, {"best_of": 2}, "validation", ["best_of", "sampling"]),
    "unsupported tensor": ({"text_input": PROMPT, "embedding_request": "{}"}, {}, "unsupported", ["embedding"]),
    "unknown source": ({"text_input": PROMPT, "adapter_source": "moon"}, {}, "validation", ["adapter_source", "local"]),
    "unknown adapter": (
        {"text_input": PROMPT, "adapter_id": "/no/such/adapter"}, {}, "adapter_not_found", ["/no/such/adapter"],
    ),
    "malformed control": ({"control": "{"}, {}, "validation", ["control", "JSON"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def foreign_adapter(tiny_model_path, tiny_adapter):
    """An adapter of a model half as wide."""
    return str(tiny_adapter(tiny_model_path("llama", hidden_size=32)))


def assert_refused(answer, kind, words):
    assert answer.error is not None, f"answered: {answer.text!r}"
    assert answer.error["error_type"] == kind, answer.error
    for word in words:
        assert word in answer.error["error"]
    assert answer.responses[-1].final
    assert sum(part.error is not None for part in answer.responses) == 1


def test_every_bad_request_is_refused_while_another_stream_goes_on_unnoticed(caller, foreign_adapter):
    good = {"text_input": PROMPT, "max_tokens": 1500, "stream": True, "return_token_ids": True}
    running = caller.stream(good, parameters={"ignore_eos_token": True})
    first = running.first_text()

    for inputs, parameters, kind, words in BAD_REQUESTS.values():
        assert_refused(caller.generate(inputs, parameters=parameters), kind, words)
    wrong_shape = caller.generate({"text_input": PROMPT, "adapter_id": foreign_adapter})
    assert_refused(wrong_shape, "adapter_incompatible", ["q_proj"])

    rest = running.rest()
    assert rest.error is None
    alone = caller.generate({**good, "stream": False}, parameters={"ignore_eos_token": True})
    assert first.outputs["token_ids"] + rest.token_ids == alone.token_ids
    caller.control("check")


@pytest.mark.parametrize(
    "name", ["empty prompt", "invalid UTF-8 in the prompt", "prompt of 10 MB", "malformed JSON"]
)
def test_the_ensemble_refuses_in_the_same_words(caller, name):
    inputs, parameters, kind, words = BAD_REQUESTS[name]

    assert_refused(caller.generate(inputs, parameters=parameters, model="lorax_ensemble"), kind, words)


def test_a_wrong_type_or_shape_is_refused_by_the_server_itself(server, caller):
    wrong_shape = caller.generate({"text_input": ["one", "two"]})
    wrong_type, _ = http_post(
        server.http_address, "/v2/models/lorax/generate", {"text_input": PROMPT, "max_tokens": "many"}
    )

    assert "text_input" in wrong_shape.error["error"]
    assert wrong_type >= 400


def test_a_bad_request_is_answered_at_once(caller):
    started = time.monotonic()
    for _ in range(20):
        assert caller.generate({"text_input": PROMPT, "top_p": 2.0}).error is not None

    assert time.monotonic() - started < 60.0
