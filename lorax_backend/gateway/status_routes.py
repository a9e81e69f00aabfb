"""Routes about the server: health, startup, info, metrics."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorax_backend.gateway.errors import HttpError
from lorax_backend.gateway.generate_routes import collect
from lorax_backend.gateway.generation import Generation
from lorax_backend.gateway.prometheus import http_get, label_samples, merge, to_json
from lorax_backend.gateway.state import GatewayState, state_of
from lorax_triton.errors import LoraxError

_PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SCRAPE_TIMEOUT_S = 5.0
_log = logging.getLogger("lorax_gateway")

# LoRAX's names of what the engine calls otherwise.
_INFO_NAMES = {
    "model_id": "model_id",
    "model_dtype": "dtype",
    "model_device_type": "device",
    "max_concurrent_requests": "max_concurrent_requests",
    "max_best_of": "max_best_of",
    "max_stop_sequences": "max_stop_sequences",
    "max_input_length": "max_input_length",
    "max_total_tokens": "max_total_tokens",
    "max_batch_total_tokens": "max_batch_tokens",
    "validation_workers": "validation_workers",
}


async def health(request: Request) -> Response:
    """GET /health, /ping and /: 200 while some server takes requests."""
    state = state_of(request)
    if not state.pool.healthy:
        # What the watcher saw may be seconds old; a server that has just come up counts at once.
        await asyncio.gather(*(endpoint.probe() for endpoint in state.pool.endpoints))
    if not state.pool.healthy:
        raise HttpError(503, "healthcheck", "unhealthy")
    return Response()


async def startup(request: Request) -> Response:
    """GET /startup: 200 once a token has really been generated."""
    state = state_of(request)
    generation = Generation("Who?", {"max_new_tokens": 1}, False, state.engine_request_id(request))
    try:
        collector = await collect(state, generation)
    except LoraxError as error:
        raise HttpError(500, "healthcheck", f"no token could be generated: {error.message}") from error
    if not collector.finished().get("generated_tokens"):
        raise HttpError(500, "healthcheck", "no token was generated")
    return Response()


async def info(request: Request) -> Response:
    """GET /info: LoRAX's facts about the model, and the engine's own."""
    state = state_of(request)
    facts: dict[str, Any] = dict(state.pool.info or await state.pool.control("info", {}))
    shown = {name: facts.get(source) for name, source in _INFO_NAMES.items()}
    shown |= {
        "model_sha": facts.get("model_sha"),
        "model_pipeline_tag": "text-generation",
        "waiting_served_ratio": facts.get("waiting_served_ratio", 0.0),
        "max_waiting_tokens": facts.get("max_waiting_tokens", 0),
        "eager_prefill": True,
        "version": _version(),
        "sha": None,
        "docker_label": None,
        "request_logger_url": None,
    }
    servers = [
        {"url": endpoint.url, "healthy": endpoint.healthy, "in_flight": endpoint.in_flight}
        for endpoint in state.pool.endpoints
    ]
    return JSONResponse({**shown, "engine": facts, "servers": servers})


async def metrics(request: Request) -> Response:
    """GET /metrics: Triton's and the gateway's, as Prometheus text, or as JSON by `Accept` or `?format=json`."""
    state = state_of(request)
    pages = await asyncio.gather(*(_scrape(state, index) for index in range(len(state.pool.endpoints))))
    if len(pages) > 1:
        pages = [
            label_samples(page, "server", endpoint.url)
            for page, endpoint in zip(pages, state.pool.endpoints, strict=True)
        ]
    text = merge([*pages, state.counters.render()])
    asked = request.query_params.get("format")
    if asked not in (None, "json", "prometheus"):
        raise HttpError(422, "validation", "format: must be json or prometheus")
    if asked == "json" or (asked is None and "application/json" in request.headers.get("accept", "")):
        return JSONResponse(to_json(text))
    return Response(text, media_type=_PROMETHEUS_TYPE)


async def _scrape(state: GatewayState, index: int) -> str:
    """One server's metrics page; without it, what the engine can tell over gRPC; empty if it is down."""
    endpoint, url = state.pool.endpoints[index], state.config.prometheus_urls[index]
    try:
        return await http_get(url, _SCRAPE_TIMEOUT_S)
    except (OSError, ValueError, TimeoutError) as error:
        _log.debug("no metrics at %s: %s", url, error)
    try:
        return str((await endpoint.control("metrics", {})).get("prometheus", ""))
    except LoraxError as error:
        _log.debug("no metrics from %s: %s", endpoint.url, error.message)
        return ""


def _version() -> str:
    try:
        return importlib.metadata.version("lorax-triton")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
