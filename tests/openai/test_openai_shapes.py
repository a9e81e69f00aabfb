"""Answers and chunks hold against the official package's own models, strictly: nothing missing, nothing of another
type, nothing those models do not know."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest
from fakes_openai import ScriptedBackend, chat, complete, ending, saying
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from lorax_triton.openai_api import Piece

# Present in every answer of OpenAI's, though the package's models could do without.
ALWAYS = {
    "ChatCompletion": {"usage", "system_fingerprint"},
    "ChatCompletionMessage": {"content", "refusal"},
    "Completion": {"usage", "system_fingerprint"},
    "CompletionUsage": {"prompt_tokens_details"},
    "PromptTokensDetails": {"cached_tokens"},
    "ChatCompletionTokenLogprob": {"bytes"},
    "TopLogprob": {"bytes"},
    "ChoiceLogprobs": {"content", "refusal"},
    "ChoiceDeltaToolCall": {"function"},
}
TOOL = {"type": "function", "function": {"name": "add"}}


def check(kind: type[pydantic.BaseModel], payload: Any, extra: frozenset[str] = frozenset()) -> None:
    """Fail unless `payload` is a `kind`, and has no fields beyond it but `extra`."""
    walk(kind.model_validate_json(json.dumps(payload), strict=True), extra)


def walk(value: Any, extra: frozenset[str]) -> None:
    if isinstance(value, list):
        for item in value:
            walk(item, extra)
    elif isinstance(value, pydantic.BaseModel):
        name = type(value).__name__
        assert set(value.model_extra or ()) <= extra, f"{name} has more than OpenAI's: {value.model_extra}"
        absent = ALWAYS.get(name, set()) - value.model_fields_set
        assert not absent, f"{name} lacks {absent}"
        for field in value.model_fields_set:
            walk(getattr(value, field, None), extra)


def check_choices(choices: list[dict[str, Any]]) -> None:
    for choice in choices:
        assert {"index", "logprobs", "finish_reason"} <= set(choice)


def raw(client: openai.OpenAI, resource: str, **fields: Any) -> Any:
    """The JSON of an answer, as it was sent."""
    path = client.chat.completions if resource == "chat" else client.completions
    values: dict[str, Any] = {"model": "", "max_tokens": 6, "temperature": 0, **fields}
    values |= {"messages": [{"role": "user", "content": "Hi"}]} if resource == "chat" else {"prompt": "Hi"}
    return json.loads(path.with_raw_response.create(**values).content)


def raw_events(client: openai.OpenAI, resource: str, **fields: Any) -> list[Any]:
    """The JSON of each event of a stream, as it was sent."""
    path = client.chat.completions if resource == "chat" else client.completions
    values: dict[str, Any] = {"model": "", "max_tokens": 6, "temperature": 0, "stream": True, **fields}
    values |= {"messages": [{"role": "user", "content": "Hi"}]} if resource == "chat" else {"prompt": "Hi"}
    with path.with_streaming_response.create(**values) as response:
        lines = [line[6:] for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}])
def test_chat_answers_have_openais_shape(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    payload = raw(client, "chat", **fields)
    check(ChatCompletion, payload)
    check_choices(payload["choices"])


@pytest.mark.parametrize(
    "fields",
    [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"stream_options": {"include_usage": True}}],
)
def test_chat_chunks_have_openais_shape(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    for payload in raw_events(client, "chat", **fields):
        check(ChatCompletionChunk, payload)
        check_choices(payload["choices"])
        assert {"id", "created", "model", "object", "system_fingerprint"} <= set(payload)


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"logprobs": 2}, {"echo": True}])
def test_completions_have_openais_shape(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    payload = raw(client, "completions", **fields)
    check(Completion, payload)
    check_choices(payload["choices"])


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"stream_options": {"include_usage": True}}])
def test_completion_chunks_have_openais_shape(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    # The package's model of a chunk is that of an answer, whose finish reason is never null; chunks' is.
    for payload in raw_events(client, "completions", **fields):
        check_choices(payload["choices"])
        finished = [
            choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in payload["choices"]
        ]
        chunk = payload | {"choices": finished}
        if chunk.get("usage") is None:
            chunk["usage"] = {
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "total_tokens": 0,
                "prompt_tokens_details": {"cached_tokens": 0},
            }
        check(Completion, chunk)


def test_models_have_openais_shape_and_tell_more(client: openai.OpenAI, adapter: str) -> None:
    raw(client, "chat", model=adapter)
    payload = json.loads(client.models.with_raw_response.list().content)
    assert payload["object"] == "list"
    more = frozenset({"root", "parent", "source", "revision", "rank", "tier", "status", "pinned"})
    for model in payload["data"]:
        check(Model, model, more)


def test_tool_calls_have_openais_shape() -> None:
    said = saying('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    payload = chat(ScriptedBackend(said), tools=[TOOL]).json
    check(ChatCompletion, payload)
    assert payload["choices"][0]["message"]["tool_calls"]
    for event in chat(ScriptedBackend(said), tools=[TOOL], stream=True).events:
        check(ChatCompletionChunk, event)


def test_log_probabilities_that_the_server_lacks_keep_the_shape() -> None:
    def script(call: Any) -> list[Piece | Exception]:
        return [Piece("x", [{"id": 1, "text": "x", "logprob": None}]), ending()]

    check(ChatCompletion, chat(ScriptedBackend(script), logprobs=True).json)
    complete(ScriptedBackend(script), logprobs=1)


@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_openais_shape(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="", messages=[], stream=stream)
    body = error.value.response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert error.value.type == "invalid_request_error"
    assert error.value.param == "messages"
