"""Answers that end when their caller leaves: event streams, and whole answers being waited for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.counters import Counters
from lorax_triton.errors import RequestCancelledError

T = TypeVar("T")
_log = logging.getLogger("lorax_gateway")
_COMMENT = b":\n\n"


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the caller has left. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T], counters: Counters) -> T:
    """The result of `work`, which is cancelled as soon as the caller leaves.

    Raises:
        RequestCancelledError: the caller left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        counters.add("disconnects")
        raise RequestCancelledError("the caller left")
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream:
    """An ASGI response of server-sent events.

    `events` yields bytes to send. When the caller leaves, or does not read for too long, the iterator is cancelled
    where it waits. `on_error` turns an exception of the iterator's into a last event.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        headers: Mapping[str, str],
        on_error: Callable[[Exception], bytes],
        config: GatewayConfig,
        counters: Counters,
    ) -> None:
        self._events = events
        self._on_error = on_error
        self._config = config
        self._counters = counters
        self.status_code = 200
        self.headers = {
            "content-type": "text/event-stream",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **headers,
        }
        self._idle = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or until the caller leaves."""
        start = {
            "type": "http.response.start",
            "status": 200,
            "headers": [
                (name.encode(), value.encode("latin-1", "replace")) for name, value in self.headers.items()
            ],
        }
        await send(start)
        self._counters.add("streams_in_flight")
        pump = asyncio.ensure_future(self._pump(send))
        helpers = [
            asyncio.ensure_future(wait_for_disconnect(receive)),
            asyncio.ensure_future(self._keep_alive(send)),
        ]
        try:
            await asyncio.wait((pump, *helpers), return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                self._counters.add("disconnects")
                pump.cancel()
        finally:
            for task in helpers:
                task.cancel()
            if not pump.done():
                pump.cancel()
            results = await asyncio.gather(pump, *helpers, return_exceptions=True)
            self._counters.add("streams_in_flight", -1)
        if isinstance(results[0], Exception):
            _log.warning("a stream broke off: %s: %s", type(results[0]).__name__, results[0])

    async def _pump(self, send: Send) -> None:
        try:
            async for event in self._events:
                if event:
                    await self._send(send, event)
        except Exception as error:
            self._counters.add("stream_errors")
            await self._send(send, self._on_error(error))
        finally:
            close = getattr(self._events, "aclose", None)
            if close is not None:
                with contextlib.suppress(Exception):
                    await close()
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, data: bytes, more: bool = True) -> None:
        self._idle = False
        async with asyncio.timeout(self._config.write_timeout):
            await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            self._idle = True
            await asyncio.sleep(self._config.keep_alive)
            if self._idle:
                await self._send(send, _COMMENT)
