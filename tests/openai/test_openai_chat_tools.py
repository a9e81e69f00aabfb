"""LoRAX's rows of `/v1/chat/completions` for tools: which the model is told of, and how its calls come back."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from fakes_openai import USER, ScriptedBackend, chat, ending, saying
from openai_chats import answer, sampling

from lorax_triton.openai_api import Piece

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
OTHER_TOOL = {"type": "function", "function": {"name": "get_weather"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


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
