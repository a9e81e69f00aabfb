"""How the two clients send requests: one generation, one question, one cancellation that nobody waits for."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Mapping
from typing import Any

from lorax_triton._base import CANCEL_TIMEOUT_S, DEFAULT_TIMEOUT_S, ClientBase, new_request_id
from lorax_triton._grpc_aio import running_loop
from lorax_triton._options import CallOptions
from lorax_triton._stream import AsyncTokenStream, TokenStream, finish, finish_async
from lorax_triton._tasks import TaskRequest, encode_task
from lorax_triton._transport import AsyncTransport, InferRequest, InferResponse, Transport
from lorax_triton._wire import decode_control
from lorax_triton.errors import LoraxError
from lorax_triton.types import Request


class Session(ClientBase):
    """Requests of the blocking client; any number of threads may use it at once."""

    _transport: Transport
    _cancelling: set[threading.Thread]

    def _open_stream(self, request: Request, call: CallOptions) -> TokenStream:
        encoded, decoder = self._encode(request, call.get("request_id"))
        limits = self._limits(call.get("timeout"), call.get("total_timeout"))
        source = self._transport.open_stream(encoded, limits.total)
        on_abandon = (
            (lambda: self._cancel_in_background(encoded.request_id)) if self._cancels_by_control else None
        )
        return TokenStream(source, decoder, encoded.request_id, limits.next_response, on_abandon)

    def _control(self, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        request = self._encode_control(command, arguments)
        return decode_control(self._ask(request), request.request_id)

    def _task(self, request: TaskRequest) -> tuple[InferResponse | None, str]:
        encoded = encode_task(request, self._bearer, self.model_name, new_request_id())
        return self._ask(encoded), encoded.request_id

    def _ask(self, request: InferRequest) -> InferResponse | None:
        """The one response to a request."""
        source = self._transport.open_stream(request, self.total_timeout)
        try:
            return source.receive(self.timeout)
        finally:
            finish(source)

    def _is_ready(self, timeout: float | None) -> bool:
        return self._transport.is_ready(self.model_name, timeout or self.timeout or DEFAULT_TIMEOUT_S)

    def _close(self) -> None:
        for thread in list(self._cancelling):
            thread.join()
        self._transport.close()

    def _cancel_in_background(self, request_id: str) -> None:
        # Streams are given up in destructors too, which must not wait for a server.
        thread = threading.Thread(target=self._cancel_quietly, args=(request_id,), name="lorax-client-cancel")
        self._cancelling.add(thread)
        thread.start()

    def _cancel_quietly(self, request_id: str) -> None:
        request = self._encode_control("cancel", {"request_id": request_id})
        with contextlib.suppress(LoraxError, RuntimeError):
            source = self._transport.open_stream(request, CANCEL_TIMEOUT_S)
            try:
                source.receive(CANCEL_TIMEOUT_S)
            finally:
                finish(source)
        self._cancelling.discard(threading.current_thread())


class AsyncSession(ClientBase):
    """Requests of the client for an event loop; any number of its tasks may use it at once."""

    _transport: AsyncTransport
    _cancelling: set[asyncio.Task[None]]
    _loop: asyncio.AbstractEventLoop | None

    def _open_stream(self, request: Request, call: CallOptions) -> AsyncTokenStream:
        encoded, decoder = self._encode(request, call.get("request_id"))
        limits = self._limits(call.get("timeout"), call.get("total_timeout"))
        source = self._transport.open_stream(encoded, limits.total)
        on_abandon = None
        if self._cancels_by_control:
            self._loop = asyncio.get_running_loop()
            on_abandon = functools.partial(self._cancel_in_background, encoded.request_id)
        return AsyncTokenStream(source, decoder, encoded.request_id, limits.next_response, on_abandon)

    async def _control(self, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        request = self._encode_control(command, arguments)
        return decode_control(await self._ask(request), request.request_id)

    async def _task(self, request: TaskRequest) -> tuple[InferResponse | None, str]:
        encoded = encode_task(request, self._bearer, self.model_name, new_request_id())
        return await self._ask(encoded), encoded.request_id

    async def _ask(self, request: InferRequest) -> InferResponse | None:
        """The one response to a request."""
        source = self._transport.open_stream(request, self.total_timeout)
        try:
            return await source.receive(self.timeout)
        finally:
            await finish_async(source)

    async def _is_ready(self, timeout: float | None) -> bool:
        return await self._transport.is_ready(self.model_name, timeout or self.timeout or DEFAULT_TIMEOUT_S)

    async def _close(self) -> None:
        if self._cancelling:
            await asyncio.gather(*self._cancelling)
        await self._transport.close()

    def _cancel_in_background(self, request_id: str) -> None:
        # Streams are given up in destructors and by other threads too.
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        if loop is running_loop():
            self._start_cancelling(request_id)
        else:
            loop.call_soon_threadsafe(self._start_cancelling, request_id)

    def _start_cancelling(self, request_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._cancel_quietly(request_id))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancel_quietly(self, request_id: str) -> None:
        request = self._encode_control("cancel", {"request_id": request_id})
        with contextlib.suppress(LoraxError, RuntimeError):
            source = self._transport.open_stream(request, CANCEL_TIMEOUT_S)
            try:
                await source.receive(CANCEL_TIMEOUT_S)
            finally:
                await finish_async(source)
