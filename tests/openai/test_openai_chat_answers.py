"""LoRAX's rows of `/v1/chat/completions` for what comes back: choices, chunks, log probabilities, usage."""

from __future__ import annotations

import time

import openai
import pytest
from fakes_openai import ScriptedBackend, chat, saying
from openai_chats import answer


def test_c06_n_gives_choices_in_order_of_their_index_and_sums_their_tokens(client: openai.OpenAI) -> None:
    body = {"ignore_eos_token": True}
    got = answer(client, n=3, temperature=1, seed=1, max_tokens=8, extra_body=body)
    assert [choice.index for choice in got.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in got.choices]
    assert len(set(texts)) > 1
    alone = answer(client, temperature=1, seed=1, max_tokens=8, extra_body=body)
    assert alone.choices[0].message.content == texts[0]
    assert got.usage.completion_tokens == 24
    assert got.usage.prompt_tokens == alone.usage.prompt_tokens

    streamed = ["", "", ""]
    for chunk in answer(client, n=3, temperature=1, seed=1, max_tokens=8, extra_body=body, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_c08_a_stream_gives_the_same_text_and_its_usage_where_it_is_asked_for(client: openai.OpenAI) -> None:
    whole = answer(client)
    chunks = list(answer(client, stream=True, stream_options={"include_usage": True}))
    told = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert told == whole.choices[0].message.content
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    with pytest.raises(openai.BadRequestError) as error:
        answer(client, stream_options={"include_usage": True})
    assert error.value.param == "stream_options"


def test_c10_log_probabilities_and_alternatives_come_when_asked_for(client: openai.OpenAI) -> None:
    assert answer(client).choices[0].logprobs is None
    got = answer(client, logprobs=True, top_logprobs=3, extra_body={"ignore_eos_token": True})
    tokens = got.choices[0].logprobs.content
    assert len(tokens) == got.usage.completion_tokens
    assert "".join(token.token for token in tokens) == got.choices[0].message.content
    for token in tokens:
        assert token.logprob <= 0
        assert bytes(token.bytes) == token.token.encode()
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # it was greedy
    only = answer(client, logprobs=True).choices[0].logprobs.content
    assert only[0].top_logprobs == []
    chunks = answer(client, logprobs=True, top_logprobs=3, stream=True, extra_body={"ignore_eos_token": True})
    streamed = [
        token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert streamed == tokens
    with pytest.raises(openai.BadRequestError) as error:
        answer(client, top_logprobs=3)
    assert error.value.param == "top_logprobs"


def test_c30_an_answer_has_its_own_id_the_time_and_the_model_asked_for(
    client: openai.OpenAI, tiny_model: str, adapter: str
) -> None:
    first, second = answer(client, model=adapter), answer(client, model="")
    assert first.id.startswith("chatcmpl-")
    assert first.id != second.id
    assert first.object == "chat.completion"
    assert abs(first.created - int(time.time())) < 60
    assert first.model == adapter
    assert second.model == tiny_model
    usage = first.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert first.choices[0].message.role == "assistant"
    assert first.system_fingerprint


@pytest.mark.parametrize(
    ("reason", "word"), [("length", "length"), ("eos_token", "stop"), ("stop_sequence", "stop")]
)
def test_c31_each_reason_to_end_has_openais_word(reason: str, word: str) -> None:
    assert chat(ScriptedBackend(saying("x", reason=reason))).json["choices"][0]["finish_reason"] == word
    events = chat(ScriptedBackend(saying("x", reason=reason)), stream=True).events
    assert events[-1]["choices"][0]["finish_reason"] == word


def test_c32_chunks_tell_the_role_once_and_who_they_are_always() -> None:
    told = chat(ScriptedBackend(saying("Hello", " there")), stream=True, model="some/adapter")
    assert told.headers["content-type"].startswith("text/event-stream")
    assert told.done
    deltas = [event["choices"][0]["delta"] for event in told.events]
    assert deltas == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hello"},
        {"content": " there"},
        {},
    ]
    assert [event["choices"][0]["finish_reason"] for event in told.events] == [None, None, None, "stop"]
    assert {event["object"] for event in told.events} == {"chat.completion.chunk"}
    assert {event["model"] for event in told.events} == {"some/adapter"}
    assert len({(event["id"], event["created"]) for event in told.events}) == 1


def test_c32_the_usage_comes_with_the_last_chunk_or_as_the_request_says() -> None:
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    told = chat(ScriptedBackend(), stream=True)
    assert [event.get("usage") for event in told.events] == [None, None, None, usage]
    told = chat(ScriptedBackend(), stream=True, stream_options={"include_usage": True})
    assert [event["usage"] for event in told.events] == [None, None, None, None, usage]
    assert told.events[-1]["choices"] == []
    told = chat(ScriptedBackend(), stream=True, stream_options={"include_usage": False})
    assert all("usage" not in event for event in told.events)
