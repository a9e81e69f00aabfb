"""What an operator sets up and changes on a real tritonserver: default and preloaded adapters, aliases, keys."""

from __future__ import annotations

import json
import shutil

import pytest

pytestmark = pytest.mark.triton

PROMPT = "hello world this is"
EXACT = {"ignore_eos_token": True}
CHAT = json.dumps([{"role": "user", "content": "hello"}])


def test_default_preloaded_and_aliased_adapters_serve_who_names_them(start_tiny, tiny_adapters, tmp_path):
    default, pinned, third = tiny_adapters
    templated = tmp_path / "templated"
    shutil.copytree(third, templated)
    (templated / "chat_template.jinja").write_text("{{ messages[0].content }} " * 9)
    _, caller = start_tiny(
        adapter_id=default,
        preloaded_adapter_ids=pinned,
        admin_api_key="sesame",
        adapter_aliases=json.dumps({"mine": pinned}),
        engine_process="true",
    )

    def text(**fields):
        answer = caller.generate({"text_input": PROMPT, "max_tokens": 12, **fields}, parameters=EXACT)
        assert answer.error is None, answer.error
        return answer.text

    texts = [text(adapter_id=name) for name in (*tiny_adapters, "__base_model__")]
    assert len(set(texts)) == 4
    assert text() == texts[0]
    assert text(adapter_id="mine") == texts[1]
    known = {entry["id"]: entry for entry in caller.control("adapters")["adapters"]}
    assert known[default]["pinned"]
    assert known[pinned]["pinned"]
    assert not known[third]["pinned"]

    caller.control("alias_set", admin_key="sesame", alias="mine", adapter_id=third)
    assert text(adapter_id="mine") == texts[2]
    details = caller.generate(
        {"text_input": PROMPT, "adapter_id": "mine", "max_tokens": 1, "return_details": True}
    )
    assert details.details["adapter_id"] == third

    def prompt_length(adapter):
        asked = {"messages": CHAT, "adapter_id": adapter, "max_tokens": 1, "return_details": True}
        return caller.generate(asked).details["prompt_tokens"]

    assert prompt_length(str(templated)) != prompt_length(third) == prompt_length(pinned)
