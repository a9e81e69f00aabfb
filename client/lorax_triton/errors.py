"""Errors of the client: one root, `LoraxError`, and LoRAX's names below it.

LoraxError
├── ValidationError                  a field is missing or out of range
│   └── UnsupportedError             the field is fine, but this server cannot do it
├── TemplateError                    the chat template failed, or there is none
├── GenerationError                  the server failed while it worked on the request
│   └── AdapterError                 anything wrong with the adapter
│       ├── AdapterNotFoundError  AdapterUnauthorizedError  AdapterIncompatibleError
│       └── AdapterTooLargeError  AdapterDownloadError
├── IncompleteGenerationError        the stream ended before the answer did
├── OverloadedError                  too many requests in flight; back off and try again
├── UnauthorizedError                the command needs the server's admin key
├── RequestCancelledError            cancelled here or by a control request
├── RequestTimeoutError              (also a TimeoutError) no answer in time
├── ServerConnectionError            (also a ConnectionError) no connection, or it broke
├── ShardNotReadyError               the server is there but cannot serve
│   ├── EngineDeadError              its engine is gone; it must be restarted
│   └── ShuttingDownError            it drains; ask another one
└── BadRequestError  NotFoundError  ShardTimeoutError  RateLimitExceededError
    NotSupportedError  UnprocessableEntityError  UnknownError
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class LoraxError(Exception):
    """Root of every error this package raises on purpose.

    Attributes:
        message: what went wrong and, where the server knows it, what to do.
        status: the HTTP status that stands for this failure, or None if it never reached a server.
        error_type: the server's word for the kind, such as "validation" or "adapter_not_found", or None.
        request_id: the request at fault, or None.
        retry_after: seconds after which the server thinks a new try is worth it, or None.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.status: int | None = None
        self.error_type: str | None = None
        self.request_id: str | None = None
        self.retry_after: float | None = None


class ValidationError(LoraxError):
    """A field is missing, of the wrong type or out of range; found here or by the server."""


class UnsupportedError(ValidationError):
    """The field is valid, but this server cannot do what it asks for."""


class TemplateError(LoraxError):
    """The model's chat template failed on these messages, or the model has none."""


class GenerationError(LoraxError):
    """The server failed while it worked on the request."""


class AdapterError(GenerationError):
    """The adapter could not be used."""


class AdapterNotFoundError(AdapterError):
    """No such folder, repository or revision, or it holds no adapter."""


class AdapterUnauthorizedError(AdapterError):
    """The token may not read this adapter."""


class AdapterIncompatibleError(AdapterError):
    """The adapter does not fit the base model, or uses a feature the server lacks."""


class AdapterTooLargeError(AdapterError):
    """The adapter's rank or size exceeds what the server can hold."""


class AdapterDownloadError(AdapterError):
    """The adapter's source could not be reached; trying again may help."""


class IncompleteGenerationError(LoraxError):
    """The stream ended before the answer did."""


class OverloadedError(LoraxError):
    """Too many requests are in flight; back off and try again."""


class UnauthorizedError(LoraxError):
    """The command changes the server, and the request does not carry its admin key."""


class RequestCancelledError(LoraxError):
    """The request was cancelled, by its caller or by a control request."""


class RequestTimeoutError(LoraxError, TimeoutError):
    """The next response, or the whole answer, did not come in time."""


class ServerConnectionError(LoraxError, ConnectionError):
    """The server could not be reached, or the connection broke."""


class BadRequestError(LoraxError):
    """Status 400: the server could not read the request."""


class ShardNotReadyError(LoraxError):
    """The server is reachable but cannot serve this model now."""


class EngineDeadError(ShardNotReadyError):
    """The server's engine is gone; it must be restarted."""


class ShuttingDownError(ShardNotReadyError):
    """The server drains and takes no new requests."""


class ShardTimeoutError(LoraxError):
    """Status 504: something behind the server did not answer in time."""


class NotFoundError(LoraxError):
    """Status 404: the server does not know this model."""


class RateLimitExceededError(LoraxError):
    """Status 429 from something in front of the server."""


class UnprocessableEntityError(LoraxError):
    """Status 422 without a finer kind."""


class NotSupportedError(LoraxError):
    """The server does not serve this model."""

    def __init__(self, model_id: str) -> None:
        super().__init__(f"Model {model_id!r} is not served here")


