"""The blocking gRPC transport: every request is a stream of its own, all streams share one channel."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import grpc
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
from lorax_triton._watchdog import Watchdog

logger = logging.getLogger("lorax_triton")


class _Channel:
    """A gRPC channel and the number of streams that use it."""

    def __init__(self, config: ChannelConfig) -> None:
        self.grpc = open_channel(grpc, config)
        self.infer, self.model_ready = server_methods(self.grpc)
        self.users = 0
        self.retired = False


class GrpcTransport:
    """Carries requests over gRPC. Owns the channel; any thread may use it."""

    def __init__(self, config: ChannelConfig) -> None:
        self.config = config
        self.watchdog = Watchdog()
        # Reentrant: a stream may be garbage collected, and then release its channel, while this thread holds it.
        self._lock = threading.RLock()
        self._channels: set[_Channel] = set()
        self._current: _Channel | None = None
        self._closed = False
        # Calls whose last response has come, but not yet the end that the server puts after it.
        self._ending: set[Any] = set()
        self._ended = threading.Condition(self._lock)

    def open_stream(self, request: InferRequest, total_timeout: float | None) -> GrpcStream:
        """Send a request; returns at once.

        Raises:
            RuntimeError: the transport is closed.
            ValidationError: an input does not fit its datatype.
        """
        return GrpcStream(self, request, total_timeout)

    def is_ready(self, model_name: str, timeout: float) -> bool:
        """True if the server says within `timeout` seconds that it serves the model."""
        channel = self.acquire()
        request = service_pb2.ModelReadyRequest(name=model_name)
        try:
            return bool(channel.model_ready(request, timeout=timeout, metadata=self.config.metadata).ready)
        except grpc.RpcError as error:
            logger.debug("model %s is not ready: %s", model_name, error)
            if connection_lost(error.code().name, error.details() or ""):
                self.retire(channel)
            return False
        finally:
            self.release(channel)

    def close(self) -> None:
        """Close every channel; open streams are cancelled."""
        with self._lock:
            self._closed = True
            self._ended.wait_for(lambda: not self._ending, CLOSE_TIMEOUT_S)
            channels, self._channels = self._channels, set()
        for channel in channels:
            channel.grpc.close()

    def acquire(self) -> _Channel:
        """The channel for a new call; give it back with `release`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("This client is closed")
            if self._current is None:
                self._current = _Channel(self.config)
                self._channels.add(self._current)
            self._current.users += 1
            return self._current

    def retire(self, channel: _Channel) -> None:
        """Let new calls use another channel; this one closes when its last stream ends."""
        with self._lock:
            channel.retired = True
            if self._current is channel:
                self._current = None

    def release(self, channel: _Channel) -> None:
        """Undo one `acquire`."""
        with self._lock:
            channel.users -= 1
            over = channel.retired and channel.users == 0 and channel in self._channels
            if over:
                self._channels.remove(channel)
        if over:
            # Closing waits for gRPC's own threads, and a garbage collection may run this on one of them.
            threading.Thread(target=channel.grpc.close, name="lorax-client-close", daemon=True).start()

    def let_end(self, channel: _Channel, call: Any) -> None:
        """Keep a call until the server ends it, which is due; then give its channel back.

        Triton 24.10 never forgets a request whose client cancels between the last response and the end.
        """

        def over() -> None:
            with self._lock:
                self._ending.discard(call)
                self._ended.notify_all()
            self.release(channel)

        with self._lock:
            self._ending.add(call)
        if not call.add_callback(over):
            over()


class GrpcStream:
    """The responses to one request. Owns one gRPC call at a time."""

    def __init__(self, transport: GrpcTransport, request: InferRequest, total_timeout: float | None) -> None:
        self._transport = transport
        self._request_id = request.request_id
        self._message = encode_infer_request(request)
        logger.debug(
            "request %s to %s: %s", request.request_id, request.model_name, ", ".join(request.inputs)
        )
        self._deadline = None if total_timeout is None else time.monotonic() + total_timeout
        self._retries_left = transport.config.max_session_retries
        self._attempt = 0
        self._started = False  # True once a response came
        self._final = False  # True once the last response came
        self._expired = False  # True once a wait was too long
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._channel: _Channel | None = None
        self._call: Any = None
        self._open()

    def receive(self, timeout: float | None) -> InferResponse | None:
        """See `ResponseStream.receive`."""
        limit = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._cancelled.is_set():
                raise cancelled_here(self._request_id)
            call = self._call
            if call is None:
                return None
            if self._final:
                self._finish()
                return None
            left = None if limit is None else max(0.0, limit - time.monotonic())
            try:
                message = self._next(call, left)
            except StopIteration:
                self._finish()
                return None
            except grpc.RpcError as error:
                if self._expired:
                    self._finish()
                    raise wait_expired(timeout, self._request_id) from None
                self._recover(error.code().name, error.details() or "", limit)
            else:
                self._started = True
                self._final = is_final(message)
                return decode_stream_response(message)

    def cancel(self) -> None:
        """See `ResponseStream.cancel`."""
        self._cancelled.set()
        self._finish()

    def _next(self, call: Any, timeout: float | None) -> Any:
        if timeout is None:
            return next(call)
        wait_id = self._transport.watchdog.arm(timeout, call.cancel)
        try:
            return next(call)
        finally:
            # A message may have come just before the cancellation; then the next wait fails and must say why.
            self._expired |= not self._transport.watchdog.disarm(wait_id)

    def _open(self) -> None:
        channel = self._transport.acquire()
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            call = channel.infer(self._message, timeout=left, metadata=self._transport.config.metadata)
        except BaseException:
            self._transport.release(channel)
            raise
        with self._lock:
            self._channel, self._call = channel, call
        if self._cancelled.is_set():
            self._finish()

    def _recover(self, code: str, details: str, limit: float | None) -> None:
        """After a failed call: open another one if that can help and no response was lost, else raise."""
        broken = self._channel
        if connection_lost(code, details) and broken is not None:
            self._transport.retire(broken)
        self._finish()
        if self._cancelled.is_set():
            raise cancelled_here(self._request_id)
        pause = retry_pause(self._attempt)
        in_time = limit is None or time.monotonic() + pause < limit
        if self._started or self._retries_left == 0 or not in_time or not connection_lost(code, details):
            raise error_of_call(code, details, self._transport.config, self._request_id) from None
        logger.debug("request %s: %s; trying again in %s s", self._request_id, details, pause)
        self._retries_left -= 1
        self._attempt += 1
        if not self._cancelled.wait(pause):
            self._open()

    def _finish(self) -> None:
        """Give up the call, cancelling it unless it has ended or is about to."""
        with self._lock:
            channel, self._channel = self._channel, None
            call, self._call = self._call, None
        if call is None or channel is None:
            return
        if self._final:
            self._transport.let_end(channel, call)
        else:
            call.cancel()
            self._transport.release(channel)
