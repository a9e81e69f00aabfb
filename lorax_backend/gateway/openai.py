"""The OpenAI API, whose protocol is the client package's, over this gateway's servers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lorax_backend.gateway.auth import HUB_TOKEN_HEADER, hub_token, require_user
from lorax_backend.gateway.bodies import read_body, require_json
from lorax_backend.gateway.errors import HttpError, error_response
from lorax_backend.gateway.pool import ENGINE_MODEL, Pool
from lorax_backend.gateway.state import GatewayState, state_of
from lorax_backend.gateway.streaming import EventStream, until_disconnect
from lorax_triton.openai_api import Answer, Call, Piece, handle
from lorax_triton.openai_api.client_backend import decode_piece, encode_call
from lorax_triton.openai_api.errors import ApiError


class PoolBackend:
    """The servers of a pool as the OpenAI protocol sees them."""

    def __init__(self, state: GatewayState) -> None:
        self._state = state
        self._pool: Pool = state.pool

    async def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        """The pieces of one answer; closing the generator cancels the request."""
        key = f"{call.adapter_source or ''}:{call.adapter_id}" if call.adapter_id else None
        async with self._pool.open(encode_call(call, ENGINE_MODEL), key) as answer:
            async for response in answer:
                piece = decode_piece(response, call.request_id)
                if piece.details is not None:
                    self._state.counters.add(
                        "generated_tokens", int(piece.details.get("generated_tokens") or 0)
                    )
                yield piece

    async def info(self) -> Mapping[str, Any]:
        """Facts about the model."""
        return self._pool.info or await self._pool.control("info", {})

    async def adapters(self) -> Sequence[Mapping[str, Any]]:
        """The adapters that any of the servers knows."""
        return await self._state.adapters()

    async def aliases(self) -> Mapping[str, Any]:
        """The aliases of the server that is asked; an operator gives all servers the same."""
        aliases = (await self._pool.control("aliases", {})).get("aliases")
        return aliases if isinstance(aliases, Mapping) else {}


async def openai_route(request: Request) -> Response | EventStream:
    """Answer one request to the OpenAI API; errors have OpenAI's shape too."""
    state = state_of(request)
    try:
        require_user(request, state.config)
        body = b""
        if request.method == "POST":
            require_json(request)
            body = await read_body(request, state.config)
    except HttpError as error:
        return refusal(error)
    headers = _headers(request, state)
    work = handle(request.method, request.url.path, headers, body, PoolBackend(state))
    answer: Answer = await until_disconnect(request.receive, work, state.counters)
    if isinstance(answer.body, bytes):
        return Response(answer.body, answer.status, answer.headers)
    return EventStream(answer.body, answer.headers, _last_event, state.config, state.counters)


def _headers(request: Request, state: GatewayState) -> dict[str, str]:
    """What the protocol may see: as authorization only a token for the hub, never a key of this gateway."""
    headers = {name: value for name, value in request.headers.items() if name != HUB_TOKEN_HEADER}
    headers.pop("authorization", None)
    headers["x-request-id"] = state.request_id(request)
    token = hub_token(request, state.config)
    if token:
        headers["authorization"] = f"Bearer {token}"
    return headers


def refusal(error: HttpError) -> Response:
    """An error of the gateway's own in OpenAI's shape."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    answer = ApiError(error.message, code=error.error_type, status=error.status, kind=kind).answer()
    response = error_response(error)
    response.body = answer.body if isinstance(answer.body, bytes) else b""
    response.headers["content-length"] = str(len(response.body))
    return response


def _last_event(error: Exception) -> bytes:
    answer = ApiError(str(error), status=500, kind="server_error").answer()
    assert isinstance(answer.body, bytes)
    return b"data: " + answer.body + b"\n\n"
