"""Transports without a network, for tests of programs that use the client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator

from lorax_triton._channel import cancelled_here
from lorax_triton._transport import InferRequest, InferResponse

# Plays the server: responses to a request; may raise LoraxError at any point, or return early.
Handler = Callable[[InferRequest], Iterable[InferResponse]]


class InMemoryTransport:
    """Answers requests with a function; give it to `Client(..., session=...)`.

    Attributes:
        requests: every request so far.
        cancelled: ids of requests whose stream was given up before its end.
    """

    def __init__(self, handler: Handler, ready: bool = True) -> None:
        self.requests: list[InferRequest] = []
        self.cancelled: set[str] = set()
        self.closed = False
        self._handler = handler
        self._ready = ready

    def open_stream(self, request: InferRequest, total_timeout: float | None) -> InMemoryStream:
        """Start to answer a request; `total_timeout` is not looked at."""
        self.requests.append(request)
        return InMemoryStream(self, request.request_id, iter(self._handler(request)))

    def is_ready(self, model_name: str, timeout: float) -> bool:
        """What `ready` said."""
        return self._ready

    def close(self) -> None:
        """Note that the client was closed."""
        self.closed = True


class InMemoryStream:
    """The responses to one request; time limits are not looked at."""

    def __init__(
        self, transport: InMemoryTransport, request_id: str, responses: Iterator[InferResponse]
    ) -> None:
        self._transport = transport
        self._request_id = request_id
        self._responses = responses
        self._cancelled = threading.Event()
        self._ended = False

    def receive(self, timeout: float | None) -> InferResponse | None:
        """The handler's next response, or None after its last."""
        if self._cancelled.is_set():
            raise cancelled_here(self._request_id)
        try:
            return next(self._responses)
        except StopIteration:
            self._ended = True
            return None

    def cancel(self) -> None:
        """Note that the stream was given up, unless it has ended."""
        if not self._ended:
            self._cancelled.set()
            self._transport.cancelled.add(self._request_id)


class AsyncInMemoryTransport:
    """`InMemoryTransport` for `AsyncClient`."""

    def __init__(self, handler: Handler, ready: bool = True) -> None:
        self._inner = InMemoryTransport(handler, ready)

    @property
    def requests(self) -> list[InferRequest]:
        """Every request so far."""
        return self._inner.requests

    @property
    def cancelled(self) -> set[str]:
        """Ids of requests whose stream was given up before its end."""
        return self._inner.cancelled

    def open_stream(self, request: InferRequest, total_timeout: float | None) -> AsyncInMemoryStream:
        """Start to answer a request; `total_timeout` is not looked at."""
        return AsyncInMemoryStream(self._inner.open_stream(request, total_timeout))

    async def is_ready(self, model_name: str, timeout: float) -> bool:
        """What `ready` said."""
        return self._inner.is_ready(model_name, timeout)

    async def close(self) -> None:
        """Note that the client was closed."""
        self._inner.close()


class AsyncInMemoryStream:
    """`InMemoryStream` for `AsyncClient`; gives other tasks a turn before each response."""

    def __init__(self, inner: InMemoryStream) -> None:
        self._inner = inner

    async def receive(self, timeout: float | None) -> InferResponse | None:
        """The handler's next response, or None after its last."""
        await asyncio.sleep(0)
        return self._inner.receive(timeout)

    def cancel(self) -> None:
        """Note that the stream was given up, unless it has ended."""
        self._inner.cancel()
