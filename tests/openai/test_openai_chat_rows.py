"""What LoRAX's `/v1/chat/completions` does, row by row, and what was wrong there and is right here.

`client` is the official package, once over HTTP and once over gRPC; `ScriptedBackend` shows what the server is asked.
"""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from fakes_openai import BASE, USER, ScriptedBackend, chat, ending, saying

import lorax_triton
from lorax_triton.openai_api import Piece

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
OTHER_TOOL = {"type": "function", "function": {"name": "get_weather"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def answer(client: openai.OpenAI, **fields: Any) -> Any:
    """A greedy chat answer of a few tokens."""
    values = {"model": "", "messages": USER, "max_tokens": 12, "temperature": 0, **fields}
    return client.chat.completions.create(**values)


def text(client: openai.OpenAI, **fields: Any) -> str:
    return str(answer(client, **fields).choices[0].message.content)


def sampling(**fields: Any) -> dict[str, Any]:
    """The sampling parameters that the server is sent for a chat request."""
    backend = ScriptedBackend()
    told = chat(backend, **fields)
    assert told.status == 200, told.json
    return backend.call.sampling


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


def test_c13_tools_and_a_response_format_exclude_each_other() -> None:
    told = chat(ScriptedBackend(), tools=[TOOL], response_format={"type": "json_object"})
    assert told.status == 400
    assert told.error["param"] == "response_format"
    sent = sampling(tools=[TOOL], tool_choice="none", response_format={"type": "json_object"})
    assert "response_format" in sent


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ("add", "tools"),
        (["add"], "tools[0]"),
        ([{"type": "retrieval"}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "f", "parameters": 3}}], "tools[0].function.parameters"),
    ],
)
def test_c13_tools_that_cannot_be_read_are_refused_by_name(tools: Any, param: str) -> None:
    told = chat(ScriptedBackend(), tools=tools)
    assert told.status == 400
    assert told.error["param"] == param


def test_c14_tool_choice_is_auto_none_required_or_a_name_in_either_form() -> None:
    tools = [TOOL, OTHER_TOOL]
    assert "response_format" not in sampling(tools=tools)
    assert "response_format" not in sampling(tools=tools, tool_choice="auto")
    assert "response_format" not in sampling(tools=tools, tool_choice="none")
    forced = sampling(tools=tools, tool_choice="required")["response_format"]["schema"]
    names = [call["properties"]["name"]["const"] for call in forced["items"]["anyOf"]]
    assert names == ["add", "get_weather"]
    single = sampling(tools=tools, tool_choice="required", parallel_tool_calls=False)
    assert "anyOf" in single["response_format"]["schema"]
    for choice in ("get_weather", {"type": "function", "function": {"name": "get_weather"}}):
        schema = sampling(tools=tools, tool_choice=choice)["response_format"]["schema"]
        assert schema["properties"]["name"] == {"const": "get_weather"}
    for bad, with_tools in (("subtract", True), ({"type": "function"}, True), (3, True), ("required", False)):
        told = chat(ScriptedBackend(), tool_choice=bad, **({"tools": tools} if with_tools else {}))
        assert told.status == 400
        assert told.error["param"].startswith("tool_choice")


