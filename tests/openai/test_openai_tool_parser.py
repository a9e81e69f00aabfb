from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_triton.openai_api.tool_parser import Arguments, CallStart, Content, ToolCallParser

NAMES = ("get_weather", "add")

HERMES = (
    'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa}r\\"is"}}\n</tool_call>\n'
    '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
)
MISTRAL_LIST = (
    '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, '
    '{"name": "get_weather", "arguments": {"c": [1, 2]}}]'
)
MISTRAL_NAMED = (
    '[TOOL_CALLS]add[ARGS]{"a": {"b": 1}}[TOOL_CALLS] get_weather[CALL_ID]x1[ARGS]{"city": "Rome"}'
)
LLAMA = '{"name": "add", "parameters": {"a": 1}}'
LLAMA_SEVERAL = (
    '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}'
)
PYTHON = '[get_weather(city="Paris, (\\"old\\")", days=[1, -2], near={"a": None}), add(a=1, exact=True)]'
LLAMA_4 = "I look.\n<|python_start|>[get_weather(city='Rome')]<|python_end|>"

TEXTS = [
    "Just words, with a < b and [brackets].",
    HERMES,
    MISTRAL_LIST,
    MISTRAL_NAMED,
    LLAMA,
    LLAMA_SEVERAL,
    '[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}]',
    '{"name": "Bob", "age": 3} is a person',
    "<tool_call>no JSON</tool_call>",
    "[TOOL_CALLS] and nothing",
    "[TOOL",
    '{"name": "add", "parameters": {"a": 1',
    "[1, 2]",
    PYTHON,
    LLAMA_4,
    "<|python_tag|>add.call(a=1)",
    "[add(a=1), add(b=x)]",
    "[add(1, 2)] is how to add",
    "[add",
    "[add(a=1",
    "[add(a=1)] and more",
]


