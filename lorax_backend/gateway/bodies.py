"""Request bodies: reading them within limits, and what they hold. The models also write the OpenAPI description."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect, Request

from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.errors import HttpError
from lorax_triton.errors import RequestCancelledError

Body = TypeVar("Body", bound=BaseModel)
_MAX_PROBLEMS = 5
# How much of a body beyond the limit is read before its caller is cut off.
_DISCARDED_BYTES = 32 << 20


class _Model(BaseModel):
    # Strict: "5" is no number, as in LoRAX. Unknown fields are left alone, as there.
    model_config = ConfigDict(strict=True, extra="allow")


class MergedAdaptersBody(_Model):
    """Several adapters merged for this request."""

    ids: list[str]
    weights: list[float] | None = None
    merge_strategy: str | None = Field(None, description="linear, ties, dare_linear or dare_ties")
    density: float | None = None
    majority_sign_method: str | None = Field(None, description="total or frequency")


class ResponseFormatBody(_Model):
    """What the generated text is held to."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class GenerateParameters(_Model):
    """How to generate. Ranges are checked by the engine, which names the field at fault."""

    adapter_id: str | None = Field(None, description="LoRA adapter; empty for the base model")
    adapter_source: str | None = Field(None, description="hub, local, s3 or pbase")
    merged_adapters: MergedAdaptersBody | None = None
    api_token: str | None = Field(None, description="token for a private adapter")
    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: int | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: int | None = None
    apply_chat_template: bool | None = None
    seed: int | None = None
    response_format: ResponseFormatBody | None = None


class GenerateBody(_Model):
    """A prompt and how to go on from it."""

    inputs: str = Field(examples=["What is deep learning?"])
    parameters: GenerateParameters | None = None


class CompatGenerateBody(GenerateBody):
    """The same with a choice between a whole answer and a stream."""

    stream: bool | None = False


class TokenizeBody(_Model):
    """A text to split into tokens."""

    inputs: str
    add_special_tokens: bool | None = True


class EmbedBody(_Model):
    """A text to embed."""

    inputs: str
    parameters: dict[str, Any] | None = None


class ClassifyBody(_Model):
    """A text to classify."""

    inputs: str


class ClassifyBatchBody(_Model):
    """Texts to classify."""

    inputs: list[str]


class AdapterBody(_Model):
    """Which adapter an administrator means."""

    adapter_id: str = Field(min_length=1)
    adapter_source: str | None = None
    revision: str | None = None
    api_token: str | None = None
    tier: Literal["device", "host", "disk"] | None = Field(None, description="how far to load it")
    pin: bool | None = None


class LoadLoraAdapterBody(_Model):
    """vLLM's way to name an adapter: from now on `lora_name` stands for the one at `lora_path`."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1, description="folder on the server, or hub id")
    adapter_source: str | None = Field(None, description="default: local for an absolute path, else hub")
    api_token: str | None = None


class UnloadLoraAdapterBody(_Model):
    """vLLM's way to forget an adapter."""

    lora_name: str = Field(min_length=1)


async def read_body(request: Request, config: GatewayConfig) -> bytes:
    """The whole body.

    Raises:
        HttpError: 413 too long, 408 too slow, 400 a bad length.
        RequestCancelledError: the caller left.
    """
    limit = config.max_body_bytes
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(config.body_timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    chunks.append(chunk)
                elif size > limit + _DISCARDED_BYTES:
                    break
                else:
                    # Thrown away, but read: many callers only look for an answer once all is sent.
                    chunks.clear()
    except TimeoutError:
        if size > limit:
            raise _too_long(limit) from None
        message = f"the body did not arrive within {config.body_timeout:g} s"
        raise HttpError(408, "request_timeout", message, close=True) from None
    except ClientDisconnect:
        raise RequestCancelledError("the caller left before the body ended") from None
    if size > limit:
        raise _too_long(limit)
    return b"".join(chunks)


def _too_long(limit: int) -> HttpError:
    message = f"the body is longer than {limit} bytes; send less, or raise --max-body-bytes"
    return HttpError(413, "payload_too_large", message, close=True)


def require_json(request: Request) -> None:
    """Refuse bodies that do not say they are JSON.

    Raises:
        HttpError: 415.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise HttpError(
            415, "unsupported_media_type", "send the header `Content-Type: application/json`", close=True
        )


def parse_json(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        HttpError: 400.
    """
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise HttpError(400, "invalid_json", f"the body is not valid JSON: {reason}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


async def read_model(
    request: Request, config: GatewayConfig, model: type[Body]
) -> tuple[Body, dict[str, Any]]:
    """The body as a model and, as it was sent, as a dict.

    Raises:
        HttpError: it is missing, unreadable or of the wrong shape.
    """
    require_json(request)
    value = parse_json(await read_body(request, config))
    try:
        return model.model_validate(value), value
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors(include_url=False)[:_MAX_PROBLEMS]]
        raise HttpError(422, "validation", "; ".join(problems)) from None


def _problem(error: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "the body"
    return f"{place}: {error['msg'][:1].lower()}{error['msg'][1:]}"
