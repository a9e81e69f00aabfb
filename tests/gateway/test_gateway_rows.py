"""Rows of LoRAX's list of errors (E), events (X) and inputs (G28) that callers of the REST routes can tell apart."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes_gateway import FakeTriton, StartGateway
from gateway_calls import GatewayCaller, HttpAnswer

from lorax_backend import errors as engine_errors
from lorax_triton.errors import ServerConnectionError

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
MESSAGES = [{"role": "user", "content": "hello"}]
RAISING = "{{ raise_exception('roles must alternate') }}"
GUIDED = "{{ guideline }}: {{ messages[0]['content'] }}"


def error_of(answer: HttpAnswer) -> tuple[int, str]:
    """Status and kind of an ErrorResponse, which has these two fields and no others."""
    assert set(answer.json) == {"error", "error_type"}
    assert answer.json["error"]
    return answer.status, answer.json["error_type"]


def openai_error_of(answer: HttpAnswer) -> tuple[int, str | None]:
    """Status and code of an error object of OpenAI's API."""
    assert set(answer.json) == {"error"}
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert answer.json["error"]["message"]
    return answer.status, answer.json["error"]["code"]


@pytest.fixture(scope="module")
def adapter_with(gateway_model: Path, tiny_adapter: Callable[..., Path]) -> Callable[[str], str]:
    """`adapter_with(template)` -> folder of an adapter that brings this chat template along."""

    def make(template: str) -> str:
        folder = tiny_adapter(gateway_model, rank=4, seed=7)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        return str(folder)

    return make


@pytest.mark.triton
def test_g28_image_markdown_stays_text_and_no_address_in_it_is_ever_asked(gateway: GatewayCaller) -> None:
    """The models served have no eyes: what LoRAX would fetch for a vision model is read as the text it is."""
    with socket.create_server(("127.0.0.1", 0)) as bystander:
        port = bystander.getsockname()[1]
        prompt = f"![](http://127.0.0.1:{port}/cat.png) and ![](data:image/png;base64,AAAA) show"
        tokens = gateway.post("/tokenize", {"inputs": prompt}).json
        answer = gateway.generate(prompt, max_new_tokens=2, details=True, return_full_text=True)
        assert answer.status == 200
        assert answer.json["generated_text"].startswith(prompt)
        assert answer.json["details"]["prompt_tokens"] == len(tokens)
        bystander.setblocking(False)
        with pytest.raises(BlockingIOError):
            bystander.accept()


@pytest.mark.triton
@pytest.mark.parametrize(
    ("change", "status", "kind", "word"),
    [
        ({"rank": 128}, 422, "adapter_too_large", "128"),
        ({"use_dora": True}, 422, "adapter_incompatible", "dora"),
        ({"peft_type": "PREFIX_TUNING"}, 422, "adapter_incompatible", "PREFIX_TUNING"),
    ],
)
def test_e03_an_adapter_that_does_not_fit_has_a_kind_of_its_own_and_the_reason(
    gateway: GatewayCaller,
    gateway_model: Path,
    tiny_adapter: Callable[..., Path],
    change: dict[str, Any],
    status: int,
    kind: str,
    word: str,
) -> None:
    folder = tiny_adapter(gateway_model, **({"rank": 4} | change))
    answer = gateway.generate("hello", adapter_id=str(folder))
    assert error_of(answer) == (status, kind)
    assert word.lower() in answer.json["error"].lower()
    (event,) = gateway.generate("hello", "/generate_stream", adapter_id=str(folder)).events
    assert event == answer.json


def test_e03_private_and_unreachable_adapters_are_told_apart(start: StartGateway) -> None:
    server = FakeTriton()
    gateway = start(server)
    for error, shown in (
        (engine_errors.AdapterUnauthorizedError("org/a: the token may not read it"), (403, "adapter_unauthorized")),
        (engine_errors.AdapterDownloadError("org/a: no route to the hub"), (503, "adapter_download_failed")),
    ):  # fmt: skip
        server.refusal = error.to_json()
        answer = gateway.generate("x", adapter_id="org/a")
        assert error_of(answer) == shown
        assert answer.json["error"] == error.message


@pytest.mark.triton
def test_e05_a_chat_template_that_raises_is_a_template_error_with_its_words(
    gateway: GatewayCaller, adapter_with: Callable[[str], str]
) -> None:
    adapter = adapter_with(RAISING)
    answer = gateway.generate("hello", apply_chat_template=True, adapter_id=adapter)
    assert error_of(answer) == (422, "template_error")
    assert "roles must alternate" in answer.json["error"]
    (event,) = gateway.generate(
        "hello", "/generate_stream", apply_chat_template=True, adapter_id=adapter
    ).events
    assert event == answer.json
    chat = gateway.post("/v1/chat/completions", {"model": adapter, "messages": MESSAGES})
    assert openai_error_of(chat) == (400, "template_error")
    assert gateway.generate("hello", max_new_tokens=1, adapter_id=adapter).status == 200


@pytest.mark.triton
def test_e06_a_template_without_its_guideline_is_an_error_of_its_own_kind(
    gateway: GatewayCaller, adapter_with: Callable[[str], str]
) -> None:
    adapter = adapter_with(GUIDED)
    answer = gateway.generate("hello", apply_chat_template=True, adapter_id=adapter)
    assert error_of(answer) == (422, "missing_template_variable")
    assert "guideline" in answer.json["error"]
    chat = {"model": adapter, "messages": MESSAGES, "max_tokens": 1}
    refused = gateway.post("/v1/chat/completions", chat)
    assert openai_error_of(refused) == (400, "missing_template_variable")
    assert gateway.post("/v1/chat/completions", chat | {"guideline": "Be kind"}).status == 200


