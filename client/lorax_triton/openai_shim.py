"""The official `openai` package over Triton's gRPC, without an HTTP server in between.

    from lorax_triton import OpenAI

    client = OpenAI(base_url="localhost:8001")
    client.chat.completions.create(model="some/adapter", messages=[...], stream=True)

Types, streams, retries, timeouts and `with_raw_response` are the package's own; only its HTTP transport is replaced,
by one that answers in this process (`lorax_triton.openai_api`). Needs `pip install lorax-triton[openai]`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

import openai

from lorax_triton._channel import Tls
from lorax_triton.aio import AsyncClient
from lorax_triton.errors import RequestTimeoutError, ServerConnectionError
from lorax_triton.openai_api import Answer, ClientBackend, handle

_T = TypeVar("_T")

DEFAULT_ADDRESS = "localhost:8001"
# What the package is told to connect to; nobody does.
_URL = "http://triton-grpc/v1"
# A key of OpenAI's is none of this server's business, which takes keys for tokens of adapters' owners.
_NO_KEY = "EMPTY"
_CLOSE_TIMEOUT_S = 5.0


def _http_library() -> Any:
    """The library the package sends with: httpx2 in newer versions, httpx in older ones."""
    base = importlib.import_module("openai._base_client")
    return getattr(base, "httpx2", None) or base.httpx


_httpx: Any = _http_library()


class OpenAI(openai.OpenAI):
    """`openai.OpenAI` for a lorax-triton server.

    Args:
        base_url: gRPC address of tritonserver: "host:8001", or "grpcs://host:8001" for TLS.
        api_key: token for private adapters, if any.
        tls: certificates, where they are not the system's.
        options: those of `openai.OpenAI`.
    """

    def __init__(
        self,
        base_url: Any = DEFAULT_ADDRESS,
        *,
        api_key: Any = None,
        tls: Tls | bool | None = None,
        http_client: Any = None,
        **options: Any,
    ) -> None:
        if http_client is None:  # copies of a client share the original's
            http_client = _httpx.Client(transport=OpenAITransport(str(base_url), tls))
            base_url = _URL
        super().__init__(api_key=api_key or _NO_KEY, base_url=base_url, http_client=http_client, **options)


class AsyncOpenAI(openai.AsyncOpenAI):
    """`openai.AsyncOpenAI` for a lorax-triton server. Arguments are those of `OpenAI`."""

    def __init__(
        self,
        base_url: Any = DEFAULT_ADDRESS,
        *,
        api_key: Any = None,
        tls: Tls | bool | None = None,
        http_client: Any = None,
        **options: Any,
    ) -> None:
        if http_client is None:
            http_client = _httpx.AsyncClient(transport=AsyncOpenAITransport(str(base_url), tls))
            base_url = _URL
        super().__init__(api_key=api_key or _NO_KEY, base_url=base_url, http_client=http_client, **options)


class AsyncOpenAITransport(_httpx.AsyncBaseTransport):  # type: ignore[misc] # of either library
    """Answers HTTP requests to OpenAI's API over gRPC. Each event loop that uses it gets a connection of its own."""

    def __init__(self, address: str, tls: Tls | bool | None = None) -> None:
        self._target = (address, tls)
        self._spare: AsyncClient | None = _connect(
            address, tls
        )  # an address that cannot be read is refused here
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    async def handle_async_request(self, request: Any) -> Any:
        """Answer one request."""
        body = await request.aread()
        limit = _read_timeout(request)
        try:
            async with asyncio.timeout(limit):
                answer = await _handle(request, body, self._backend())
        except TimeoutError as error:
            raise _timed_out(request, limit) from error
        if isinstance(answer.body, bytes):
            return _response(request, answer, content=answer.body)
        return _response(request, answer, stream=_AsyncEvents(answer.body, request, limit))

    async def aclose(self) -> None:
        """Close the connection of this event loop; its open streams are cancelled."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

    def _backend(self) -> ClientBackend:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client, self._spare = self._spare or _connect(*self._target), None
            self._clients[loop] = client
        return ClientBackend(client)


class OpenAITransport(_httpx.BaseTransport):  # type: ignore[misc] # of either library
    """`AsyncOpenAITransport` for callers without an event loop: one runs on a thread of its own."""

    def __init__(self, address: str, tls: Tls | bool | None = None) -> None:
        self._client = _connect(address, tls)
        self._backend = ClientBackend(self._client)
        self._thread = _LoopThread()
        weakref.finalize(self, self._thread.stop)

    def handle_request(self, request: Any) -> Any:
        """Answer one request."""
        limit = _read_timeout(request)
        try:
            answer = self._thread.run(_handle(request, request.read(), self._backend), limit)
        except TimeoutError as error:
            raise _timed_out(request, limit) from error
        if isinstance(answer.body, bytes):
            return _response(request, answer, content=answer.body)
        return _response(request, answer, stream=_Events(answer.body, request, limit, self._thread))

    def close(self) -> None:
        """Close the connection and end the thread; open streams are cancelled."""
        if self._thread.started:
            self._thread.run(self._client.close(), _CLOSE_TIMEOUT_S)
        self._thread.stop()


class _AsyncEvents(_httpx.AsyncByteStream):  # type: ignore[misc] # of either library
    """The body of a streamed answer."""

    def __init__(self, events: AsyncIterator[bytes], request: Any, limit: float | None) -> None:
        self._events = events
        self._request = request
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(self._limit):
                    event = await anext(self._events)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise _timed_out(self._request, self._limit) from error
            yield event

    async def aclose(self) -> None:
        await self._events.aclose()  # type: ignore[attr-defined] # see `Answer`


class _Events(_httpx.SyncByteStream):  # type: ignore[misc] # of either library
    """`_AsyncEvents` for callers without an event loop."""

    def __init__(
        self, events: AsyncIterator[bytes], request: Any, limit: float | None, thread: _LoopThread
    ) -> None:
        self._events = events
        self._request = request
        self._limit = limit
        self._thread = thread

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                event = self._thread.run(_next_or_none(self._events), self._limit)
            except TimeoutError as error:
                raise _timed_out(self._request, self._limit) from error
            if event is None:
                return
            yield event

    def close(self) -> None:
        if self._thread.running:
            self._thread.run(self._events.aclose(), _CLOSE_TIMEOUT_S)  # type: ignore[attr-defined]


class _LoopThread:
    """An event loop on a thread of its own, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False

    @property
    def started(self) -> bool:
        return self._loop is not None

    @property
    def running(self) -> bool:
        return self._loop is not None and not self._stopped

    def run(self, work: Coroutine[Any, Any, _T], timeout: float | None) -> _T:
        """Run a coroutine on the loop and wait for it.

        Raises:
            TimeoutError: it took more than `timeout` seconds, and was cancelled.
        """
        try:
            loop = self._running_loop()
        except RuntimeError:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError from None
        except BaseException:  # such as KeyboardInterrupt in this thread
            future.cancel()
            raise

    def stop(self) -> None:
        """End the thread; nothing more can be run."""
        with self._lock:
            if self._loop is not None and not self._stopped:
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._stopped = True

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._stopped:
                raise RuntimeError("This client is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                name = "lorax-triton-openai"
                threading.Thread(target=_serve, args=(self._loop,), name=name, daemon=True).start()
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _connect(address: str, tls: Tls | bool | None) -> AsyncClient:
    """A client without time limits and retries of its own, since the package has both."""
    return AsyncClient(address, timeout=None, max_session_retries=0, tls=tls)


async def _handle(request: Any, body: bytes, backend: ClientBackend) -> Answer:
    """Answer a request; failures to reach the server are raised as the package knows them from HTTP."""
    headers: Mapping[str, str] = request.headers
    answer = await handle(
        request.method, request.url.raw_path.partition(b"?")[0].decode(), headers, body, backend
    )
    if isinstance(answer.cause, ServerConnectionError):
        raise _httpx.ConnectError(str(answer.cause), request=request) from answer.cause
    if isinstance(answer.cause, RequestTimeoutError):
        raise _httpx.ReadTimeout(str(answer.cause), request=request) from answer.cause
    given = headers.get("x-request-id")
    if given:
        answer.headers["x-request-id"] = given  # as the gateway does
    return answer


async def _next_or_none(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)


def _read_timeout(request: Any) -> float | None:
    """Longest wait for the answer's beginning and for each part of it, in seconds."""
    limit = request.extensions.get("timeout", {}).get("read")
    return None if limit is None else float(limit)


def _timed_out(request: Any, limit: float | None) -> Exception:
    error: Exception = _httpx.ReadTimeout(f"Nothing came within {limit} seconds", request=request)
    return error


def _response(request: Any, answer: Answer, **body: Any) -> Any:
    return _httpx.Response(answer.status, headers=answer.headers, request=request, **body)
