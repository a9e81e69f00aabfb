"""The table of routes: what answers, how it is counted, and what the OpenAPI description says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.routing import Route

from lorax_backend.gateway import adapter_routes, bodies, generate_routes, openai, responses, status_routes


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `answer` is the model of a 200's body: None for an empty one, a media type as text for
    one that is no JSON. `hidden` keeps it out of the description."""

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Any]]
    counted_as: str
    summary: str
    tag: str = "LoRAX"
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | str | None = None
    answer_is_list: bool = False
    streams: bool = False
    hidden: bool = False


def _generation() -> list[Operation]:
    whole, many = generate_routes.generate, generate_routes.compat_generate
    compat, answer = bodies.CompatGenerateBody, responses.GenerateResponse
    return [
        Operation("POST", "/", many, "generate", "Generate: a list of one answer, or events if `stream`",
                  body=compat, answer=answer, answer_is_list=True, streams=True),
        Operation("POST", "/invocations", many, "generate", "The same as POST /, where SageMaker calls it",
                  body=compat, answer=answer, answer_is_list=True, streams=True),
        Operation("POST", "/generate", whole, "generate", "Generate a whole answer",
                  body=bodies.GenerateBody, answer=answer),
        Operation("POST", "/generate_stream", generate_routes.generate_stream, "generate_stream",
                  "Generate an answer as server-sent events; failures are events too",
                  body=bodies.GenerateBody, answer="text/event-stream"),
        Operation("POST", "/tokenize", generate_routes.tokenize, "tokenize", "Split a text into tokens",
                  body=bodies.TokenizeBody, answer=responses.TokenPlace, answer_is_list=True),
        Operation("POST", "/embed", generate_routes.embed, "other", "Not served by models that generate text",
                  body=bodies.EmbedBody),
        Operation("POST", "/classify", generate_routes.classify, "other", "Not served by models that generate text",
                  body=bodies.ClassifyBody),
        Operation("POST", "/classify_batch", generate_routes.classify_batch, "other",
                  "Not served by models that generate text", body=bodies.ClassifyBatchBody),
    ]  # fmt: skip


def _openai() -> list[Operation]:
    route = openai.openai_route
    return [
        Operation("POST", "/v1/chat/completions", route, "chat_completions", "OpenAI chat; `model` names the adapter",
                  "OpenAI", answer="application/json", streams=True),
        Operation("POST", "/v1/completions", route, "completions", "OpenAI completions; `model` names the adapter",
                  "OpenAI", answer="application/json", streams=True),
        Operation("POST", "/v1/embeddings", route, "embeddings", "OpenAI embeddings", "OpenAI",
                  answer="application/json"),
        Operation("GET", "/v1/models", route, "models", "The base model and the known adapters", "OpenAI",
                  answer="application/json"),
        Operation("GET", "/v1/models/{model:path}", route, "models", "One model", "OpenAI", answer="application/json"),
    ]  # fmt: skip


def _status() -> list[Operation]:
    health, tag = status_routes.health, "Status"
    return [
        Operation("GET", "/health", health, "health", "200 while requests are taken", tag),
        Operation("GET", "/ping", health, "health", "The same as /health, where SageMaker asks", tag),
        Operation("GET", "/", health, "health", "The same as /health", tag),
        Operation("GET", "/startup", status_routes.startup, "startup", "200 once a token was generated", tag),
        Operation("GET", "/info", status_routes.info, "info", "Facts about the model", tag, answer="application/json"),
        Operation("GET", "/metrics", status_routes.metrics, "metrics", "Prometheus text, or JSON by ?format=json", tag,
                  answer="text/plain"),
    ]  # fmt: skip


def _adapters() -> list[Operation]:
    act, tag = adapter_routes.adapter_action, "Adapters"
    return [
        Operation("GET", "/adapters", adapter_routes.list_adapters, "adapters", "All known adapters", tag,
                  answer=responses.AdapterList),
        Operation("POST", "/adapters/{action}", act, "adapters", f"One of {', '.join(adapter_routes.ACTIONS)}", tag,
                  body=bodies.AdapterBody, answer="application/json"),
        Operation("POST", "/v1/load_lora_adapter", adapter_routes.load_lora_adapter, "adapters",
                  "Name an adapter and load it, as with vLLM", tag, body=bodies.LoadLoraAdapterBody,
                  answer="text/plain"),
        Operation("POST", "/v1/unload_lora_adapter", adapter_routes.unload_lora_adapter, "adapters",
                  "Forget an adapter, as with vLLM", tag, body=bodies.UnloadLoraAdapterBody, answer="text/plain"),
    ]  # fmt: skip


OPERATIONS: tuple[Operation, ...] = (*_generation(), *_openai(), *_status(), *_adapters())


def counted_as(method: str, path: str) -> str:
    """How a request is counted on /metrics."""
    return _COUNTED.get((method, path)) or next(
        (
            name
            for prefix, name in (("/adapters/", "adapters"), ("/v1/models/", "models"))
            if path.startswith(prefix)
        ),
        "other",
    )


_COUNTED = {(operation.method, operation.path): operation.counted_as for operation in OPERATIONS}


def starlette_routes() -> list[Route]:
    """The routes, with all methods of a path together so that others get a 405."""
    return [Route(operation.path, operation.handler, methods=[operation.method]) for operation in OPERATIONS]
