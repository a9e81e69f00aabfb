"""Errors as OpenAI's API words them."""

from __future__ import annotations

import re
from typing import Any

from lorax_triton.errors import LoraxError, ValidationError
from lorax_triton.openai_api.answer import Answer, json_answer

# How messages begin that name the field at fault, the server's and the client's.
_FIELD = re.compile(r"^([a-z_]+)((?:\[\d+\]|\.[a-z_0-9]+)*): |^`([a-z_]+)` ")
# The server's names of fields where they differ from OpenAI's.
_FIELD_NAMES = {
    "text_input": "prompt",
    "input_ids": "prompt",
    "adapter_id": "model",
    "stop_words": "stop",
    "max_new_tokens": "max_tokens",
}


class ApiError(Exception):
    """An error object of OpenAI's API. `param` names the field at fault."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status
        self.kind = kind

    def payload(self) -> dict[str, Any]:
        """The JSON body."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def answer(self) -> Answer:
        """The answer that tells of this error."""
        headers = {"retry-after": "1"} if self.status in (429, 503) else {}
        answer = json_answer(self.payload(), self.status, headers)
        answer.cause = self.__cause__ or self
        return answer


# What the server's messages about lengths name.
_TOO_LONG = ("max_input_length", "max_total_tokens")

# The server's word for where a field came from, which here is this package.
_INTERNAL = " (in sampling_parameters)"

# error_type of the server -> status, type and code of OpenAI's API.
_KINDS: dict[str, tuple[int, str, str | None]] = {
    "validation": (400, "invalid_request_error", None),
    "unsupported": (400, "invalid_request_error", "unsupported_parameter"),
    "template_error": (400, "invalid_request_error", "template_error"),
    "bad_request": (400, "invalid_request_error", None),
    "overloaded": (429, "rate_limit_error", "rate_limit_exceeded"),
    "adapter_not_found": (404, "invalid_request_error", "model_not_found"),
    "adapter_unauthorized": (403, "invalid_request_error", "adapter_unauthorized"),
    "adapter_incompatible": (400, "invalid_request_error", "adapter_incompatible"),
    "adapter_too_large": (400, "invalid_request_error", "adapter_too_large"),
    "adapter_download_failed": (503, "server_error", "adapter_download_failed"),
    "cancelled": (499, "invalid_request_error", "request_cancelled"),
    "timeout": (504, "server_error", "timeout"),
}


def from_lorax(error: LoraxError) -> ApiError:
    """The server's error in OpenAI's words; its cause is `error`."""
    kind = error.error_type or ("validation" if isinstance(error, ValidationError) else "")
    status, word, code = _KINDS.get(kind) or _by_status(error, kind)
    message = error.message.replace(_INTERNAL, "")
    param = "model" if kind.startswith("adapter_") else None
    found = _FIELD.match(message)
    if found and status == 400:
        name = found[1] or found[3]
        known = _FIELD_NAMES.get(name, name)
        param = known + (found[2] or "")
        if found[1]:
            message = known + message[len(name) :]
    if status == 400 and any(option in message for option in _TOO_LONG):
        code = "context_length_exceeded"
    result = ApiError(message, param, code, status, word)
    result.__cause__ = error
    return result


def internal_error(error: BaseException) -> ApiError:
    """The error for a fault of this program."""
    message = f"The server had an error while processing your request: {type(error).__name__}"
    result = ApiError(message, code="internal_error", status=500, kind="server_error")
    result.__cause__ = error
    return result


def _by_status(error: LoraxError, kind: str) -> tuple[int, str, str | None]:
    if isinstance(error, TimeoutError):
        return _KINDS["timeout"]
    if isinstance(error, ConnectionError):
        return 503, "server_error", "server_unreachable"
    status = error.status or 500
    if status == 424:  # the server failed, not what it depends on
        status = 500
    if status == 422:
        status = 400
    return status, "server_error" if status >= 500 else "invalid_request_error", kind or None
