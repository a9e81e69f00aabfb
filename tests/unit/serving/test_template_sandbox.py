"""Strangers' chat templates: what they may cost, what they say, and that nobody else waits for them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes_serving import WAIT_S, FakeEngine, RecordingChannel

from lorax_backend.adapters.sources.local import LocalSource
from lorax_backend.config import ServerConfig
from lorax_backend.errors import MissingTemplateVariableError, ShuttingDownError, TemplateError
from lorax_backend.serving.adapter_templates import AdapterTemplates
from lorax_backend.serving.chat import ChatTemplate
from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.lanes import Lanes
from lorax_backend.serving.service import GenerationService
from lorax_backend.serving.template_sandbox import TemplateSandbox
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import AdapterRef

USER = [{"role": "user", "content": "hi"}]
NESTED = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set n = namespace(t=messages[0].content) %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}"
OWNER = "adapter 'org/mine's"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[TemplateSandbox]:
    box = TemplateSandbox(cpu_seconds=0.3, memory_bytes=512 << 20)
    yield box
    box.close()


def adapter_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    for needed in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / needed).write_text("{}")
    return folder


def render(sandbox: TemplateSandbox, source: str, **options: Any) -> str:
    return sandbox.open(source, {"bos_token": "<s>"}, OWNER).render(USER, **options)


def test_a_template_renders_as_it_would_here(sandbox: TemplateSandbox) -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.last %}[{{ m.role | upper }}]{% endif %}{{ m.content }}"
        "{% endfor %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ '\\u00e9' }}"
    )
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"ü": "<&>"}}}]
    here = ChatTemplate(source, {"bos_token": "<s>"})
    there = sandbox.open(source, {"bos_token": "<s>"}, OWNER)
    assert there.variables == here.variables
    for given in (None, tools):
        assert there.render(USER, given) == here.render(USER, given)


@pytest.mark.parametrize("source", [NESTED, "{{ 'a' | center(2000) | replace('a', 'b' * 9) }}" + NESTED])
def test_nested_loops_are_ended_and_the_error_names_the_adapter_and_the_remedy(
    sandbox: TemplateSandbox, source: str
) -> None:
    with pytest.raises(TemplateError, match=r"adapter 'org/mine's .*processor time.*chat_template\.jinja"):
        render(sandbox, source)
    assert render(sandbox, "{{ messages[0].content }}") == "hi", "another process has taken its place"


@pytest.mark.parametrize(
    "source",
    [
        DOUBLING,
        "{{ messages[0].content | center(99999999999) }}",
        "{{ ('%' ~ '099999999999d') | format(1) }}",
        "{% set a = messages[0].content | center(1000000) %}{{ a | replace(' ', a) }}",
        "{{ 'literal' | center(99999999999) }}",
    ],
)
def test_a_text_that_would_fill_the_memory_is_an_error_while_rendering_and_while_compiling(
    sandbox: TemplateSandbox, source: str
) -> None:
    with pytest.raises(TemplateError, match="org/mine"):
        render(sandbox, source)


def test_a_template_may_not_write_much_more_than_it_is_given(sandbox: TemplateSandbox) -> None:
    with pytest.raises(TemplateError, match=r"wrote 3000000 characters, at most \d+ are allowed"):
        render(sandbox, "{{ messages[0].content | center(3000000) }}")
    long = [{"role": "user", "content": "x" * 3_000_000}]
    template = sandbox.open("{{ messages[0].content }}", {}, OWNER)
    assert template.render(long) == long[0]["content"]


def test_errors_keep_their_kinds_and_their_words(sandbox: TemplateSandbox) -> None:
    with pytest.raises(TemplateError, match=r"org/mine's chat template refused them: no tools here"):
        render(sandbox, "{{ raise_exception('no tools here') }}")
    with pytest.raises(MissingTemplateVariableError, match="guideline"):
        render(sandbox, "{{ guideline }}")
    with pytest.raises(TemplateError, match="org/mine's chat template is not valid"):
        render(sandbox, "{% for %}")
    with pytest.raises(TemplateError) as refusal:
        render(sandbox, "{{ raise_exception(messages[0].content | center(100000)) }}")
    assert len(str(refusal.value)) < 3000
    with pytest.raises(TemplateError):
        render(sandbox, "(" * 10 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")


def test_a_template_sees_nothing_of_the_servers_environment(
    sandbox: TemplateSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    fresh = TemplateSandbox()
    assert fresh.open("{{ messages[0].content }}", {}, OWNER).render(USER) == "hi"
    (worker,) = fresh._idle
    environment = Path(f"/proc/{worker.pid}/environ").read_bytes()
    fresh.close()
    assert b"secret" not in environment
    assert worker.returncode is not None
    with pytest.raises(ShuttingDownError):
        fresh.open("{{ messages }}", {}, OWNER)


def test_a_process_that_died_while_idle_is_replaced(sandbox: TemplateSandbox) -> None:
    assert render(sandbox, "{{ bos_token }}") == "<s>"
    for worker in sandbox._idle:
        os.kill(worker.pid, 9)
        worker.wait()
    assert render(sandbox, "{{ bos_token }}") == "<s>"


def test_files_too_large_for_a_template_are_refused_unread(tmp_path: Path, sandbox: TemplateSandbox) -> None:
    for name, content in (
        ("chat_template.jinja", b"x" * (1 << 20) + b"x"),
        ("tokenizer_config.json", b"[" * 100_000),
    ):
        folder = adapter_folder(tmp_path, f"with-{name}")
        (folder / name).write_bytes(content)
        templates = AdapterTemplates(lambda: {"local": LocalSource()}, {}, sandbox)
        with pytest.raises(TemplateError, match="adapter_id"):
            templates.get(AdapterRef("local", str(folder)), None)


def test_lanes_run_one_piece_of_a_key_at_a_time_and_others_meanwhile() -> None:
    lanes = Lanes(2, "test-lanes")
    gate, done = threading.Event(), threading.Event()
    order: list[str] = []

    def slow() -> None:
        assert gate.wait(WAIT_S)
        order.append("slow")

    for _ in range(5):
        lanes.submit("greedy", slow)
    lanes.submit("other", lambda: order.append("other"))
    lanes.submit("other", done.set)
    assert done.wait(WAIT_S), "the greedy key takes one of the two threads"
    assert order == ["other"]
    last = threading.Event()
    lanes.submit("greedy", last.set)
    gate.set()
    assert last.wait(WAIT_S)
    assert order == ["other", *["slow"] * 5]
    lanes.stop()
    with pytest.raises(RuntimeError):
        lanes.submit("late", done.set)


def test_while_one_adapters_template_burns_all_other_requests_go_on(
    tmp_path: Path, byte_level: TokenizerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So long that it is still burning when the others are done, however slow this machine is.
    patient = partial(TemplateSandbox, cpu_seconds=600.0)
    monkeypatch.setattr("lorax_backend.serving.adapter_templates.TemplateSandbox", patient)
    for name, template in (("burning", NESTED), ("good", "own:{{ messages[0].content }}")):
        folder = adapter_folder(tmp_path, name)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    engine = FakeEngine()
    config = ServerConfig(default_adapter_source="local", validation_workers=1)
    service = GenerationService(engine, byte_level, config, lambda: {"local": LocalSource()})
    service.start()
    burning = [RecordingChannel() for _ in range(8)]
    try:
        chat = {"messages": json.dumps(USER)}
        for channel in burning:
            service.submit(RawRequest("", chat | {"adapter_id": str(tmp_path / "burning")}), channel)
        for adapter in ({}, {"adapter_id": str(tmp_path / "good")}):
            service.submit(RawRequest("", chat | adapter), RecordingChannel())
        service.submit(RawRequest("", {"text_input": "plain"}), RecordingChannel())
        prompts = {byte_level.decode(request.prompt_ids) for request in engine.wait_submitted(3)}
        assert {"own:hi", "plain"} <= prompts
        assert service.num_live == len(burning) + 3
    finally:
        service.stop(0.1)
    assert {channel.error["error_type"] for channel in burning} == {"shutting_down"}