def parse(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls, names with arguments."""
    parser = ToolCallParser(NAMES)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    content = "".join(delta.text for delta in deltas if isinstance(delta, Content))
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if isinstance(delta, CallStart):
            assert delta.index == len(calls)
            calls.append((delta.name, ""))
        elif isinstance(delta, Arguments):
            assert delta.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    return content, calls


def calls_in(text: str) -> list[tuple[str, object]]:
    content, calls = parse([text])
    assert content == ""
    return [(name, json.loads(arguments)) for name, arguments in calls]


def test_blocks_of_qwen_and_hermes_are_calls_and_what_is_before_them_is_content() -> None:
    content, calls = parse([HERMES])
    assert content == "Let me see."
    assert calls == [("get_weather", '{"city": "Pa}r\\"is"}'), ("add", "{}")]


def test_a_list_after_mistrals_mark_is_calls() -> None:
    assert calls_in(MISTRAL_LIST) == [("add", {"a": 1}), ("get_weather", {"c": [1, 2]})]


def test_names_after_mistrals_newer_marks_are_calls() -> None:
    assert calls_in(MISTRAL_NAMED) == [("add", {"a": {"b": 1}}), ("get_weather", {"city": "Rome"})]


def test_a_bare_object_of_llama_is_a_call_of_a_known_tool_only() -> None:
    assert calls_in(LLAMA) == [("add", {"a": 1})]
    assert parse(['{"name": "subtract", "parameters": {}}']) == ('{"name": "subtract", "parameters": {}}', [])


def test_several_objects_after_llamas_mark_are_several_calls() -> None:
    assert calls_in(LLAMA_SEVERAL) == [("add", {"a": 1}), ("add", {"a": 2})]


def test_arguments_written_as_a_string_or_before_the_name_are_understood() -> None:
    assert calls_in('<tool_call>{"arguments": "{\\"a\\": 1}", "name": "add"}</tool_call>') == [
        ("add", {"a": 1})
    ]
    assert calls_in('{"parameters": {"a": 1}, "type": "function", "name": "add"}') == [("add", {"a": 1})]


def test_a_call_without_arguments_has_empty_ones() -> None:
    assert calls_in('<tool_call>{"name": "add"}</tool_call>') == [("add", {})]


def test_python_of_llama_is_calls_of_known_tools() -> None:
    assert calls_in(PYTHON) == [
        ("get_weather", {"city": 'Paris, ("old")', "days": [1, -2], "near": {"a": None}}),
        ("add", {"a": 1, "exact": True}),
    ]
    assert parse([LLAMA_4]) == ("I look.", [("get_weather", '{"city": "Rome"}')])
    for text in (
        "<|python_tag|>add.call(a=1)",
        "<|python_tag|>[add(a=1)]",
        " [ add ( a = 1 ) ] \n",
        "[add(a=1)",
    ):
        assert calls_in(text) == [("add", {"a": 1})]
    assert calls_in("[add()]") == [("add", {})]
    parser = ToolCallParser(["get-weather.now"])
    assert parser.feed("[get-weather.now(a=1)]") == [
        CallStart(0, "get-weather.now"),
        Arguments(0, '{"a": 1}'),
    ]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("true", True), ("null", None), ("(1, 2)", [1, 2]), ("'a' 'b'", "ab"), ("-1.5e3", -1500.0),
        (r"'it\'s \d+ \\ \u00e9 \t'", "it's \\d+ \\ é \t"), ("'two\nlines'", "two\nlines"), ("'{[('", "{[("),
        ("{'a': {'b': [{}]}}", {"a": {"b": [{}]}}), ("'ü€😀'", "ü€😀"), ("0", 0),
    ],
)  # fmt: skip
def test_pythons_literals_become_json(written: str, value: object) -> None:
    assert calls_in(f"[add(a={written})]") == [("add", {"a": value})]


@pytest.mark.parametrize(
    "argument",
    [
        "1", "a=b", "a=f(1)", "a=1+1", "a=__import__('os')", "*x", "**{'a': 1}", "a=1, a=2", "a=1e999", "a=1j",
        "a=b'x'", "a={1: 2}", "a={1}", "a=[x for x in y]", "a=lambda: 1", "a=...", "a=f'{x}'", "a=-'x'", "a=(b:=1)",
        "a=" + "[" * 5000 + "]" * 5000, "a=" + "9" * 5000, "a='\0", "a=1)(b=2", "a 1",
    ],
)  # fmt: skip
def test_python_that_is_no_literal_is_text_and_never_run(argument: str) -> None:
    text = f"[add({argument})]"
    if argument == "a=1)(b=2":
        assert parse([text]) == ("(b=2)]", [("add", '{"a": 1}')])
    else:
        assert parse([text]) == (text, [])


def test_python_calls_are_told_one_by_one_and_other_brackets_at_once() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.feed("[add(a=") == []
    assert parser.feed("1), get") == [CallStart(0, "add"), Arguments(0, '{"a": 1}')]
    assert parser.feed("_weather()") == [CallStart(1, "get_weather"), Arguments(1, "{}")]
    assert parser.feed("] So.") + parser.finish() == [Content("So.")]
    assert ToolCallParser(NAMES).feed("[citation") == [Content("[citation")]
    assert ToolCallParser(NAMES).feed("[adding(") == [Content("[adding(")]


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        "[add] up",
        "[subtract(a=1)]",
        "add(a=1)",
        "<|python_start|>",
        '{"a": 1}',
        "[1, 2, 3]",
        "<tool_call>oops</tool_call>",
        "a <tool_ca",
        "<|python_tag|>print(1)",
        " \n",
    ],
)
def test_what_is_no_call_is_content_to_the_last_character(text: str) -> None:
    assert parse([text]) == (text, [])


def test_a_call_cut_off_by_the_token_limit_keeps_what_there_is() -> None:
    assert parse(['<tool_call>{"name": "add", "arguments": {"a": 1']) == ("", [("add", '{"a": 1')])


def test_arguments_are_told_as_they_come() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.feed('<tool_call>{"name": "add",') == [CallStart(0, "add")]
    assert parser.feed(' "arguments": {"a"') == [Arguments(0, '{"a"')]
    assert parser.feed(": 1}") == [Arguments(0, ": 1}")]
    assert parser.feed("}</tool_call>") == []
    assert parser.finish() == []


def test_words_are_told_at_once_but_for_what_may_begin_a_mark() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.feed("Well") == [Content("Well")]
    assert parser.feed(", <tool") == [Content(",")]
    assert parser.feed("box>") == [Content(" <toolbox>")]


@pytest.mark.parametrize("text", TEXTS)
@given(data=st.data())
def test_however_the_text_is_cut_the_calls_are_the_same(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(pieces) == parse([text]) == parse(list(text))


@given(st.text(alphabet='<>[]{}()=",:|/ _abdtTOLCAS', max_size=40))
def test_no_text_is_lost_or_breaks_the_parser(text: str) -> None:
    content, calls = parse(list(text))
    if not calls:
        assert content == text
