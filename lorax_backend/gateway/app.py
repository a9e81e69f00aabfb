"""The ASGI application: routes, errors, request ids, counts, CORS, and the life of the connections behind them."""

from __future__ import annotations

import contextlib
import http
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.counters import Counters
from lorax_backend.gateway.errors import HttpError, error_response, from_lorax_error
from lorax_backend.gateway.openai import refusal as openai_refusal
from lorax_backend.gateway.openapi import docs, openapi_json, playground
from lorax_backend.gateway.pool import Pool
from lorax_backend.gateway.routes import counted_as, starlette_routes
from lorax_backend.gateway.state import GatewayState, read_request_id
from lorax_triton._transport import AsyncTransport
from lorax_triton.errors import LoraxError

_log = logging.getLogger("lorax_gateway")


def create_app(
    config: GatewayConfig,
    counters: Counters | None = None,
    transports: Mapping[str, AsyncTransport] | None = None,
) -> Starlette:
    """The application for one worker process. `transports` replaces connections by address, for tests."""
    counts = counters or Counters()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Made here because connections belong to the event loop that serves.
        pool = Pool(config, counts, transports)
        app.state.gateway = GatewayState(config, pool, counts)
        await pool.start()
        try:
            yield
        finally:
            await pool.stop()

    cors = config.cors
    middleware = [
        Middleware(RequestObserver, counters=counts),
        Middleware(
            CORSMiddleware,
            allow_origins=cors.origins,
            allow_methods=cors.methods,
            allow_headers=cors.headers,
            allow_credentials=cors.credentials,
            expose_headers=cors.expose_headers,
        ),
    ]
    pages = [
        Route("/docs", docs),
        Route("/api-doc/openapi.json", openapi_json),
        Route("/openapi.json", openapi_json),
        Route("/playground", playground),
    ]
    app = Starlette(
        routes=[*starlette_routes(), *pages],
        middleware=middleware,
        exception_handlers={
            HttpError: _on_http_error,
            LoraxError: _on_lorax_error,
            HTTPException: _on_framework_error,
            Exception: _on_bug,
        },
        lifespan=lifespan,
    )
    app.state.version = _version()
    return app


class RequestObserver:
    """Gives every request an id, which its answer carries, and counts it."""

    def __init__(self, app: ASGIApp, counters: Counters) -> None:
        self._app = app
        self._counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = read_request_id(given.decode("latin-1"))
        scope["lorax_request_id"] = request_id
        counters, status = self._counters, 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", request_id.encode())],
                }
            await send(message)

        counters.add("requests_in_flight")
        try:
            await self._app(scope, receive, observed)
        finally:
            counters.add("requests_in_flight", -1)
            counters.request(counted_as(scope["method"], scope["path"]), status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    if error.status >= 500:
        _log.warning("request %s: %d %s", request.scope["lorax_request_id"], error.status, error.message)
    return error_response(error)


async def _on_lorax_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LoraxError)
    return await _on_http_error(request, from_lorax_error(error))


async def _on_framework_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths, wrong methods."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    words = http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    message = {
        404: f"no route {path}; GET /docs lists them",
        405: f"{request.method} is not allowed for {path}",
    }.get(error.status_code, str(error.detail))
    if path.startswith("/v1/") and not path.endswith("load_lora_adapter"):
        code = {404: "unknown_url", 405: "method_not_supported"}.get(error.status_code, words)
        return openai_refusal(HttpError(error.status_code, code, message, error.headers))
    return error_response(HttpError(error.status_code, words, message, error.headers))


async def _on_bug(request: Request, error: Exception) -> Response:
    _log.error("request %s failed", request.scope.get("lorax_request_id"), exc_info=error)
    return error_response(HttpError(500, "generation", f"internal error: {type(error).__name__}"))


def _version() -> str:
    try:
        return importlib.metadata.version("lorax-triton")
    except importlib.metadata.PackageNotFoundError:
        return "0"
