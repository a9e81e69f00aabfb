"""The gRPC transport for an event loop: every request is a stream of its own, all streams share one channel."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from lorax_triton._channel import (
    CLOSE_TIMEOUT_S,
    ChannelConfig,
    cancelled_here,
    connection_lost,
    error_of_call,
    open_channel,
    retry_pause,
    server_methods,
    wait_expired,
)
from lorax_triton._protobuf import decode_stream_response, encode_infer_request, is_final
from lorax_triton._transport import InferRequest, InferResponse
from lorax_triton.errors import RequestTimeoutError

logger = logging.getLogger("lorax_triton")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread, or None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _AsyncChannel:
    """A gRPC channel and the number of streams that use it."""

    def __init__(self, config: ChannelConfig) -> None:
        self.grpc = open_channel(grpc.aio, config)
        self.infer, self.model_ready = server_methods(self.grpc)
        self.users = 0
        self.retired = False


class AsyncGrpcTransport:
    """Carries requests over gRPC within one event loop, the one it is first used in."""

    def __init__(self, config: ChannelConfig) -> None:
        self.config = config
        self._channels: set[_AsyncChannel] = set()
        self._current: _AsyncChannel | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        # Calls whose last response has come, but not yet the end that the server puts after it.
        self._ending: dict[Any, asyncio.Future[None]] = {}

    def open_stream(self, request: InferRequest, total_timeout: float | None) -> AsyncGrpcStream:
        """Prepare a request; it is sent with the first `receive`.

        Raises:
            RuntimeError: the transport is closed.
            ValidationError: an input does not fit its datatype.
        """
        if self._closed:
            raise RuntimeError("This client is closed")
        return AsyncGrpcStream(self, request, total_timeout)

    async def is_ready(self, model_name: str, timeout: float) -> bool:
        """True if the server says within `timeout` seconds that it serves the model."""
        channel = self.acquire()
        request = service_pb2.ModelReadyRequest(name=model_name)
        try:
            answer = await channel.model_ready(request, timeout=timeout, metadata=self.config.metadata)
            return bool(answer.ready)
        except grpc.aio.AioRpcError as error:
            logger.debug("model %s is not ready: %s", model_name, error.details())
            if connection_lost(error.code().name, error.details() or ""):
                self.retire(channel)
            return False
        finally:
            self.release(channel)

    async def close(self) -> None:
        """Close every channel; open streams are cancelled."""
        self._closed = True
        if self._ending:
            await asyncio.wait(self._ending.values(), timeout=CLOSE_TIMEOUT_S)
        channels, self._channels = self._channels, set()
        for channel in channels:
            await channel.grpc.close()
        if self._closing:
            await asyncio.gather(*self._closing)

    def acquire(self) -> _AsyncChannel:
        """The channel for a new call; give it back with `release`."""
        if self._closed:
            raise RuntimeError("This client is closed")
        if self._current is None:
            self._current = _AsyncChannel(self.config)
            self._channels.add(self._current)
        self._current.users += 1
        return self._current

    def retire(self, channel: _AsyncChannel) -> None:
        """Let new calls use another channel; this one closes when its last stream ends."""
        channel.retired = True
        if self._current is channel:
            self._current = None

    def release(self, channel: _AsyncChannel) -> None:
        """Undo one `acquire`."""
        channel.users -= 1
        if channel.retired and channel.users == 0 and channel in self._channels:
            self._channels.remove(channel)
            task = asyncio.get_running_loop().create_task(channel.grpc.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def let_end(self, channel: _AsyncChannel, call: Any) -> None:
        """Keep a call until the server ends it, which is due; then give its channel back. See `GrpcTransport`."""
        ended = asyncio.get_running_loop().create_future()
        self._ending[call] = ended

        def over(_: Any) -> None:
            del self._ending[call]
            if not ended.done():
                ended.set_result(None)
            self.release(channel)

        call.add_done_callback(over)


class AsyncGrpcStream:
    """The responses to one request. Owns one gRPC call at a time."""

    def __init__(
        self, transport: AsyncGrpcTransport, request: InferRequest, total_timeout: float | None
    ) -> None:
        self._transport = transport
        self._request_id = request.request_id
        self._message = encode_infer_request(request)
        logger.debug(
            "request %s to %s: %s", request.request_id, request.model_name, ", ".join(request.inputs)
        )
        self._total_timeout = total_timeout
        self._deadline: float | None = None
        self._retries_left = transport.config.max_session_retries
        self._attempt = 0
        self._started = False  # True once a response came
        self._final = False  # True once the last response came
        self._ended = False
        self._cancelled = False
        self._channel: _AsyncChannel | None = None
        self._call: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def receive(self, timeout: float | None) -> InferResponse | None:
        """See `ResponseStream.receive`."""
        try:
            async with asyncio.timeout(timeout):
                return await self._receive()
        except RequestTimeoutError:
            raise
        except TimeoutError:
            self._finish()
            raise wait_expired(timeout, self._request_id) from None
        except asyncio.CancelledError:
            self._finish()
            raise

    async def _receive(self) -> InferResponse | None:
        while True:
            if self._cancelled:
                raise cancelled_here(self._request_id)
            if self._ended:
                return None
            if self._final:
                self._finish()
                return None
            if self._call is None:
                self._open()
            try:
                message = await self._call.read()
            except grpc.aio.AioRpcError as error:
                await self._recover(error.code().name, error.details() or "")
                continue
            except asyncio.CancelledError:
                if self._cancelled:
                    raise cancelled_here(self._request_id) from None
                raise
            if message is grpc.aio.EOF:
                self._finish()
                return None
            self._started = True
            self._final = is_final(message)
            return decode_stream_response(message)

    def cancel(self) -> None:
        """See `ResponseStream.cancel`. May be called from any thread."""
        self._cancelled = True
        if self._loop is None or self._loop is running_loop():
            self._finish()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._finish)

    def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._total_timeout is not None and self._deadline is None:
            self._deadline = time.monotonic() + self._total_timeout
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        self._channel = self._transport.acquire()
        self._call = self._channel.infer(
            self._message, timeout=left, metadata=self._transport.config.metadata
        )

    async def _recover(self, code: str, details: str) -> None:
        """After a failed call: get ready for another one if that can help and no response was lost, else raise."""
        lost = connection_lost(code, details)
        if lost and self._channel is not None:
            self._transport.retire(self._channel)
        self._release()
        if self._cancelled:
            raise cancelled_here(self._request_id)
        if self._started or self._retries_left == 0 or not lost:
            self._ended = True
            raise error_of_call(code, details, self._transport.config, self._request_id) from None
        pause = retry_pause(self._attempt)
        logger.debug("request %s: %s; trying again in %s s", self._request_id, details, pause)
        self._retries_left -= 1
        self._attempt += 1
        await asyncio.sleep(pause)

    def _finish(self) -> None:
        self._ended = True
        self._release()

    def _release(self) -> None:
        """Give up the call, cancelling it unless it has ended or is about to."""
        call, self._call = self._call, None
        channel, self._channel = self._channel, None
        if call is None or channel is None:
            return
        if self._final and running_loop() is not None:
            self._transport.let_end(channel, call)
        else:
            call.cancel()
            self._transport.release(channel)
