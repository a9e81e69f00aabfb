"""What LoRAX's `/v1/completions` does, row by row, and what was wrong there and is right here."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest
from fakes_openai import ScriptedBackend, ask_raw, complete, ending, saying

import lorax_triton
from lorax_triton.openai_api import Call, Piece

IGNORE_EOS = {"ignore_eos_token": True}


def answer(client: openai.OpenAI, **fields: Any) -> Any:
    """A greedy answer of a few tokens."""
    values = {"model": "", "prompt": "Hello", "max_tokens": 8, "temperature": 0, **fields}
    return client.completions.create(**values)


def text(client: openai.OpenAI, **fields: Any) -> str:
    return str(answer(client, **fields).choices[0].text)


def sampling(**fields: Any) -> dict[str, Any]:
    """The sampling parameters that the server is sent."""
    backend = ScriptedBackend()
    told = complete(backend, **fields)
    assert told.status == 200, told.json
    return backend.call.sampling


def test_c40_a_prompt_is_a_text_token_ids_or_a_list_of_either(
    client: openai.OpenAI, native: lorax_triton.Client
) -> None:
    ids = {prompt: [token["id"] for token in native.tokenize(prompt)] for prompt in ("Hello", "Once upon")}
    one, other = text(client), text(client, prompt="Once upon")
    assert one != other
    assert text(client, prompt=ids["Hello"]) == one
    for several in (["Hello", "Once upon"], [ids["Hello"], ids["Once upon"]]):
        got = answer(client, prompt=several)
        assert [(choice.index, choice.text) for choice in got.choices] == [(0, one), (1, other)]
        assert got.usage.prompt_tokens == len(ids["Hello"]) + len(ids["Once upon"])
    for bad in (None, [], 3, [[]], ["a", 3], [["a"]], ""):
        told = complete(ScriptedBackend(), prompt=bad)
        assert told.status == 400
        assert told.error["param"].startswith("prompt")


def test_c41_a_model_is_the_base_an_adapter_an_alias_or_both_with_a_colon(
    client: openai.OpenAI, tiny_model: str, adapter: str
) -> None:
    base, adapted = text(client, model=tiny_model), text(client, model=adapter)
    assert text(client) == base
    assert adapted != base
    assert text(client, model="my-alias") == text(client, model=f"{tiny_model}:{adapter}") == adapted


def test_c42_sampling_fields_reach_the_server_as_they_are(client: openai.OpenAI) -> None:
    fields = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 3, "presence_penalty": 1}
    more = {"frequency_penalty": 1, "repetition_penalty": 1.1, "stop": ["x"], "ignore_eos_token": True}
    assert sampling(**fields, **more).items() >= {**fields, **more}.items()
    assert sampling()["max_tokens"] == 16  # OpenAI's default
    backend = ScriptedBackend()
    complete(backend, model="an/adapter", adapter_source="hub", api_token="secret")
    assert (backend.call.adapter_source, backend.call.api_token) == ("hub", "secret")
    whole = text(client, extra_body=IGNORE_EOS)
    stopped = answer(client, stop=whole[2:4], extra_body=IGNORE_EOS)
    assert stopped.choices[0].text == whole[: whole.index(whole[2:4])]
    assert stopped.choices[0].finish_reason == "stop"


def test_c42_best_of_gives_the_likeliest_of_several(client: openai.OpenAI) -> None:
    values = {"temperature": 1.0, "seed": 11, "max_tokens": 4, "logprobs": 0, "extra_body": IGNORE_EOS}
    everyone = answer(client, n=4, **values)
    best = answer(client, n=1, best_of=4, **values)
    means = [sum(choice.logprobs.token_logprobs) for choice in everyone.choices]
    assert best.choices[0].text == everyone.choices[means.index(max(means))].text
    assert len(best.choices) == 1
    assert best.usage.completion_tokens == 16
    for fields, param in (({"n": 3, "best_of": 2}, "best_of"), ({"best_of": 2, "stream": True}, "best_of")):
        told = complete(ScriptedBackend(), **fields)
        assert told.status == 400
        assert told.error["param"] == param


def test_c43_echo_puts_the_prompt_before_the_text(client: openai.OpenAI, native: lorax_triton.Client) -> None:
    plain = text(client)
    assert text(client, echo=True) == "Hello" + plain
    ids = [token["id"] for token in native.tokenize("Hello")]
    assert text(client, prompt=ids, echo=True) == "Hello" + plain
    streamed = "".join(chunk.choices[0].text for chunk in answer(client, echo=True, stream=True))
    assert streamed == "Hello" + plain
    nothing_new = answer(client, echo=True, max_tokens=0)
    assert nothing_new.choices[0].text == "Hello"
    assert nothing_new.usage.completion_tokens == 0
    assert nothing_new.usage.prompt_tokens > 0
    told = complete(ScriptedBackend(), max_tokens=0)
    assert told.error["param"] == "max_tokens"


def test_c44_logprobs_have_tokens_alternatives_and_offsets_in_the_text(client: openai.OpenAI) -> None:
    assert answer(client).choices[0].logprobs is None
    choice = answer(client, logprobs=2, extra_body=IGNORE_EOS).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert (
        len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 8
    )
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())
    only = answer(client, logprobs=0).choices[0].logprobs
    assert only.top_logprobs is None
    assert only.token_logprobs

    chunks = list(answer(client, logprobs=2, stream=True, extra_body=IGNORE_EOS))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for part in parts for token in part.tokens] == told.tokens
    assert [offset for part in parts for offset in part.text_offset] == told.text_offset


def test_c44_with_echo_the_prompts_tokens_have_log_probabilities_too(client: openai.OpenAI) -> None:
    choice = answer(client, logprobs=1, echo=True, max_tokens=4, extra_body=IGNORE_EOS).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert choice.text.startswith("Hello")
    assert told.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in told.token_logprobs[1:])
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    scored = answer(client, logprobs=1, echo=True, max_tokens=0).choices[0].logprobs
    assert "".join(scored.tokens) == "Hello"


def test_c45_n_gives_that_many_choices_of_each_prompt(client: openai.OpenAI) -> None:
    got = answer(client, prompt=["Hello", "Once"], n=2, temperature=1, seed=5, extra_body=IGNORE_EOS)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in got.choices}) > 2
    alone = answer(client, prompt="Once", temperature=1, seed=5, extra_body=IGNORE_EOS)
    assert got.choices[2].text == alone.choices[0].text
    assert got.usage.completion_tokens == 32
    assert "do_sample" not in sampling(n=1, temperature=0)


def test_c46_suffix_is_refused_logit_bias_works_and_user_is_ignored(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        answer(client, suffix="the end")
    assert error.value.param == "suffix"
    assert len(set(text(client, logit_bias={"70": 100}, user="ann"))) == 1


def test_c47_an_answer_has_its_own_id_the_time_and_the_model_asked_for(
    client: openai.OpenAI, adapter: str
) -> None:
    first, second = answer(client, model=adapter), answer(client, model=adapter)
    assert first.id.startswith("cmpl-")
    assert first.id != second.id
    assert first.object == "text_completion"
    assert first.model == adapter
    assert abs(first.created - time.time()) < 60
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens


def test_c48_chunks_have_the_usage_once_and_end_with_the_end_mark() -> None:
    told = complete(ScriptedBackend(saying("Hello", " there")), stream=True)
    assert [event["choices"][0]["text"] for event in told.events] == ["Hello", " there", ""]
    assert [event["choices"][0]["finish_reason"] for event in told.events] == [None, None, "stop"]
    assert ["usage" in event for event in told.events] == [False, False, True]
    assert {event["object"] for event in told.events} == {"text_completion"}
    assert len({event["id"] for event in told.events}) == 1
    assert told.done
    told = complete(ScriptedBackend(), stream=True, stream_options={"include_usage": True})
    assert [event["usage"] is None for event in told.events] == [True] * (len(told.events) - 1) + [False]


def test_c48_a_stream_of_several_prompts_tells_them_apart(client: openai.OpenAI) -> None:
    whole = answer(client, prompt=["Hello", "Once"], n=2, temperature=1, seed=5)
    texts = [""] * 4
    for chunk in answer(client, prompt=["Hello", "Once"], n=2, temperature=1, seed=5, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_c49_a_response_format_is_carried_to_the_server(client: openai.OpenAI) -> None:
    schema = {"type": "object"}
    sent = sampling(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert sent["response_format"] == {"type": "json_schema", "schema": schema}
    with pytest.raises(openai.BadRequestError) as error:
        answer(client, extra_body={"response_format": {"type": "json_object"}})
    assert error.value.param == "response_format"


def test_c50_models_are_the_base_the_adapters_met_and_the_aliases(
    client: openai.OpenAI, tiny_model: str, adapter: str
) -> None:
    answer(client, model=adapter)
    models = {model.id: model for model in client.models.list()}
    assert next(iter(models)) == tiny_model
    assert models[adapter].model_extra is not None
    assert models[adapter].model_extra["parent"] == tiny_model
    assert models[adapter].model_extra["rank"] == 8
    assert models[adapter].model_extra["tier"] == "device"
    assert models["my-alias"].model_extra["root"] == adapter
    for name in (tiny_model, adapter, "my-alias"):
        assert client.models.retrieve(name).id == name
    assert client.models.retrieve(f"{tiny_model}:{adapter}").id == adapter
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("no/such")
    assert error.value.code == "model_not_found"


def test_c50_embeddings_are_refused_until_a_model_makes_them(client: openai.OpenAI, tiny_model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model=tiny_model, input="Hello", encoding_format="float")
    with pytest.raises(openai.NotFoundError):
        client.moderations.create(input="Hello", model="")


def test_unknown_paths_and_methods_and_bodies_have_errors_of_openais_form() -> None:
    backend = ScriptedBackend()
    assert ask_raw(backend, "GET", "/v1/files").status == 404
    assert ask_raw(backend, "GET", "/v1/completions").status == 405
    assert ask_raw(backend, "DELETE", "/v1/models/x").status == 405
    for body in (b"", b"{", b"[]", b"\xff", b'"x"'):
        told = ask_raw(backend, "POST", "/v1/completions", body)
        assert told.status == 400
        assert set(told.error) == {"message", "type", "param", "code"}


def test_a_prompts_tokens_are_asked_for_in_a_request_of_their_own() -> None:
    def script(call: Call) -> list[Piece | Exception]:
        if call.echo:
            prefill = [{"id": 1, "text": "On"}, {"id": 2, "text": "ce", "logprob": -1.5}]
            return [ending("Once!", prefill=prefill, generated_text="Once!")]
        token = {"id": 3, "text": " more", "logprob": -0.5, "alternative_tokens": []}
        return [Piece(" more", [token]), ending()]

    backend = ScriptedBackend(script)
    told = complete(backend, echo=True, logprobs=1).json["choices"][0]
    assert told["text"] == "Once more"
    assert told["logprobs"] == {
        "tokens": ["On", "ce", " more"],
        "token_logprobs": [None, -1.5, -0.5],
        "top_logprobs": [None, {"ce": -1.5}, {" more": -0.5}],
        "text_offset": [0, 2, 4],
    }
    assert [call.sampling.get("decoder_input_details") for call in backend.calls] == [True, None]