@pytest.mark.triton
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL], "tool_choice": "subtract"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ],
)
def test_e07_tools_that_cannot_be_used_are_refused_by_the_field_at_fault(
    gateway: GatewayCaller, fields: dict[str, Any], param: str
) -> None:
    """Only OpenAI's routes take tools, so what LoRAX words natively has OpenAI's form here."""
    answer = gateway.post("/v1/chat/completions", {"model": "", "messages": MESSAGES, **fields})
    assert openai_error_of(answer)[0] == 400
    assert answer.json["error"]["param"].startswith(param)


def test_e07_a_tool_error_of_the_server_keeps_its_kind_on_both_kinds_of_route(start: StartGateway) -> None:
    server = FakeTriton()
    server.refusal = engine_errors.ToolError("no tool of the name subtract").to_json()
    gateway = start(server)
    assert error_of(gateway.generate("x")) == (422, "tool_error")
    chat = gateway.post("/v1/chat/completions", {"model": "base", "messages": MESSAGES, "tools": [TOOL]})
    assert openai_error_of(chat) == (400, "tool_error")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"inputs": "hello"}),
        ("/classify", {"inputs": "hello"}),
        ("/classify_batch", {"inputs": ["hello"]}),
    ],
)
def test_e08_an_embedding_or_a_classification_is_refused_before_it_can_fail(
    start: StartGateway, path: str, body: dict[str, Any]
) -> None:
    """No model served makes either: callers are told so, a fault of theirs (422) and not of the server (500)."""
    server = FakeTriton()
    answer = start(server).post(path, body)
    assert error_of(answer) == (422, "unsupported")
    assert "not served by this model" in answer.json["error"]
    assert server.generations == []


@pytest.mark.parametrize("kind", ["EmbeddingFailureError", "ClassificationFailureError"])
def test_e08_a_server_that_fails_at_one_is_a_500_of_its_kind(start: StartGateway, kind: str) -> None:
    server = FakeTriton()
    error = getattr(engine_errors, kind)("nothing came of it")
    server.refusal = error.to_json()
    answer = start(server).generate("x")
    assert error_of(answer) == (500, error.error_type)
    assert error.error_type in ("embedding_failure", "classification_failure")


def test_e10_a_tokenizer_that_cannot_place_its_tokens_makes_tokenize_a_404(start: StartGateway) -> None:
    """Servers convert every tokenizer to one that can, or do not start; the kind is kept for those that do."""
    server = FakeTriton()
    server.control_refusal = engine_errors.NoFastTokenizerError("No fast tokenizer").to_json()
    answer = start(server).post("/tokenize", {"inputs": "hello"})
    assert error_of(answer) == (404, "no fast tokenizer")


@pytest.mark.parametrize("given", ["hello", ["hello", "there"], [1, 2], {"text": "hello"}, 3, None])
def test_e11_whatever_the_input_of_an_embedding_the_answer_is_a_400_in_openais_words(
    start: StartGateway, given: object
) -> None:
    """LoRAX has `invalid_input` for inputs of no known form; without an embedding model no form is known."""
    server = FakeTriton()
    gateway = start(server)
    answer = gateway.post("/v1/embeddings", {"model": "base", "input": given})
    assert openai_error_of(answer)[0] == 400
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert server.generations == []
    server.refusal = engine_errors.InvalidInputError("no form that is known").to_json()
    assert error_of(gateway.generate("x")) == (400, "invalid_input")


@pytest.mark.triton
def test_e12_every_refusal_has_the_two_fields_and_no_others(gateway: GatewayCaller) -> None:
    refusals = {
        400: gateway.post("/generate", b"{"),
        404: gateway.generate("x", adapter_id="/no/such/adapter"),
        405: gateway.get("/generate"),
        413: gateway.post("/generate", {"inputs": "a" * (3 << 20)}),
        415: gateway.call("POST", "/generate", b"{}", {"content-type": "text/plain"}),
        422: gateway.generate("x", top_p=2.0),
    }
    for status, answer in refusals.items():
        assert error_of(answer)[0] == status
        assert answer.headers["content-type"] == "application/json"
        assert isinstance(answer.json["error"], str)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("path", "prompt"),
    [("/v1/completions", {"prompt": "hello"}), ("/v1/chat/completions", {"messages": MESSAGES})],
)
def test_x04_openais_streams_end_with_done_after_their_last_event(
    gateway: GatewayCaller, path: str, prompt: dict[str, Any]
) -> None:
    body = {"model": "", "max_tokens": 3, "stream": True, **prompt}
    answer = gateway.post(path, body)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, end = answer.body.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize(
    ("path", "prompt"),
    [("/v1/completions", {"prompt": "hello"}), ("/v1/chat/completions", {"messages": MESSAGES})],
)
def test_x04_x05_openais_streams_that_fail_tell_it_in_openais_words_and_end_all_the_same(
    start: StartGateway, path: str, prompt: dict[str, Any]
) -> None:
    """LoRAX sends its native error and no end mark; here both are OpenAI's, so a reader who waits for one ends."""
    server = FakeTriton()
    server.after_first = ServerConnectionError("the connection broke")
    answer = start(server).post(path, {"model": "base", "stream": True, **prompt})
    assert answer.status == 200  # it had begun
    *_, last, done, end = answer.body.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"
    assert answer.body.count(b"[DONE]") == 1