def allowed(mode: Any, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize("stream", [False, True])
def test_c14_of_allowed_tools_the_model_is_told_of_those_alone_and_calls_no_other(stream: bool) -> None:
    said = '{"name": "add", "parameters": {"a": 1}}'
    for choice, calls in ((allowed("auto", "add"), 1), (allowed("auto", "get_weather"), 0)):
        backend = ScriptedBackend(saying(said[:9], said[9:]))
        told = chat(backend, tools=[TOOL, OTHER_TOOL], tool_choice=choice, stream=stream)
        (sent,) = backend.call.sampling["tools"]
        assert [sent["function"]] == [choice["allowed_tools"]["tools"][0]["function"] | sent["function"]]
        assert "response_format" not in backend.call.sampling
        events = told.events if stream else [told.json]
        parts = [
            event["choices"][0]["delta" if stream else "message"] for event in events if event["choices"]
        ]
        assert sum(len(part.get("tool_calls") or ()) > 0 for part in parts) >= calls
        assert any(part.get("tool_calls") for part in parts) == bool(calls)
    both = sampling(tools=[OTHER_TOOL, TOOL], tool_choice=allowed("auto", "add", "get_weather"))
    assert both["tools"] == [OTHER_TOOL, TOOL]
    flat = {"mode": "auto", "tools": [{"type": "function", "name": "add"}]}
    choice = {"type": "allowed_tools", "allowed_tools": flat}
    assert sampling(tools=[TOOL, OTHER_TOOL], tool_choice=choice)["tools"] == [TOOL]


def test_c14_one_of_the_allowed_tools_can_be_required_as_any_can() -> None:
    sent = sampling(tools=[TOOL, OTHER_TOOL], tool_choice=allowed("required", "get_weather"))
    assert sent["tools"] == [OTHER_TOOL]
    assert sent["response_format"]["schema"]["items"]["properties"]["name"] == {"const": "get_weather"}


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "allowed_tools": []}, "tool_choice.allowed_tools"),
        (allowed(None, "add"), "tool_choice.allowed_tools.mode"),
        (allowed("never", "add"), "tool_choice.allowed_tools.mode"),
        (allowed("auto"), "tool_choice.allowed_tools.tools"),
        (allowed("auto", "add", "other"), "tool_choice.allowed_tools.tools[1]"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [3]}},
            "tool_choice.allowed_tools.tools[0]",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}},
            "tool_choice.allowed_tools.tools[0].name",
        ),
        ({"type": "custom", "custom": {"name": "add"}}, "tool_choice.type"),
    ],
)
def test_c14_allowed_tools_that_cannot_be_read_are_refused_by_name(choice: Any, param: str) -> None:
    told = chat(ScriptedBackend(), tools=[TOOL], tool_choice=choice)
    assert (told.status, told.error["param"]) == (400, param)


def test_c16_calls_written_as_python_are_told_as_all_others() -> None:
    pieces = ["[get_", "weather(city='Pa", "ris'), add(a=1)", "]"]
    told = chat(ScriptedBackend(saying(*pieces)), tools=[TOOL, OTHER_TOOL])
    (choice,) = told.json["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    assert functions == [
        {"name": "get_weather", "arguments": '{"city": "Paris"}'},
        {"name": "add", "arguments": '{"a": 1}'},
    ]
    events = chat(ScriptedBackend(saying(*pieces)), tools=[TOOL, OTHER_TOOL], stream=True).events
    deltas = [
        call
        for event in events
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls") or ()
    ]
    assert [delta["index"] for delta in deltas] == [0, 0, 1, 1]
    assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"city": "Paris"}{"a": 1}'


def test_c14_with_none_a_call_in_the_text_stays_text() -> None:
    told = chat(ScriptedBackend(saying(CALL)), tools=[TOOL], tool_choice="none")
    assert told.json["choices"][0]["message"]["content"] == CALL


def test_c14_a_server_that_cannot_force_a_call_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        answer(client, tools=[TOOL], tool_choice="required")
    assert error.value.param == "tool_choice"


