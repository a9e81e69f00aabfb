"""Streams of tokens: iterators that are also context managers, and that cancel on the server when given up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lorax_triton._channel import END_TIMEOUT_S
from lorax_triton._transport import AsyncResponseStream, ResponseStream
from lorax_triton._wire import ResponseDecoder
from lorax_triton.errors import LoraxError
from lorax_triton.types import Response, StreamResponse

_SHORTEST_WAIT_S = 0.001
# An event loop keeps no hold of its tasks itself.
_finishing: set[asyncio.Task[None]] = set()


def finish(source: ResponseStream) -> None:
    """After a request's last response: let its call end by itself, for a moment, so that the server does not take a
    finished request for a cancelled one."""
    deadline = time.monotonic() + END_TIMEOUT_S
    with contextlib.suppress(LoraxError):
        while source.receive(max(_SHORTEST_WAIT_S, deadline - time.monotonic())) is not None:
            pass
    source.cancel()


async def finish_async(source: AsyncResponseStream) -> None:
    """`finish` for an event loop."""
    deadline = time.monotonic() + END_TIMEOUT_S
    with contextlib.suppress(LoraxError):
        while await source.receive(max(_SHORTEST_WAIT_S, deadline - time.monotonic())) is not None:
            pass
    source.cancel()


def _finish_in_background(source: ResponseStream) -> None:
    try:
        threading.Thread(target=finish, args=(source,), name="lorax-client-finish", daemon=True).start()
    except RuntimeError:  # the interpreter shuts down
        source.cancel()


def _finish_in_background_async(source: AsyncResponseStream) -> None:
    try:
        task = asyncio.get_running_loop().create_task(finish_async(source))
    except RuntimeError:  # no event loop in this thread
        source.cancel()
    else:
        _finishing.add(task)
        task.add_done_callback(_finishing.discard)


class TokenStream:
    """Iterator over the tokens of one answer. One thread at a time iterates; any thread may call `cancel`.

    Leaving a `for` loop early, leaving a `with` block, `close()` and garbage collection all cancel the request on the
    server, which frees what it holds there.
    """

    def __init__(
        self,
        source: ResponseStream,
        decoder: ResponseDecoder,
        request_id: str,
        timeout: float | None,
        on_abandon: Callable[[], None] | None = None,
    ) -> None:
        self.request_id = request_id
        self._source = source
        self._decoder = decoder
        self._timeout = timeout
        self._on_abandon = on_abandon
        self._ready: deque[StreamResponse] = deque()
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamResponse:
        """The next token.

        Raises:
            RequestTimeoutError: it did not come within `timeout` seconds.
            LoraxError: any other failure; the stream is over.
        """
        while not self._ready:
            if self._closed:
                raise StopIteration
            if self._decoder.complete:
                self._end()
                raise StopIteration
            try:
                self._ready.extend(self._decoder.feed(self._source.receive(self._timeout)))
            except LoraxError as error:
                self._fail(error)
                raise
            except BaseException:
                self.close()
                raise
        return self._ready.popleft()

    def response(self) -> Response:
        """Read to the end and return the whole answer.

        Raises:
            LoraxError: as when iterating; IncompleteGenerationError if the stream was closed before its end.
        """
        for _ in self:
            pass
        return self._decoder.response()

    def cancel(self) -> None:
        """End the request here and on the server; a thread that waits for a token gets RequestCancelledError."""
        if self._closed:
            return
        self._closed = True
        if self._decoder.complete and not self._decoder.final:
            _finish_in_background(self._source)
            return
        self._source.cancel()
        if self._on_abandon is not None and not self._decoder.complete:
            self._on_abandon()

    def close(self) -> None:
        """Same as `cancel`; nothing happens to an answer that is complete."""
        self.cancel()

    def _end(self) -> None:
        if not self._closed:
            self._closed = True
            finish(self._source)

    def _fail(self, error: LoraxError) -> None:
        error.request_id = self.request_id
        if isinstance(error, TimeoutError | ConnectionError):
            self.cancel()
        else:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # An interpreter that shuts down may have taken gRPC apart already.
        with contextlib.suppress(Exception):
            self.cancel()


class AsyncTokenStream:
    """Asynchronous iterator over the tokens of one answer; see `TokenStream`. The request is sent with the first
    step of the iteration. `cancel` may be called from any thread."""

    def __init__(
        self,
        source: AsyncResponseStream,
        decoder: ResponseDecoder,
        request_id: str,
        timeout: float | None,
        on_abandon: Callable[[], None] | None = None,
    ) -> None:
        self.request_id = request_id
        self._source = source
        self._decoder = decoder
        self._timeout = timeout
        self._on_abandon = on_abandon
        self._ready: deque[StreamResponse] = deque()
        self._started = False
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamResponse:
        """The next token.

        Raises:
            RequestTimeoutError: it did not come within `timeout` seconds.
            LoraxError: any other failure; the stream is over.
        """
        while not self._ready:
            if self._closed:
                raise StopAsyncIteration
            if self._decoder.complete:
                await self._end()
                raise StopAsyncIteration
            self._started = True
            try:
                self._ready.extend(self._decoder.feed(await self._source.receive(self._timeout)))
            except LoraxError as error:
                await self._fail(error)
                raise
            except BaseException:
                self.cancel()
                raise
        return self._ready.popleft()

    async def response(self) -> Response:
        """Read to the end and return the whole answer.

        Raises:
            LoraxError: as when iterating; IncompleteGenerationError if the stream was closed before its end.
        """
        async for _ in self:
            pass
        return self._decoder.response()

    def cancel(self) -> None:
        """End the request here and on the server; a task that waits for a token gets RequestCancelledError."""
        if self._closed:
            return
        self._closed = True
        if self._decoder.complete and not self._decoder.final:
            _finish_in_background_async(self._source)
            return
        self._source.cancel()
        if self._on_abandon is not None and self._started and not self._decoder.complete:
            self._on_abandon()

    async def aclose(self) -> None:
        """Same as `cancel`; nothing happens to an answer that is complete."""
        self.cancel()

    async def _end(self) -> None:
        if not self._closed:
            self._closed = True
            await finish_async(self._source)

    async def _fail(self, error: LoraxError) -> None:
        error.request_id = self.request_id
        if isinstance(error, TimeoutError | ConnectionError):
            self.cancel()
        else:
            await self._end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        # An interpreter that shuts down, or a closed event loop, may have taken gRPC apart already.
        with contextlib.suppress(Exception):
            self.cancel()
