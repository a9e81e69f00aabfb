"""Sending answers: one live request's hand-over point, and the threads that send. Standard library only.

The engine's thread only appends a token to the request's pending list and wakes the request's sender. Each request is
pinned to one sender, which keeps its events in order; a sender takes everything pending at once, so that responses
grow larger under load and go out one by one when there is none. A first token goes before the tokens of others that
wait for the same sender: under load it would wait for several steps' worth of them, and costs them one response.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from lorax_backend.errors import LoraxError, error_from_dict
from lorax_backend.serving.answer import AnswerBuilder
from lorax_backend.types import GenerateRequest, GenerationEvent, TokenOutput

if TYPE_CHECKING:
    from lorax_backend.serving.sequences import SequenceGroup

logger = logging.getLogger(__name__)


class ResponseChannel(Protocol):
    """Where the events of one request go."""

    def send(self, event: GenerationEvent, request: GenerateRequest | None) -> None:
        """Send one event; `event.final` marks the last. `request` is None if the request could not be parsed.

        Called from one thread at a time, in order, and never again after the final event or after raising.
        """
        ...

    def is_cancelled(self) -> bool:
        """True once the caller has gone. Polled from one thread while the request lives."""
        ...


class LiveRequest:
    """One request from receipt to final event.

    Fields up to `error` are written by the thread that holds the request at the time: receipt, validation, then its
    sender. `pending` is appended to by the engine's thread and emptied by the sender. `queued` says that the sender
    has been woken: it is cleared before `pending` is emptied, so that no token is left behind.
    """

    __slots__ = (
        "builder", "channel", "ended", "error", "first_token_at", "group", "handle", "pending", "queue_s",
        "queued", "received_at", "request", "request_id", "sender", "validated_at", "wake_on_token",
    )  # fmt: skip

    def __init__(self, handle: int, request_id: str, channel: ResponseChannel, sender: Sender) -> None:
        self.handle = handle
        self.request_id = request_id
        self.channel = channel
        self.sender = sender
        self.request: GenerateRequest | None = None
        self.builder: AnswerBuilder | None = None
        self.group: SequenceGroup | None = None  # the other sequences of its request, if it has several
        self.received_at = time.monotonic()
        self.validated_at: float | None = None
        self.first_token_at: float | None = None
        self.queue_s = 0.0
        self.wake_on_token = False
        self.pending: deque[TokenOutput] = deque()
        self.error: dict[str, Any] | None = None
        self.queued = False
        self.ended = False

    def push(self, output: TokenOutput) -> None:
        """Hand over one output of the engine (engine's thread)."""
        if output.error is not None:
            self.fail_with(output.error)
            return
        first = self.first_token_at is None
        if first:
            self.first_token_at = time.monotonic()
            self.queue_s = output.queue_s or 0.0
        self.pending.append(output)
        # An answer that is sent whole and has no stop strings needs no attention before its end.
        if self.wake_on_token or output.finish_reason is not None:
            self.wake(first)

    def fail(self, error: LoraxError) -> None:
        """End the request with an error (any thread); the first error wins."""
        self.fail_with(error.to_dict())

    def fail_with(self, error: dict[str, Any]) -> None:
        if self.error is None:
            self.error = error
        self.wake()

    def failing(self) -> bool:
        """True once an error is on its way to the caller."""
        return self.error is not None

    def wake(self, ahead: bool = False) -> None:
        """Have the sender deliver, before all that wait if `ahead`."""
        if not self.queued:
            self.queued = True
            self.sender.put(self, ahead)

    def take(self) -> list[TokenOutput]:
        """Everything pending (sender's thread)."""
        self.queued = False
        outputs = []
        while self.pending:
            outputs.append(self.pending.popleft())
        return outputs

    def timings(self, now: float) -> dict[str, float]:
        """Seconds: validation, queue, first_token and total from receipt, inference from first scheduling."""
        validated = self.validated_at or now
        first = self.first_token_at or now
        return {
            "validation": validated - self.received_at,
            "queue": self.queue_s,
            "first_token": first - self.received_at,
            "inference": max(0.0, now - validated - self.queue_s),
            "total": now - self.received_at,
        }


class Sender:
    """A thread that calls `deliver` for every request woken, in order of waking, those that were put ahead first.

    `deliver` must not raise; if it does all the same, `on_crash` is told and the thread goes on, so that the errors
    that follow from it still reach their clients.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[LiveRequest], None],
        on_crash: Callable[[str, BaseException], None],
    ) -> None:
        self._woken: deque[LiveRequest] = deque()
        self._ahead: deque[LiveRequest] = deque()
        # An entry for each request in the two, after which it is there, and None to end.
        self._queue: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        self._deliver = deliver
        self._on_crash = on_crash
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, live: LiveRequest, ahead: bool = False) -> None:
        (self._ahead if ahead else self._woken).append(live)
        self._queue.put(ahead)

    def stop(self, timeout: float) -> None:
        """Send what is queued, then end."""
        self._queue.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            if self._queue.get() is None:
                return
            live = self._ahead.popleft() if self._ahead else self._woken.popleft()
            try:
                self._deliver(live)
            except BaseException as error:
                self._on_crash(self._thread.name, error)


class _QueueChannel:
    """A channel whose events one consumer in this process reads."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[GenerationEvent] = queue.SimpleQueue()
        self.cancelled = False

    def send(self, event: GenerationEvent, request: GenerateRequest | None) -> None:
        self.events.put(event)

    def is_cancelled(self) -> bool:
        return self.cancelled


class EventStream:
    """Iterator over the events of one request, for use as a library. Closing it early cancels the request.

    Also a context manager. `channel` is what the service sends to.
    """

    def __init__(self, on_close: Callable[[], None]) -> None:
        self.channel = _QueueChannel()
        self._on_close = on_close
        self._finished = False

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> GenerationEvent:
        if self._finished:
            raise StopIteration
        event = self.channel.events.get()
        self._finished = event.final
        if event.error is not None:
            raise error_from_dict(event.error)
        return event

    def close(self) -> None:
        """Cancel the request unless it is over."""
        if not self._finished:
            self._finished = True
            self.channel.cancelled = True
            self._on_close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