def test_c15_a_forced_call_is_held_to_the_tools_parameters_and_read_back() -> None:
    told_schema = sampling(tools=[TOOL], tool_choice="add")["response_format"]["schema"]
    assert told_schema["properties"]["arguments"] == TOOL["function"]["parameters"]
    assert told_schema["required"] == ["name", "arguments"]
    for said in ('{"name": "add", "arguments": {"a": 1}}', '[{"name": "add", "arguments": {"a": 1}}]'):
        told = chat(ScriptedBackend(saying(said)), tools=[TOOL], tool_choice="required")
        (call,) = told.json["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_c16_calls_have_ids_of_their_own_and_end_with_tool_calls() -> None:
    backend = ScriptedBackend(saying(CALL, CALL))
    told = chat(backend, tools=[TOOL])
    choice = told.json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    calls = choice["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["add", "add"]
    assert all(json.loads(call["function"]["arguments"]) == {"a": 1} for call in calls)
    assert all(call["type"] == "function" and re.fullmatch(r"call_\w{24}", call["id"]) for call in calls)
    again = chat(backend, tools=[TOOL]).json["choices"][0]["message"]["tool_calls"]
    assert len({call["id"] for call in [*calls, *again]}) == 4
    one = chat(ScriptedBackend(saying(CALL, CALL)), tools=[TOOL], parallel_tool_calls=False)
    assert len(one.json["choices"][0]["message"]["tool_calls"]) == 1


def test_c16_words_beside_calls_are_content_and_a_cut_call_ends_with_length() -> None:
    told = chat(ScriptedBackend(saying("I will add. ", CALL)), tools=[TOOL])
    assert told.json["choices"][0]["message"]["content"] == "I will add."
    told = chat(ScriptedBackend(saying(CALL[:40], reason="length")), tools=[TOOL])
    assert told.json["choices"][0]["finish_reason"] == "length"


def test_c16_marks_that_are_special_tokens_are_seen() -> None:
    tokens = [
        {"id": 9, "text": "[TOOL_CALLS]", "special": True},
        {"id": 3, "text": 'add{"a": 1}', "special": False},
        {"id": 2, "text": "</s>", "special": True},
    ]
    backend = ScriptedBackend(lambda call: [Piece('add{"a": 1}', tokens), ending()])
    told = chat(backend, tools=[TOOL])
    assert backend.call.return_tokens
    (call,) = told.json["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_c17_tool_prompt_replaces_ours_and_guideline_goes_to_the_template() -> None:
    backend = ScriptedBackend(template_variables=("messages",))
    chat(backend, tools=[TOOL], tool_prompt="Use them well.", guideline="Be kind.")
    assert backend.call.messages is not None
    assert str(backend.call.messages[-1]["content"]).endswith("</tools>\nUse them well.")
    assert backend.call.sampling["guideline"] == "Be kind."


def test_c18_tools_go_to_a_template_that_knows_them_else_to_the_last_message() -> None:
    backend = ScriptedBackend(template_variables=("messages", "tools"))
    chat(backend, tools=[TOOL])
    assert backend.call.sampling["tools"] == [TOOL]
    assert backend.call.messages == USER

    backend = ScriptedBackend(template_variables=("messages",))
    chat(backend, messages=[{"role": "system", "content": "S"}, *USER], tools=[TOOL])
    assert "tools" not in backend.call.sampling
    assert backend.call.messages is not None
    system, user = backend.call.messages
    assert system == {"role": "system", "content": "S"}
    assert str(user["content"]).startswith("Hi\n")
    assert json.dumps(TOOL["function"]) in str(user["content"])
    assert "<tool_call>" in str(user["content"])


def test_c18_calls_and_results_are_written_out_where_the_template_knows_none() -> None:
    backend = ScriptedBackend(template_variables=("messages",))
    called = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    results = [{"role": "tool", "tool_call_id": "1", "content": value} for value in ("2", "3")]
    chat(backend, messages=[*USER, {"role": "assistant", "tool_calls": [called]}, *results])
    assert backend.call.messages == [
        *USER,
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
        },
        {
            "role": "user",
            "content": "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>",
        },
    ]


def test_c18_the_model_reads_the_tools(client: openai.OpenAI) -> None:
    without = answer(client).usage.prompt_tokens
    assert answer(client, tools=[TOOL]).usage.prompt_tokens > without + 50


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
        from fakes_openai import ask

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


def test_c30_an_answer_has_its_own_id_the_time_and_the_model_asked_for(
    client: openai.OpenAI, tiny_model: str, adapter: str
) -> None:
    first, second = answer(client, model=adapter), answer(client, model="")
    assert first.id.startswith("chatcmpl-")
    assert first.id != second.id
    assert first.object == "chat.completion"
    assert abs(first.created - int(__import__("time").time())) < 60
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


def test_c33_calls_are_streamed_as_deltas() -> None:
    pieces = [
        "Sure.",
        "\n<tool_",
        'call>{"name": "add", "argu',
        'ments": {"a"',
        ": 1}}",
        "</tool_call>",
        CALL,
    ]
    told = chat(ScriptedBackend(saying(*pieces)), stream=True, tools=[TOOL])
    deltas = [event["choices"][0]["delta"] for event in told.events]
    assert [delta["content"] for delta in deltas if delta.get("content")] == ["Sure."]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    starts = [call for call in calls if "id" in call]
    assert [(call["index"], call["type"], call["function"]["name"]) for call in starts] == [
        (0, "function", "add"),
        (1, "function", "add"),
    ]
    assert starts[0]["id"] != starts[1]["id"]
    arguments = ["", ""]
    for call in calls:
        arguments[call["index"]] += call["function"]["arguments"]
    assert arguments == ['{"a": 1}', '{"a": 1}']
    assert [call["function"]["arguments"] for call in calls if call["index"] == 0] == ["", '{"a"', ": 1}"]
    assert told.events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_base_model_is_asked_for_even_if_the_server_has_a_default_adapter() -> None:
    for model, sent in ((BASE, "__base_model__"), ("", None), (f"{BASE}:x/y", "x/y"), ("x/y@rev", "x/y@rev")):
        backend = ScriptedBackend()
        chat(backend, model=model)
        assert backend.call.adapter_id == sent
