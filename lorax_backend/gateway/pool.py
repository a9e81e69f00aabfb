"""The Triton servers behind a gateway: their health, their load, and which one serves a request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorax_backend.gateway.config import GatewayConfig, TlsOptions
from lorax_backend.gateway.counters import Counters
from lorax_backend.gateway.rendezvous import ranking
from lorax_triton._channel import ChannelConfig, Tls, parse_base_url
from lorax_triton._grpc_aio import AsyncGrpcTransport
from lorax_triton._stream import finish_async
from lorax_triton._transport import AsyncResponseStream, AsyncTransport, InferRequest, InferResponse
from lorax_triton._wire import decode_control, encode_control
from lorax_triton.errors import (
    LoraxError,
    OverloadedError,
    ServerConnectionError,
    ShardNotReadyError,
    error_from_grpc,
)

ENGINE_MODEL = "lorax"
CONTROL_TIMEOUT_S = 10.0
_PROBE_TIMEOUT_S = 5.0
# Another server may do what this one cannot; nothing was done for the request yet.
_ELSEWHERE = (ServerConnectionError, ShardNotReadyError, OverloadedError)

_log = logging.getLogger("lorax_gateway")


@dataclass(eq=False)
class Endpoint:
    """One Triton server. `in_flight` counts this process's requests to it."""

    url: str
    transport: AsyncTransport
    healthy: bool = False
    in_flight: int = 0
    info: Mapping[str, Any] = field(default_factory=dict)
    problem: str = "not asked yet"

    async def control(self, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Run a control command.

        Raises:
            LoraxError: the server could not be asked, or refused.
        """
        request = encode_control(command, arguments, ENGINE_MODEL, uuid.uuid4().hex)
        source = self.transport.open_stream(request, CONTROL_TIMEOUT_S)
        try:
            return decode_control(await source.receive(CONTROL_TIMEOUT_S), request.request_id)
        finally:
            await finish_async(source)

    async def probe(self) -> None:
        """See whether the server takes requests. Never raises."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                info = await self.control("info", {})
        except (LoraxError, TimeoutError) as error:
            self.mark_down(str(error) or "no answer in time")
            return
        self.info = info
        if not info.get("ready", True):
            self.mark_down("its engine takes no requests")
            return
        if not self.healthy:
            _log.info("%s is ready", self.url)
        self.healthy, self.problem = True, ""

    def mark_down(self, reason: str) -> None:
        """Let no request go here until a probe succeeds."""
        if self.healthy or self.problem == "not asked yet":
            _log.warning("%s is not available: %s", self.url, reason)
        self.healthy, self.problem = False, reason


class Pool:
    """All servers of a gateway. Belongs to one event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        counters: Counters,
        transports: Mapping[str, AsyncTransport] | None = None,
    ) -> None:
        """`transports` replaces the gRPC connections by address, for tests."""
        self._config = config
        self._counters = counters
        # With one server there is nowhere else to go, so its connection is made anew instead.
        retries = 2 if len(config.triton_urls) == 1 else 0
        self.endpoints = [
            Endpoint(url, (transports or {}).get(url) or _connect(url, retries, config.tls))
            for url in config.triton_urls
        ]
        self._watchers: list[asyncio.Task[None]] = []
        self._ending: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Look at every server once, then go on looking in the background."""
        await asyncio.gather(*(endpoint.probe() for endpoint in self.endpoints))
        self._watchers = [asyncio.create_task(self._watch(endpoint)) for endpoint in self.endpoints]

    async def stop(self) -> None:
        """Give up the connections."""
        for task in (*self._watchers, *self._ending):
            task.cancel()
        await asyncio.gather(*self._watchers, *self._ending, return_exceptions=True)
        await asyncio.gather(*(endpoint.transport.close() for endpoint in self.endpoints))

    async def _watch(self, endpoint: Endpoint) -> None:
        while True:
            await asyncio.sleep(self._config.health_interval)
            await endpoint.probe()

    @property
    def healthy(self) -> bool:
        """True if some server takes requests."""
        return any(endpoint.healthy for endpoint in self.endpoints)

    @property
    def info(self) -> Mapping[str, Any]:
        """Facts about the model, from a server that is up, else from one that was; empty if none ever was."""
        known = [endpoint for endpoint in self.endpoints if endpoint.info]
        known.sort(key=lambda endpoint: not endpoint.healthy)
        return known[0].info if known else {}

    def ranked(self, key: str | None) -> list[Endpoint]:
        """Servers in the order to try for an adapter's key; those that are down come last, in case they are back."""
        order = ranking(
            key,
            [endpoint.url for endpoint in self.endpoints],
            [endpoint.in_flight for endpoint in self.endpoints],
        )
        return sorted((self.endpoints[i] for i in order), key=lambda endpoint: not endpoint.healthy)

    async def control(
        self, command: str, arguments: Mapping[str, Any], key: str | None = None
    ) -> dict[str, Any]:
        """Run a control command on the server that owns `key`, or on any.

        Raises:
            LoraxError: no server could be asked, or the one that was refused.
        """
        return await self._first(lambda endpoint: endpoint.control(command, arguments), key)

    async def control_all(self, command: str, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Run a control command on every server that is up; the answers by address.

        Raises:
            LoraxError: none succeeded; the first failure.
        """
        asked = [endpoint for endpoint in self.endpoints if endpoint.healthy] or self.endpoints
        results = await asyncio.gather(
            *(endpoint.control(command, arguments) for endpoint in asked), return_exceptions=True
        )
        answers = {
            endpoint.url: result
            for endpoint, result in zip(asked, results, strict=True)
            if not isinstance(result, BaseException)
        }
        if not answers:
            raise next(result for result in results if isinstance(result, BaseException))
        return answers

    async def _first(self, ask: Any, key: str | None) -> Any:
        ranked = self.ranked(key)
        for position, endpoint in enumerate(ranked):
            try:
                return await ask(endpoint)
            except _ELSEWHERE as error:
                self._note(endpoint, error)
                if position + 1 == len(ranked):
                    raise
                self._counters.add("failovers")
        raise AssertionError("a pool has at least one server")

    def _note(self, endpoint: Endpoint, error: LoraxError) -> None:
        if not isinstance(error, OverloadedError):
            endpoint.mark_down(error.message)

    @contextlib.asynccontextmanager
    async def open(self, request: InferRequest, key: str | None) -> AsyncIterator[Answer]:
        """Send a request to the server that owns `key`, or to another if that one cannot take it.

        Leaving the block before the answer's end cancels the request on its server.

        Raises:
            LoraxError: the server refused the request, or no server could take it.
        """
        answer = await self._open(request, key)
        endpoint = answer.endpoint
        endpoint.in_flight += 1
        try:
            yield answer
        finally:
            endpoint.in_flight -= 1
            if answer.complete:
                self._end_later(answer.source)
            else:
                answer.source.cancel()

    async def _open(self, request: InferRequest, key: str | None) -> Answer:
        async def ask(endpoint: Endpoint) -> Answer:
            source = endpoint.transport.open_stream(request, None)
            answer = Answer(endpoint, source, request.request_id, self._config.response_timeout)
            endpoint.in_flight += 1  # while it waits for its first response too
            try:
                await answer.fetch()
            except BaseException:
                source.cancel()
                raise
            finally:
                endpoint.in_flight -= 1
            return answer

        answer: Answer = await self._first(ask, key)
        return answer

    def _end_later(self, source: AsyncResponseStream) -> None:
        """Let a finished call end by itself, so that its server does not take it for a cancelled one."""
        task = asyncio.create_task(finish_async(source))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class Answer:
    """The responses to one request, of which the first is already here. Iterate to get them all."""

    def __init__(
        self, endpoint: Endpoint, source: AsyncResponseStream, request_id: str, timeout: float
    ) -> None:
        self.endpoint = endpoint
        self.source = source
        self.complete = False
        self._request_id = request_id
        self._timeout = timeout
        self._next: InferResponse | None = None

    async def fetch(self) -> None:
        """Wait for the next response and keep it for the iteration.

        Raises:
            LoraxError: the server's error, or that the connection broke.
        """
        response = await self.source.receive(self._timeout)
        if response is not None and response.error is not None:
            self.complete = True
            raise error_from_grpc(None, response.error, self._request_id)
        self._next = response

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> InferResponse:
        if self.complete:
            raise StopAsyncIteration
        if self._next is None:
            await self.fetch()
        response, self._next = self._next, None
        if response is None:
            self.complete = True
            raise StopAsyncIteration
        if response.outputs.get("details") or response.final:
            self.complete = True
        return response


def _connect(url: str, retries: int, tls: TlsOptions) -> AsyncTransport:
    target, encrypted = parse_base_url(url)
    secrets = Tls(tls.ca_file, tls.key_file, tls.cert_file, tls.server_name) if encrypted else None
    return AsyncGrpcTransport(
        ChannelConfig(target, secrets, connect_timeout=3.0, max_session_retries=retries)
    )
