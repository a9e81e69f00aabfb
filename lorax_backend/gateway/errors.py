"""What every failure becomes over HTTP: a status and LoRAX's ErrorResponse, {"error", "error_type"}."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from starlette.responses import Response

from lorax_triton.errors import (
    IncompleteGenerationError,
    LoraxError,
    NotFoundError,
    RequestCancelledError,
    RequestTimeoutError,
    ServerConnectionError,
    ShardNotReadyError,
)

RETRY_AFTER_S = 1
# For failures that carry no kind of the server's own: (class, status, error_type). The first that fits counts.
_LOCAL_KINDS: tuple[tuple[type[LoraxError], int, str], ...] = (
    (RequestTimeoutError, 504, "timeout"),
    (ServerConnectionError, 503, "unavailable"),
    (NotFoundError, 503, "unavailable"),
    (ShardNotReadyError, 503, "unavailable"),
    (RequestCancelledError, 499, "cancelled"),
    (IncompleteGenerationError, 500, "incomplete_generation"),
)
# The engine speaks of its tensors; callers of LoRAX's routes know other names.
_LORAX_NAMES = {
    "text_input": "inputs",
    "sampling_parameters": "parameters",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop_words": "stop",
}
_ENGINE_NAME = re.compile(r"\b(" + "|".join(_LORAX_NAMES) + r")\b")


class HttpError(Exception):
    """A refusal by the gateway itself. `close` also ends the connection, whose body was not read to its end."""

    def __init__(
        self,
        status: int,
        error_type: str,
        message: str,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.message = message
        self.headers = dict(headers or {})
        if close:
            self.headers["connection"] = "close"


def from_lorax_error(error: LoraxError) -> HttpError:
    """The HTTP form of a failure that came from Triton or on the way to it."""
    status, error_type = error.status, error.error_type
    if error_type is None:
        status, error_type = next(
            ((status, kind) for cls, status, kind in _LOCAL_KINDS if isinstance(error, cls)),
            (error.status if (error.status or 0) >= 400 else 500, "generation"),
        )
    message = error.message
    if error_type in ("validation", "unsupported"):
        message = _ENGINE_NAME.sub(lambda name: _LORAX_NAMES[name[0]], message)
    return HttpError(status or 500, error_type, message)


def error_body(error: HttpError) -> bytes:
    """ErrorResponse as JSON."""
    return json.dumps({"error": error.message, "error_type": error.error_type}, ensure_ascii=False).encode(
        errors="replace"
    )


def error_response(error: HttpError) -> Response:
    """ErrorResponse with its status; 429 and 503 say when to come back."""
    headers = dict(error.headers)
    if error.status in (429, 503):
        headers.setdefault("retry-after", str(RETRY_AFTER_S))
    if error.status == 401:
        headers.setdefault("www-authenticate", "Bearer")
    return Response(error_body(error), error.status, headers, "application/json")


def not_served(what: str) -> HttpError:
    """The answer of a route that this model cannot serve."""
    return HttpError(
        422,
        "unsupported",
        f"{what} not served by this model: it generates text. Use /generate or /v1/completions",
    )
