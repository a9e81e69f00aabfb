"""The chat template environment, and messages it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorax_backend.errors import TemplateError, ValidationError
from lorax_backend.serving.chat import ChatTemplate, validate_messages
from lorax_backend.serving.tokenizer import TokenizerPool

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Any = None, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages or USER, **options)


def test_the_built_in_model_renders_the_prompts_of_the_reference(
    smollm2_path: Path, reference: dict[str, Any]
) -> None:
    tokenizer = TokenizerPool(smollm2_path)
    for prompt in reference["prompts"]:
        text = tokenizer.render_chat([{"role": "user", "content": prompt["user"]}])
        assert text == reference["template"].replace("{user}", prompt["user"])
        assert tokenizer.encode(text, add_special_tokens=False) == prompt["ids"]


def test_templates_see_messages_tools_special_tokens_and_the_generation_prompt() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }};{% endfor %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}A:{% endif %}"
    )
    assert render(source) == "<s>user:hi;A:"
    assert render(source, tools=[{"name": "<f>"}]) == '<s>user:hi;[{"name": "<f>"}]A:'


def test_c18_a_template_that_knows_no_tools_gets_them_written_out_in_the_last_message() -> None:
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    text = ChatTemplate(source, {}).render(messages, tools=tools)
    assert text.startswith("system:be brief;user:hi\n\n<tools>\n")
    assert '{"name": "look_up", "parameters": {}}' in text
    assert "<tool_call>" in text
    assert messages[1]["content"] == "hi", "the caller's messages stay as they were"
    assert ChatTemplate(source, {}).render(messages) == "system:be brief;user:hi;"


def test_blocks_are_trimmed_loops_can_break_and_generation_blocks_stand() -> None:
    source = """{% for i in range(5) %}
    {% if i == 2 %}{% break %}{% endif %}
{{ i }}
{% endfor %}
{% generation %}text{% endgeneration %}"""
    assert render(source) == "0\n1\ntext"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 300000000 }}",
        "{{ 2000000 * messages }}",
        "{{ 9 ** 99999999 }}",
        "{% set n = 10 ** 9 %}{{ ' ' * n }}",
    ],
)
def test_a_template_that_would_fill_the_memory_is_refused_before_it_does(source: str) -> None:
    with pytest.raises(TemplateError, match="at most"):
        render(source)
    assert render("{{ ' ' * 4 }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ (-1) * 5 }}") == "    102412-5"


def test_e05_a_template_that_raises_is_a_template_error_with_its_words() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateError, match="no element 5"):
        render("{{ messages[5].content + 1 }}")
    with pytest.raises(TemplateError, match="failed: ZeroDivisionError"):
        render("{{ 1 / 0 }}")


def test_a_template_cannot_reach_python() -> None:
    with pytest.raises(TemplateError):
        render("{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}")
    with pytest.raises(TemplateError):
        render("{{ messages.append(1) }}")


def test_a_broken_template_is_reported_when_it_is_loaded() -> None:
    with pytest.raises(TemplateError, match="not valid"):
        ChatTemplate("{% for %}", {})


def test_the_template_file_wins_over_the_config_and_a_list_has_a_default(
    tiny_model_path: Callable[..., Path], tmp_path: Path
) -> None:
    config = {"chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]}
    template = ChatTemplate.from_folder(tmp_path, config, {})
    assert template is not None
    assert template.source == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    template = ChatTemplate.from_folder(tmp_path, config, {})
    assert template is not None
    assert template.source == "F"


def test_a_model_without_template_says_so(tiny_model_path: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model_path()
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with pytest.raises(TemplateError, match="no chat template"):
        TokenizerPool(tmp_path).render_chat(USER)


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([5], "messages[0]"),
        ([{"role": "user", "content": "a"}, {"role": 3, "content": "b"}], "messages[1].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ],
)
def test_a_bad_message_is_refused_by_its_place(messages: Any, place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        validate_messages(messages)
    assert caught.value.message.startswith(f"{place}:")


def test_a_tool_call_needs_no_content_and_other_keys_are_kept() -> None:
    call = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "name": "x"}]
    assert validate_messages(json.loads(json.dumps(call))) == [{**call[0], "content": ""}]
