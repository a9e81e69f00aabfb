"""From what a server says to the exception a caller catches."""

from __future__ import annotations

import json

import pytest

import lorax_triton
from lorax_triton import (
    AdapterDownloadError,
    AdapterError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    AdapterUnauthorizedError,
    BadRequestError,
    EngineDeadError,
    GenerationError,
    IncompleteGenerationError,
    LoraxError,
    NotFoundError,
    OverloadedError,
    RateLimitExceededError,
    RequestCancelledError,
    RequestTimeoutError,
    ShardNotReadyError,
    ShardTimeoutError,
    ShuttingDownError,
    TemplateError,
    UnknownError,
    UnprocessableEntityError,
    UnsupportedError,
    ValidationError,
    parse_error,
)
from lorax_triton._channel import connection_lost
from lorax_triton.errors import error_from_grpc, find_error_payload

KINDS = {
    "generation": GenerationError,
    "incomplete_generation": IncompleteGenerationError,
    "overloaded": OverloadedError,
    "validation": ValidationError,
    "unsupported": UnsupportedError,
    "template_error": TemplateError,
    "cancelled": RequestCancelledError,
    "engine_dead": EngineDeadError,
    "shutting_down": ShuttingDownError,
    "adapter_error": AdapterError,
    "adapter_not_found": AdapterNotFoundError,
    "adapter_unauthorized": AdapterUnauthorizedError,
    "adapter_incompatible": AdapterIncompatibleError,
    "adapter_too_large": AdapterTooLargeError,
    "adapter_download_failed": AdapterDownloadError,
}

STATUSES = {
    400: BadRequestError,
    403: ShardNotReadyError,
    404: NotFoundError,
    422: UnprocessableEntityError,
    424: ShardNotReadyError,
    429: RateLimitExceededError,
    500: UnknownError,
    504: ShardTimeoutError,
}


@pytest.mark.parametrize(("error_type", "kind"), KINDS.items())
def test_z01_the_error_type_decides_before_the_status(error_type: str, kind: type[LoraxError]) -> None:
    error = parse_error(400, {"error": "why", "error_type": error_type})
    assert type(error) is kind
    assert (str(error), error.status, error.error_type) == ("why", 400, error_type)


@pytest.mark.parametrize(("status", "kind"), STATUSES.items())
def test_z01_without_a_known_type_the_status_decides(status: int, kind: type[LoraxError]) -> None:
    assert type(parse_error(status, {"error": "why"})) is kind
    assert type(parse_error(status, {"error": "why", "error_type": "of tomorrow"})) is kind


def test_a_trace_id_is_added_to_the_message() -> None:
    assert str(parse_error(400, {"error": "why"}, {"x-b3-traceid": "7"})) == "why: Trace ID: 7"


def test_every_exception_has_the_one_root_and_adapter_errors_are_generation_errors() -> None:
    public = [getattr(lorax_triton, name) for name in lorax_triton.__all__]
    exceptions = [value for value in public if isinstance(value, type)]
    exceptions = [kind for kind in exceptions if issubclass(kind, Exception)]
    assert len(exceptions) > 20
    assert all(issubclass(kind, LoraxError) for kind in exceptions)
    assert issubclass(AdapterNotFoundError, GenerationError)


@pytest.mark.parametrize("prefix", ["", "in ensemble 'e', ", "[request id: {7}] odd { text: "])
@pytest.mark.parametrize("suffix", ["", " (see the log)"])
def test_the_json_is_found_within_other_words(prefix: str, suffix: str) -> None:
    payload = {"error": 'a {brace} and "quote"', "error_type": "validation", "http_status": 422}
    assert find_error_payload(prefix + json.dumps(payload) + suffix) == payload


@pytest.mark.parametrize(
    "text", ["", "no json", '{"error": 1}', '{"error": "x", "error_type"', "[1]", "{" * 50]
)
def test_other_text_holds_no_payload(text: str) -> None:
    assert find_error_payload(text) is None


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        ("INVALID_ARGUMENT", BadRequestError, 400),
        ("NOT_FOUND", NotFoundError, 404),
        ("UNAVAILABLE", ShardNotReadyError, 503),
        ("CANCELLED", RequestCancelledError, 499),
        ("DEADLINE_EXCEEDED", RequestTimeoutError, 504),
        ("RESOURCE_EXHAUSTED", RateLimitExceededError, 429),
        ("INTERNAL", UnknownError, 500),
        (None, UnknownError, 500),
    ],
)
def test_text_without_json_is_sorted_by_its_grpc_code(
    code: str | None, kind: type[LoraxError], status: int
) -> None:
    error = error_from_grpc(code, "why", "r-1")
    assert type(error) is kind
    assert (error.status, error.request_id) == (status, "r-1")
    assert "why" in str(error)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Request for unknown model: 'x' is not found", NotFoundError),
        ("Request for unknown model: 'x' has no available versions", ShardNotReadyError),
        ("Stub process 'lorax_0_0' is not healthy.", ShardNotReadyError),
        ("[request id: 7] unexpected inference input 'x' for model 'lorax'", BadRequestError),
    ],
)
def test_tritons_own_words_inside_a_stream_are_sorted_without_a_code(
    text: str, kind: type[LoraxError]
) -> None:
    assert type(error_from_grpc(None, text)) is kind


def test_a_timeout_and_a_lost_connection_are_also_pythons_own() -> None:
    assert issubclass(RequestTimeoutError, TimeoutError)
    assert issubclass(lorax_triton.ServerConnectionError, ConnectionError)


@pytest.mark.parametrize(
    "details",
    [
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:9: Connection refused",
        "Socket closed",
        "GOAWAY received; Error code: 2",
        "DNS resolution failed for model-server:8001",
        "recvmsg:Connection reset by peer",
        "Cancelling all calls",
    ],
)
def test_the_networks_unavailable_is_a_lost_connection(details: str) -> None:
    assert connection_lost("UNAVAILABLE", details)
    assert not connection_lost("INTERNAL", details)


@pytest.mark.parametrize(
    "details",
    [
        json.dumps({"error": "busy", "error_type": "overloaded"}),
        "Request for unknown model: 'lorax' has no available versions",
        "Server is stopping, scheduler for model has stopped accepting new inference requests",
        "Stub process 'lorax_0_0' is not healthy.",
        "This protocol is restricted, expecting header 'triton-grpc-protocol-k'",
        "Exceeds maximum queue size",
    ],
)
def test_tritons_own_unavailable_is_not_a_lost_connection(details: str) -> None:
    assert not connection_lost("UNAVAILABLE", details)