class UnknownError(LoraxError):
    """A failure of no known kind; `status` has its code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(f"Error status {code}: {message}")


_BY_TYPE: dict[str, type[LoraxError]] = {
    "validation": ValidationError,
    "unsupported": UnsupportedError,
    "template_error": TemplateError,
    "missing_template_variable": TemplateError,
    "tool_error": ValidationError,
    "invalid_input": BadRequestError,
    "no fast tokenizer": NotFoundError,
    "unauthorized": UnauthorizedError,
    "generation": GenerationError,
    "embedding_failure": GenerationError,
    "classification_failure": GenerationError,
    "incomplete_generation": IncompleteGenerationError,
    "overloaded": OverloadedError,
    "cancelled": RequestCancelledError,
    "engine_dead": EngineDeadError,
    "shutting_down": ShuttingDownError,
    "healthcheck": ShardNotReadyError,
    "adapter_error": AdapterError,
    "adapter_not_found": AdapterNotFoundError,
    "adapter_unauthorized": AdapterUnauthorizedError,
    "adapter_incompatible": AdapterIncompatibleError,
    "adapter_too_large": AdapterTooLargeError,
    "adapter_download_failed": AdapterDownloadError,
}

_BY_STATUS: dict[int, type[LoraxError]] = {
    400: BadRequestError,
    403: ShardNotReadyError,
    404: NotFoundError,
    422: UnprocessableEntityError,
    424: ShardNotReadyError,
    429: RateLimitExceededError,
    499: RequestCancelledError,
    503: ShardNotReadyError,
    504: ShardTimeoutError,
}

# Canonical gRPC code -> HTTP status, after google/rpc/code.proto.
_STATUS_OF_CODE = {
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
    "UNAUTHENTICATED": 401,
}

# What Triton itself says, with the gRPC code it means; the first that fits counts. Errors inside a stream come
# without their code.
_TRITON_TEXTS = (
    ("available versions", "UNAVAILABLE"),
    ("server is stopping", "UNAVAILABLE"),
    ("server exiting", "UNAVAILABLE"),
    ("stub process", "UNAVAILABLE"),
    ("protocol is restricted", "UNAVAILABLE"),
    ("maximum queue size", "UNAVAILABLE"),
    ("timeout expired", "UNAVAILABLE"),
    ("not ready", "UNAVAILABLE"),
    ("is not found", "NOT_FOUND"),
    ("inference input", "INVALID_ARGUMENT"),
    ("inference request for", "INVALID_ARGUMENT"),
    ("unexpected shape", "INVALID_ARGUMENT"),
)


def parse_error(
    status_code: int, payload: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> LoraxError:
    """The exception for a server's error: by `error_type` if it is a known one, else by status.

    Args:
        status_code: HTTP status, or the one that stands for the gRPC code.
        payload: the error's JSON object: `error` (the message) and `error_type`.
        headers: response headers; `x-b3-traceid` is added to the message.
    """
    message = str(payload.get("error") or payload.get("message") or "")
    trace_id = (headers or {}).get("x-b3-traceid")
    if trace_id:
        message += f": Trace ID: {trace_id}"
    error_type = payload.get("error_type")
    kind = _BY_TYPE.get(str(error_type)) or _BY_STATUS.get(status_code)
    error = kind(message) if kind is not None else UnknownError(message, status_code)
    error.status = status_code
    error.error_type = None if error_type is None else str(error_type)
    wait = payload.get("retry_after_s")
    error.retry_after = float(wait) if isinstance(wait, int | float) else None
    return error


def find_error_payload(message: str) -> dict[str, Any] | None:
    """The server's JSON object within an error message, or None. Triton may put words before it."""
    decoder = json.JSONDecoder()
    start = message.find("{")
    while start != -1:
        try:
            payload, _ = decoder.raw_decode(message, start)
        except ValueError:
            payload = None
        if isinstance(payload, dict) and "error" in payload and "error_type" in payload:
            return payload
        start = message.find("{", start + 1)
    return None


def code_of_text(message: str) -> str | None:
    """The gRPC code that one of Triton's own error texts stands for, or None if it is not one of them."""
    text = message.lower()
    return next((code for words, code in _TRITON_TEXTS if words in text), None)


def error_from_grpc(code: str | None, message: str, request_id: str | None = None) -> LoraxError:
    """The exception for an error that came over gRPC.

    Args:
        code: name of the gRPC status code, such as "NOT_FOUND", or None if the error came inside a response.
        message: the server's text, holding its JSON error object if the model itself sent it.
        request_id: noted in the exception.
    """
    payload = find_error_payload(message)
    code = code or code_of_text(message)
    status = _STATUS_OF_CODE.get(code or "", 500)
    if payload is not None:
        given = payload.get("http_status")
        error = parse_error(given if isinstance(given, int) else status, payload)
    elif code == "DEADLINE_EXCEEDED":
        error = RequestTimeoutError(message)
        error.status = status
    else:
        error = parse_error(status, {"error": message})
    error.request_id = request_id
    return error
