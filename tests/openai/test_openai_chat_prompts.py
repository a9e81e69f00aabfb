"""LoRAX's rows of `/v1/chat/completions` for what an answer is made from: models, messages, templates, own fields."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from fakes_openai import BASE, USER, ScriptedBackend, ask, chat, ending
from openai_chats import answer, sampling, text

import lorax_triton
from lorax_triton.openai_api import Piece


def test_c01_a_model_is_the_base_an_adapter_an_alias_or_both_with_a_colon(
    client: openai.OpenAI, tiny_model: str, adapter: str
) -> None:
    base = text(client, model="")
    assert text(client, model=tiny_model) == base
    adapted = text(client, model=adapter)
    assert adapted != base
    for name in ("my-alias", f"{tiny_model}:{adapter}", f"{tiny_model}:my-alias"):
        assert text(client, model=name) == adapted
    with pytest.raises(openai.NotFoundError) as error:
        answer(client, model="no/such/adapter")
    assert error.value.code == "model_not_found"
    assert error.value.param == "model"


def test_c01_a_request_without_a_model_is_refused() -> None:
    told = chat(ScriptedBackend(), model=None)
    assert told.status == 400
    assert told.error["param"] == "model"


def test_the_base_model_is_asked_for_even_if_the_server_has_a_default_adapter() -> None:
    for model, sent in ((BASE, "__base_model__"), ("", None), (f"{BASE}:x/y", "x/y"), ("x/y@rev", "x/y@rev")):
        backend = ScriptedBackend()
        chat(backend, model=model)
        assert backend.call.adapter_id == sent


def test_c02_contents_are_texts_parts_images_or_null_and_messages_may_have_names() -> None:
    backend = ScriptedBackend()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "Ann", "content": [
            {"type": "text", "text": "What is this? "},
            {"type": "image_url", "image_url": {"url": "http://x/y.png"}},
        ]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "assistant", "content": None},
    ]  # fmt: skip
    assert chat(backend, messages=messages).status == 200
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    assert backend.call.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "name": "Ann", "content": "What is this? ![](http://x/y.png)"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a cat"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("Hi", "messages"),
        (["Hi"], "messages[0]"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "robot", "content": "Hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "messages[0].tool_calls[0].function"),
    ],
)
def test_c02_messages_that_cannot_be_read_are_refused_by_name(messages: Any, param: str) -> None:
    told = chat(ScriptedBackend(), messages=messages)
    assert told.status == 400
    assert told.error["param"] == param


def test_c19_loraxs_fields_choose_the_adapters_source_and_token(client: openai.OpenAI, adapter: str) -> None:
    backend = ScriptedBackend()
    chat(backend, model="some/adapter", adapter_source="s3", api_token="secret", top_k=3)
    call = backend.call
    assert (call.adapter_id, call.adapter_source, call.api_token) == ("some/adapter", "s3", "secret")
    assert "secret" not in repr(call)
    extra = {"adapter_source": "local", "top_k": 3, "repetition_penalty": 1.1, "ignore_eos_token": True}
    got = answer(client, model=adapter, extra_body=extra)
    assert got.usage.completion_tokens == 12


def test_c19_a_key_is_the_adapters_token_unless_it_stands_for_none() -> None:
    for header, token in (("Bearer hf_x", "hf_x"), ("Bearer EMPTY", None), ("Basic abc", None)):
        backend = ScriptedBackend()
        ask(backend, "chat/completions", {"Authorization": header}, messages=USER)
        assert backend.call.api_token == token


def test_c20_what_lorax_hides_from_openais_routes_is_reachable() -> None:
    merged = {"ids": ["a", "b"], "weights": [0.5, 0.5]}
    fields = {
        "merged_adapters": merged,
        "typical_p": 0.9,
        "watermark": True,
        "truncate": 100,
        "min_tokens": 2,
    }
    assert sampling(**fields).items() >= fields.items()
    token = {
        "id": 1,
        "text": "x",
        "logprob": -1.0,
        "alternative_tokens": [{"id": 2, "text": "y", "logprob": -2.0}],
    }
    backend = ScriptedBackend(lambda call: [Piece("x", [token]), ending()])
    told = chat(backend, return_k_alternatives=1)
    assert backend.call.sampling["logprobs"] == 1
    assert told.json["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["token"] == "y"


def test_c20_truncate_shortens_the_prompt(client: openai.OpenAI) -> None:
    assert answer(client, extra_body={"truncate": 5}).usage.prompt_tokens == 5


def rendered(content: str) -> str:
    """What the tiny model's chat template makes of a user's message."""
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def test_c21_messages_are_rendered_with_the_models_template(client: openai.OpenAI) -> None:
    written = client.completions.create(
        model="",
        prompt=rendered("Hi"),
        max_tokens=12,
        temperature=0,
        extra_body={"add_special_tokens": False},
    )
    chatted = answer(client)
    assert chatted.choices[0].message.content == written.choices[0].text
    assert chatted.usage == written.usage or chatted.usage.prompt_tokens == written.usage.prompt_tokens


def test_c22_an_adapters_own_template_wins(client: openai.OpenAI, templated_adapter: str) -> None:
    written = client.completions.create(
        model=templated_adapter,
        prompt="adapter:Hi;",
        max_tokens=12,
        temperature=0,
        extra_body={"add_special_tokens": False},
    )
    chatted = answer(client, model=templated_adapter)
    assert chatted.choices[0].message.content == written.choices[0].text
    assert chatted.usage.prompt_tokens == written.usage.prompt_tokens


def test_c23_no_special_tokens_are_added_after_the_template(
    client: openai.OpenAI, native: lorax_triton.Client
) -> None:
    ids = native.tokenize(rendered("Hi"), add_special_tokens=False)
    assert answer(client).usage.prompt_tokens == len(ids)
