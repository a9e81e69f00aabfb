"""Every failure of the server as OpenAI's API words it, before a stream and within."""

from __future__ import annotations

import asyncio

import pytest
from fakes_openai import ScriptedBackend, ask_raw, chat, complete

from lorax_triton import errors
from lorax_triton.errors import LoraxError, parse_error
from lorax_triton.openai_api import Call, Piece, handle


def failing(error: LoraxError, after: str = "") -> ScriptedBackend:
    """A server that fails, after some text."""
    pieces: list[Piece | Exception] = [Piece(after)] if after else []
    return ScriptedBackend(lambda call: [*pieces, error])


def server_error(error_type: str, status: int, message: str = "It failed.") -> LoraxError:
    return parse_error(status, {"error": message, "error_type": error_type})


@pytest.mark.parametrize(
    ("error_type", "given", "status", "kind", "code"),
    [
        ("validation", 422, 400, "invalid_request_error", None),
        ("unsupported", 422, 400, "invalid_request_error", "unsupported_parameter"),
        ("template_error", 422, 400, "invalid_request_error", "template_error"),
        ("overloaded", 429, 429, "rate_limit_error", "rate_limit_exceeded"),
        ("adapter_not_found", 404, 404, "invalid_request_error", "model_not_found"),
        ("adapter_unauthorized", 403, 403, "invalid_request_error", "adapter_unauthorized"),
        ("adapter_incompatible", 422, 400, "invalid_request_error", "adapter_incompatible"),
        ("adapter_download_failed", 503, 503, "server_error", "adapter_download_failed"),
        ("engine_dead", 503, 503, "server_error", "engine_dead"),
        ("shutting_down", 503, 503, "server_error", "shutting_down"),
        ("generation", 424, 500, "server_error", "generation"),
        ("incomplete_generation", 500, 500, "server_error", "incomplete_generation"),
        ("missing_template_variable", 422, 400, "invalid_request_error", "missing_template_variable"),
    ],
)
def test_each_kind_of_failure_has_its_status(
    error_type: str, given: int, status: int, kind: str, code: str | None
) -> None:
    for told in (
        chat(failing(server_error(error_type, given))),
        chat(failing(server_error(error_type, given)), stream=True),
        complete(failing(server_error(error_type, given)), n=3),
    ):
        assert told.status == status
        assert told.error["type"] == kind
        assert told.error["code"] == code
        served = " (the served model is 'the/base'; other names are those of adapters)"
        assert told.error["message"] == "It failed." + (served if code == "model_not_found" else "")
        assert ("retry-after" in told.headers) == (status in (429, 503))


def test_the_field_at_fault_has_openais_name() -> None:
    for message, param in (
        ("top_k: must be at least -1", "top_k"),
        ("stop_words (in sampling_parameters): a stop string must not be empty", "stop"),
        ("text_input: the prompt has no tokens", "messages"),
        ("input_ids[3]: -1 is not a token of this model", "prompt[3]"),
        ("The server is confused: badly", None),
    ):
        told = chat(failing(server_error("validation", 422, message)))
        assert told.error["param"] == param
        assert "sampling_parameters" not in told.error["message"]
        assert param is None or told.error["message"].startswith(param)
    told = complete(failing(server_error("validation", 422, "text_input: the prompt has no tokens")))
    assert (told.error["param"], told.error["message"]) == ("prompt", "prompt: the prompt has no tokens")


def test_what_the_client_itself_cannot_send_is_the_callers_fault() -> None:
    told = complete(failing(errors.ValidationError("`text_input` cannot be sent as BYTES: a lone surrogate")))
    assert told.status == 400
    assert told.error["param"] == "prompt"


@pytest.mark.parametrize(
    "body", ["[" * 100_000, '{"model": "", "prompt": "x", "top_k": NaN}', '{"a": ' + "9" * 5000 + "}"]
)
def test_json_that_no_reader_takes_is_refused(body: str) -> None:
    told = ask_raw(ScriptedBackend(), "POST", "/v1/completions", body.encode())
    assert told.status == 400


