"""LoRAX's rows of `/v1/chat/completions` for how tokens are drawn, where an answer ends and what form it has."""

from __future__ import annotations

import openai
import pytest
from fakes_openai import ScriptedBackend, chat
from openai_chats import answer, sampling, text


def test_c03_max_tokens_and_max_completion_tokens_bound_the_answer(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        got = answer(
            client, **{"max_tokens": openai.NOT_GIVEN, name: 4, "extra_body": {"ignore_eos_token": True}}
        )
        assert got.usage.completion_tokens == 4
        assert got.choices[0].finish_reason == "length"
    for bad in (-1, 0):
        with pytest.raises(openai.BadRequestError) as error:
            answer(client, max_tokens=bad)
        assert error.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as error:
        answer(client, max_tokens=1_000_000)
    assert error.value.code == "context_length_exceeded"


def test_c04_temperature_0_is_greedy_and_no_temperature_samples_at_1(client: openai.OpenAI) -> None:
    assert sampling(temperature=0)["temperature"] == 0
    assert "do_sample" not in sampling(temperature=0)
    assert sampling()["temperature"] == 1.0
    assert sampling()["do_sample"] is True
    assert text(client) == text(client)
    texts = {text(client, temperature=openai.NOT_GIVEN, seed=seed) for seed in range(4)}
    assert len(texts) > 1


def test_c05_sampling_fields_reach_the_server_as_they_are(client: openai.OpenAI) -> None:
    fields = {"top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    extra = {"top_k": 5, "repetition_penalty": 1.2, "ignore_eos_token": True}
    sent = sampling(**fields, **extra, seed=7)
    assert sent.items() >= {**fields, **extra, "seed": 7}.items()
    first, second = (text(client, **fields, temperature=0.8, seed=7, extra_body=extra) for _ in range(2))
    assert first == second
    for name, value in (("top_p", 1.5), ("presence_penalty", 3), ("frequency_penalty", "much")):
        with pytest.raises(openai.BadRequestError) as error:
            answer(client, **{name: value})
        assert error.value.param == name


def test_c07_stop_is_a_text_or_a_list_and_is_not_in_the_answer(client: openai.OpenAI) -> None:
    whole = text(client, extra_body={"ignore_eos_token": True})
    stop = whole[3:5]
    for value in (stop, [stop], ["never to be seen", stop]):
        got = answer(client, stop=value, extra_body={"ignore_eos_token": True})
        assert got.choices[0].message.content == whole[: whole.index(stop)]
        assert got.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as error:
        answer(client, stop=[3])
    assert error.value.param == "stop[0]"


def test_c09_logit_bias_changes_what_is_drawn_and_user_changes_nothing(client: openai.OpenAI) -> None:
    token = 70
    favoured = answer(client, logit_bias={str(token): 100}, user="ann", max_tokens=3)
    assert len(set(favoured.choices[0].message.content)) == 1
    assert favoured.choices[0].finish_reason == "length"
    assert text(client, user="ann") == text(client)
    for bad in ({"x": 1}, {"5": 101}, {"5": "much"}):
        told = chat(ScriptedBackend(), logit_bias=bad)
        assert told.status == 400
        assert told.error["param"].startswith("logit_bias")


def test_c11_a_response_format_is_carried_to_the_server() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert "response_format" not in sampling(response_format={"type": "text"})
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert sampling(response_format=wrapped)["response_format"] == {"type": "json_schema", "schema": schema}
    legacy = {"type": "json_object", "schema": schema}
    assert sampling(response_format=legacy)["response_format"] == {"type": "json_object", "schema": schema}
    for bad, param in (
        ("json", "response_format"),
        ({}, "response_format.type"),
        ({"type": "yaml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
    ):
        told = chat(ScriptedBackend(), response_format=bad)
        assert told.status == 400
        assert told.error["param"] == param


def test_c11_a_server_that_cannot_hold_to_a_format_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        answer(client, response_format={"type": "json_object"})
    assert error.value.param == "response_format"
    assert error.value.code == "unsupported_parameter"


def test_c12_json_object_without_a_schema_is_any_object() -> None:
    schema = {
        "additionalProperties": {"type": ["object", "string", "integer", "number", "boolean", "null"]},
        "title": "ArbitraryJsonModel",
        "type": "object",
    }
    for given in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "any"}}):
        assert sampling(response_format=given)["response_format"]["schema"] == schema
