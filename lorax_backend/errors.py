"""Errors of the server, and the one table that says what each becomes on the wire.

Every error a caller can see is a `LoraxError` subclass. Its `error_type` is LoRAX's (E01-E11 of its API) or, for
adapters, a finer kind. `triton_code` names the TRITONSERVER error code, `http_status` the status a gateway sends.
The classes are the table; `error_table` lists it.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar


class LoraxError(Exception):
    """Root of every error a caller can see. `message` names the field at fault and what to do about it."""

    error_type: ClassVar[str] = "generation"
    http_status: ClassVar[int] = 424
    triton_code: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: when trying again is worth it, in seconds, if that is known."""
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def to_dict(self) -> dict[str, Any]:
        shown = {"error": self.message, "error_type": self.error_type, "http_status": self.http_status}
        if self.retry_after_s is not None:
            shown["retry_after_s"] = self.retry_after_s
        return shown

    def to_json(self) -> str:
        """The text sent as the Triton error message, so that a client can rebuild the kind."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


class ValidationError(LoraxError):
    """A field of the request is missing, of the wrong type or out of range."""

    error_type = "validation"
    http_status = 422
    triton_code = "INVALID_ARG"


class UnsupportedError(ValidationError):
    """The field is valid but this server cannot do what it asks."""

    error_type = "unsupported"
    triton_code = "UNSUPPORTED"


class OverloadedError(LoraxError):
    """Too many requests are in flight; the caller should back off."""

    error_type = "overloaded"
    http_status = 429
    triton_code = "UNAVAILABLE"


class GenerationError(LoraxError):
    """The engine failed while this request was running."""


class IncompleteGenerationError(LoraxError):
    """The stream ended without a last token."""

    error_type = "incomplete_generation"
    http_status = 500


class EngineDeadError(LoraxError):
    """The engine's process or thread is gone; the server must be restarted."""

    error_type = "engine_dead"
    http_status = 503
    triton_code = "UNAVAILABLE"


class ShuttingDownError(LoraxError):
    """The server drains and takes no new requests."""

    error_type = "shutting_down"
    http_status = 503
    triton_code = "UNAVAILABLE"


class CancelledError(LoraxError):
    """The caller, or a control request, cancelled this request."""

    error_type = "cancelled"
    http_status = 499
    triton_code = "CANCELLED"


class TemplateError(LoraxError):
    """The chat template failed, or there is none."""

    error_type = "template_error"
    http_status = 422
    triton_code = "INVALID_ARG"


class MissingTemplateVariableError(TemplateError):
    """The chat template uses `guideline`, and the request has none."""

    error_type = "missing_template_variable"


class ToolError(LoraxError):
    """The tools of a chat cannot be used as asked."""

    error_type = "tool_error"
    http_status = 422
    triton_code = "INVALID_ARG"


class EmbeddingFailureError(LoraxError):
    """No embedding came of an embedding request."""

    error_type = "embedding_failure"
    http_status = 500


class ClassificationFailureError(LoraxError):
    """No classification came of a classification request."""

    error_type = "classification_failure"
    http_status = 500


class UnhealthyError(LoraxError):
    """The answer to a health check while the server cannot serve."""

    error_type = "healthcheck"
    http_status = 503
    triton_code = "UNAVAILABLE"


class NoFastTokenizerError(LoraxError):
    """The model's tokenizer cannot tell where its tokens lie in the text."""

    error_type = "no fast tokenizer"
    http_status = 404
    triton_code = "NOT_FOUND"


class InvalidInputError(LoraxError):
    """The body of a request has no form that the route knows."""

    error_type = "invalid_input"
    http_status = 400
    triton_code = "INVALID_ARG"


class UnauthorizedError(LoraxError):
    """The command changes the server, and the request does not carry the administrator's key."""

    error_type = "unauthorized"
    http_status = 401
    triton_code = "INVALID_ARG"


class AdapterError(LoraxError):
    """Any failure of an adapter; the subclasses say which."""

    error_type = "adapter_error"


class AdapterNotFoundError(AdapterError):
    """No such folder, repository or revision, or one that holds no adapter."""

    error_type = "adapter_not_found"
    http_status = 404
    triton_code = "NOT_FOUND"


class AdapterUnauthorizedError(AdapterError):
    """The token may not read this adapter."""

    error_type = "adapter_unauthorized"
    http_status = 403
    triton_code = "INVALID_ARG"


class AdapterIncompatibleError(AdapterError):
    """The adapter does not fit the base model, or uses a PEFT feature that is not supported."""

    error_type = "adapter_incompatible"
    http_status = 422
    triton_code = "INVALID_ARG"


class AdapterTooLargeError(AdapterError):
    """The adapter's rank or bytes exceed what this server can hold."""

    error_type = "adapter_too_large"
    http_status = 422
    triton_code = "INVALID_ARG"


class AdapterDownloadError(AdapterError):
    """The source could not be reached or broke off; trying again may help."""

    error_type = "adapter_download_failed"
    http_status = 503
    triton_code = "UNAVAILABLE"


def _tree(root: type[LoraxError]) -> list[type[LoraxError]]:
    return [root] + [kind for sub in root.__subclasses__() for kind in _tree(sub)]


def error_table() -> dict[str, type[LoraxError]]:
    """Every kind of error by its `error_type`."""
    return {kind.error_type: kind for kind in reversed(_tree(LoraxError))}


def error_from_dict(payload: dict[str, Any]) -> LoraxError:
    """Rebuild an error from `LoraxError.to_dict()`; an unknown kind becomes a `GenerationError`."""
    kind = error_table().get(payload.get("error_type", ""), GenerationError)
    wait = payload.get("retry_after_s")
    return kind(str(payload.get("error", "unknown error")), wait if isinstance(wait, int | float) else None)