def test_a_prompt_that_is_too_long_has_openais_code() -> None:
    message = "text_input: the prompt has 9 tokens, at most 8 are allowed (server option max_input_length)"
    assert chat(failing(server_error("validation", 422, message))).error["code"] == "context_length_exceeded"


def test_lost_connections_and_expired_waits_have_their_status() -> None:
    assert chat(failing(errors.ServerConnectionError("gone"))).status == 503
    assert chat(failing(errors.RequestTimeoutError("late"))).status == 504


@pytest.mark.parametrize("n", [1, 3])
def test_a_failure_within_a_stream_is_its_last_event(n: int) -> None:
    told = chat(failing(server_error("engine_dead", 503), after="Hello"), stream=True, n=n)
    assert told.status == 200
    assert told.events[1]["choices"][0]["delta"]["content"] == "Hello"
    assert told.events[-1]["error"] == {
        "message": "It failed.",
        "type": "server_error",
        "param": None,
        "code": "engine_dead",
    }
    assert told.done


def test_a_fault_of_this_program_tells_nothing_of_its_inside(caplog: pytest.LogCaptureFixture) -> None:
    broken = ScriptedBackend(lambda call: [ValueError("secret")])
    told = chat(broken)
    assert told.status == 500
    assert told.error["type"] == "server_error"
    assert "secret" not in told.error["message"]
    assert "secret" in caplog.text
    told = chat(ScriptedBackend(lambda call: [Piece("x"), ValueError("secret")]), stream=True)
    assert "secret" not in told.events[-1]["error"]["message"]


def test_the_first_failure_of_several_sequences_ends_the_others() -> None:
    def script(call: Call) -> list[Piece | Exception]:
        if call.request_id.endswith("-1"):
            return [server_error("overloaded", 429)]
        return [Piece("x")] * 1000

    told = chat(ScriptedBackend(script), n=3)  # `chat` checks that no call is left open
    assert told.status == 429


def test_a_stream_that_is_given_up_gives_up_its_calls() -> None:
    async def run(read: int) -> int:
        backend = ScriptedBackend(lambda call: [Piece("x")] * 1000)
        body = b'{"model": "", "stream": true, "n": 2, "messages": [{"role": "user", "content": "Hi"}]}'
        answer = await handle("POST", "/v1/chat/completions", {}, body, backend)
        assert not isinstance(answer.body, bytes)
        for _ in range(read):
            await anext(answer.body)
        assert backend.open == 2
        await answer.body.aclose()  # type: ignore[attr-defined]
        return backend.open

    assert asyncio.run(run(read=0)) == 0
    assert asyncio.run(run(read=5)) == 0


def test_unknown_fields_are_ignored_and_those_that_ask_for_more_are_refused() -> None:
    fields = {
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "reasoning_effort": "low",
        "new": 1,
    }
    assert chat(ScriptedBackend(), **fields).status == 200
    for name, value in (
        ("audio", {"voice": "x"}),
        ("modalities", ["audio"]),
        ("web_search_options", {"a": 1}),
        ("functions", [{"name": "f"}]),
    ):
        told = chat(ScriptedBackend(), **{name: value})
        assert told.status == 400
        assert told.error["param"] == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3),
        ("temperature", "hot"),
        ("temperature", -1),
        ("n", 0),
        ("n", 1.5),
        ("seed", "x"),
        ("stream", "yes"),
        ("stop", {}),
        ("max_tokens", True),
        ("logprobs", 3),
        ("top_logprobs", 21),
        ("tool_choice", 3),
        ("user_messages", None),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_name(name: str, value: object) -> None:
    told = chat(ScriptedBackend(), **{name: value})
    if value is None:
        assert told.status == 200
        return
    assert told.status == 400
    assert told.error["param"] == name


def test_a_caller_who_gives_a_request_id_repeats_it_and_others_get_one() -> None:
    body = b'{"model": "", "prompt": "x"}'
    path = "/v1/completions"
    assert ask_raw(ScriptedBackend(), "POST", path, body).headers["x-request-id"].startswith("req_")
    assert (
        "x-request-id" not in ask_raw(ScriptedBackend(), "POST", path, body, {"X-Request-Id": "mine"}).headers
    )
