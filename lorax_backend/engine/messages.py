"""Messages between the two processes of an engine: pickled tuples over a pipe, each behind its length.

Not `multiprocessing.Connection`: its pickler looks up a table written in Python for every object, and it must wait for
all of a message of which it has read the beginning. Here a reader takes what is there, so the engine's own thread can
read between two steps, with no thread beside it that wakes it and competes for its interpreter lock.
"""

from __future__ import annotations

import os
import pickle
import select
import struct
import threading
from dataclasses import fields
from operator import attrgetter
from typing import Any

from lorax_backend.types import AdapterRef, EngineRequest, SamplingParams

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 16  # bytes a read asks for, about as many as a pipe gives at once

PackedRequest = tuple[Any, ...]


def _values_of(kind: type[Any], *but: str) -> attrgetter[tuple[Any, ...]]:
    return attrgetter(*(field.name for field in fields(kind) if field.name not in but))


_sampling_values = _values_of(SamplingParams)
_adapter_values = _values_of(AdapterRef)
# Everything of a request but its first four fields, which `pack_request` names.
_other_values = _values_of(EngineRequest, "handle", "prompt_ids", "sampling", "adapter")


def pack_request(request: EngineRequest) -> PackedRequest:
    """A request as plain data: to pickle its dataclasses takes both sides several times as long."""
    adapter = None if request.adapter is None else _adapter_values(request.adapter)
    sampling = _sampling_values(request.sampling)
    return request.handle, request.prompt_ids, sampling, adapter, *_other_values(request)


def unpack_request(packed: PackedRequest) -> EngineRequest:
    """The inverse of `pack_request`."""
    handle, prompt_ids, sampling, adapter, *others = packed
    ref = None if adapter is None else AdapterRef(*adapter)
    return EngineRequest(handle, prompt_ids, SamplingParams(*sampling), ref, *others)


class MessageWriter:
    """Owns the writing end of a pipe. Any thread may send; messages are whole and in order."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._closed = False

    def send(self, message: Any) -> None:
        """Write a message; waits while the pipe is full.

        Raises:
            OSError: nobody reads any more (BrokenPipeError), or this end is closed.
        """
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._write(_LENGTH.pack(len(data)) + data)

    def send_unless_full(self, message: Any, timeout_s: float) -> None:
        """Like `send`, but if others write for as long as `timeout_s`, or the pipe is full, nothing is sent."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        if self._lock.acquire(timeout=timeout_s):
            try:
                if not self._closed and _is_ready(self._descriptor, select.POLLOUT, 0):
                    self._write(_LENGTH.pack(len(data)) + data)
            finally:
                self._lock.release()

    def close(self) -> None:
        """Close the descriptor; may be called again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._descriptor)

    def _write(self, data: bytes) -> None:
        if self._closed:
            raise BrokenPipeError("the pipe has been closed")
        # One call as a rule, so that no other thread's turn comes between the parts of a message.
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]


class MessageReader:
    """Owns the reading end of a pipe. Used from one thread at a time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = bytearray()
        self._ended = False
        os.set_blocking(descriptor, False)

    def fileno(self) -> int:
        """Readable when there is something to take, the end included."""
        return self._descriptor

    def take(self) -> list[Any]:
        """All messages that are there, without waiting for any.

        Raises:
            EOFError: the pipe has ended, and every whole message in it has been taken.
        """
        self._fill()
        messages: list[Any] = []
        while (message := self._next()) is not None:
            messages.append(pickle.loads(message))
        if self._ended and not messages:
            raise EOFError
        return messages

    def receive(self) -> Any:
        """Wait for the next message.

        Raises:
            EOFError: the pipe has ended.
        """
        while (message := self._next()) is None:
            if self._ended:
                raise EOFError
            _is_ready(self._descriptor, select.POLLIN, None)
            self._fill()
        return pickle.loads(message)

    def close(self) -> None:
        os.close(self._descriptor)

    def _fill(self) -> None:
        while not self._ended:
            try:
                data = os.read(self._descriptor, _CHUNK)
            except BlockingIOError:
                return
            self._buffer += data
            self._ended = not data
            if len(data) < _CHUNK:  # the rest, if there is more, is worth a look of its own
                return

    def _next(self) -> bytes | None:
        """Cut the first message off the buffer, if all of it is there."""
        if len(self._buffer) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
        if len(self._buffer) < end:
            return None
        message = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return message


def _is_ready(descriptor: int, event: int, timeout_ms: float | None) -> bool:
    poll = select.poll()  # not select.select, which fails for descriptors from 1024 on
    poll.register(descriptor, event)
    return bool(poll.poll(timeout_ms))
