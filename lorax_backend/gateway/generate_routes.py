"""LoRAX's routes that generate: /, /invocations, /generate, /generate_stream; and those this model cannot serve."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorax_backend.gateway.auth import hub_token, require_user
from lorax_backend.gateway.bodies import (
    ClassifyBatchBody,
    ClassifyBody,
    CompatGenerateBody,
    EmbedBody,
    GenerateBody,
    TokenizeBody,
    read_model,
)
from lorax_backend.gateway.errors import HttpError, error_body, from_lorax_error, not_served
from lorax_backend.gateway.generation import Collector, Generation, model_headers, timing_headers
from lorax_backend.gateway.state import GatewayState, state_of
from lorax_backend.gateway.streaming import EventStream, until_disconnect
from lorax_triton.errors import LoraxError


async def generate(request: Request) -> Response:
    """POST /generate: a whole answer."""
    state, body = await _read(request, GenerateBody)
    return await _whole(request, state, _generation(request, state, body, stream=False), as_list=False)


async def generate_stream(request: Request) -> EventStream:
    """POST /generate_stream: an answer as events."""
    state, body = await _read(request, GenerateBody)
    return _stream(state, _generation(request, state, body, stream=True))


async def compat_generate(request: Request) -> Response | EventStream:
    """POST / and /invocations: a list of one answer, or events if the body says `stream`."""
    state, body = await _read(request, CompatGenerateBody)
    if body.get("stream"):
        return _stream(state, _generation(request, state, body, stream=True))
    return await _whole(request, state, _generation(request, state, body, stream=False), as_list=True)


async def tokenize(request: Request) -> Response:
    """POST /tokenize: the tokens of a text, with their places in it."""
    state, body = await _read(request, TokenizeBody)
    if not body["inputs"]:
        raise HttpError(422, "validation", "inputs: must not be empty")
    add_special_tokens = body.get("add_special_tokens")
    answer = await state.pool.control(
        "tokenize",
        {
            "inputs": body["inputs"],
            "add_special_tokens": True if add_special_tokens is None else add_special_tokens,
        },
    )
    return JSONResponse(answer["tokens"])


async def embed(request: Request) -> Response:
    """POST /embed."""
    await _read(request, EmbedBody)
    raise not_served("embeddings are")


async def classify(request: Request) -> Response:
    """POST /classify."""
    await _read(request, ClassifyBody)
    raise not_served("classification is")


async def classify_batch(request: Request) -> Response:
    """POST /classify_batch."""
    await _read(request, ClassifyBatchBody)
    raise not_served("classification is")


async def _read(request: Request, model: type[BaseModel]) -> tuple[GatewayState, dict[str, Any]]:
    state = state_of(request)
    require_user(request, state.config)
    _, body = await read_model(request, state.config, model)
    return state, body


def _generation(request: Request, state: GatewayState, body: dict[str, Any], stream: bool) -> Generation:
    return Generation(
        inputs=body["inputs"],
        parameters=body.get("parameters") or {},
        stream=stream,
        request_id=state.engine_request_id(request),
        api_token=hub_token(request, state.config),
    )


async def _whole(request: Request, state: GatewayState, generation: Generation, as_list: bool) -> Response:
    generation.check()
    started = time.monotonic()
    work = collect(state, generation)
    collector = await until_disconnect(request.receive, work, state.counters)
    answer = collector.response()
    headers = model_headers(generation, state.pool.info)
    headers |= timing_headers(collector.finished(), time.monotonic() - started)
    return JSONResponse([answer] if as_list else answer, headers=headers)


async def collect(state: GatewayState, generation: Generation) -> Collector:
    """Generate to the end.

    Raises:
        LoraxError: the request failed.
    """
    collector = Collector(generation)
    async with state.pool.open(generation.encode(), generation.adapter_key) as answer:
        async for response in answer:
            collector.feed(response)
    state.counters.add("generated_tokens", int(collector.finished().get("generated_tokens") or 0))
    return collector


def _stream(state: GatewayState, generation: Generation) -> EventStream:
    headers = model_headers(generation, state.pool.info)
    return EventStream(_events(state, generation), headers, _last_event, state.config, state.counters)


async def _events(state: GatewayState, generation: Generation) -> AsyncIterator[bytes]:
    generation.check()
    collector = Collector(generation)
    async with state.pool.open(generation.encode(), generation.adapter_key) as answer:
        async for response in answer:
            yield collector.stream_events(collector.feed(response))
        state.counters.add("generated_tokens", int(collector.finished().get("generated_tokens") or 0))


def _last_event(error: Exception) -> bytes:
    """LoRAX's streams tell of every failure in an event, since their status has been sent."""
    if isinstance(error, LoraxError):
        error = from_lorax_error(error)
    if not isinstance(error, HttpError):
        error = HttpError(500, "generation", f"internal error: {type(error).__name__}")
    return b"data:" + error_body(error) + b"\n\n"
