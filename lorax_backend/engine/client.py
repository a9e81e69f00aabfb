"""What every engine client does alike: one life, answers to control commands, and at most one death notice."""

from __future__ import annotations

import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from lorax_backend.engine.core import EngineCore
from lorax_backend.engine.protocols import EngineEvents
from lorax_backend.errors import EngineDeadError, LoraxError
from lorax_backend.types import EngineInfo, EngineRequest, EngineStats, TokenOutput

_log = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """What a builder makes: a core that is ready to step, and the facts about it."""

    core: EngineCore
    info: EngineInfo


Builder = Callable[[Progress], BuiltEngine]


class EngineSink(Protocol):
    """Where an engine loop puts what comes out of its core. Called from the loop's thread."""

    def on_outputs(self, outputs: list[TokenOutput]) -> None: ...

    def on_stats(self, stats: EngineStats) -> None: ...

    def on_reply(self, ticket: int, reply: dict[str, Any] | LoraxError) -> None:
        """The answer to the control command of that ticket, or why there is none."""
        ...


class EngineInbox(Protocol):
    """Where an engine client puts what is for the core: a loop of this process, or a pipe to another."""

    def submit(self, request: EngineRequest) -> None: ...

    def cancel(self, handle: int) -> None: ...

    def control(self, ticket: int, command: str, arguments: dict[str, Any]) -> None: ...


class _Life(Enum):
    NEW = "has not been started"
    STARTING = "is starting"
    READY = "is ready"
    OVER = "is gone"


class EngineClientBase(ABC):
    """Implements `EngineClient` but for how the core is started, reached and stopped. Any thread may call it.

    Owns the life of the engine: new, starting, ready, over. Outputs reach the owner while it is ready; `on_dead` comes
    when it ends by itself, never after `stop`.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._life = _Life.NEW
        self._death_reason = "it was stopped"
        self._events: EngineEvents | None = None
        self._info: EngineInfo | None = None
        self._inbox: EngineInbox | None = None
        self._replies: dict[int, Future[dict[str, Any]]] = {}
        self._tickets = itertools.count()
        self._lock = threading.Lock()

    @property
    def info(self) -> EngineInfo:
        """Raises RuntimeError before `start` has returned."""
        if self._info is None:
            raise RuntimeError(f"the engine {self._life.value}: it has no info yet")
        return self._info

    @property
    def alive(self) -> bool:
        return self._life is _Life.READY

    def start(self, events: EngineEvents) -> None:
        with self._lock:
            if self._life is not _Life.NEW:
                raise RuntimeError(f"the engine {self._life.value}: it can be started once only")
            self._life = _Life.STARTING
        self._events = events
        started: Future[tuple[EngineInbox, EngineInfo]] = Future()
        self._launch(started)
        try:
            started.result()
        except BaseException:
            with self._lock:
                self._life = _Life.OVER
            self._shut_down(5.0)
            raise
        if not self.alive:
            self._shut_down(5.0)
            raise RuntimeError(f"the engine is gone: {self._death_reason}")

    def submit(self, request: EngineRequest) -> None:
        self._open_inbox().submit(request)

    def cancel(self, handle: int) -> None:
        inbox = self._inbox
        if self.alive and inbox is not None:
            with suppress(EngineDeadError):
                inbox.cancel(handle)

    def control(self, command: str, arguments: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
        ticket, reply = next(self._tickets), Future[dict[str, Any]]()
        with self._lock:
            self._replies[ticket] = reply
        try:
            self._open_inbox().control(ticket, command, arguments)
            return reply.result(timeout)
        except FutureTimeoutError:
            raise EngineDeadError(f"the engine did not answer {command!r} within {timeout:g} s") from None
        finally:
            with self._lock:
                self._replies.pop(ticket, None)

    def stop(self, timeout: float = 5.0) -> None:
        self._end(None)
        self._shut_down(timeout)

    @abstractmethod
    def _launch(self, started: Future[tuple[EngineInbox, EngineInfo]]) -> None:
        """Begin to load; `started` gets the way to the core through `_ready`, or the RuntimeError of `start`."""

    @abstractmethod
    def _shut_down(self, timeout: float) -> None:
        """Stop what `_launch` started; may be called again and when there is nothing to stop."""

    def _ready(
        self, started: Future[tuple[EngineInbox, EngineInfo]], inbox: EngineInbox, info: EngineInfo
    ) -> None:
        """The core is ready: let `start` return."""
        with self._lock:
            if self._life is _Life.STARTING:
                self._inbox, self._info, self._life = inbox, info, _Life.READY
        started.set_result((inbox, info))

    def _report_progress(self, text: str) -> None:
        if self._progress is not None:
            try:
                self._progress(text)
            except Exception:
                _log.exception("the progress callback failed")

    # EngineSink

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        if self.alive and self._events is not None:
            self._events.on_outputs(outputs)

    def on_stats(self, stats: EngineStats) -> None:
        if self.alive and self._events is not None:
            self._events.on_stats(stats)

    def on_reply(self, ticket: int, reply: dict[str, Any] | LoraxError) -> None:
        with self._lock:
            waiting = self._replies.pop(ticket, None)
        if waiting is None:
            return
        if isinstance(reply, LoraxError):
            waiting.set_exception(reply)
        else:
            waiting.set_result(reply)

    def _open_inbox(self) -> EngineInbox:
        inbox = self._inbox
        if not self.alive or inbox is None:
            reason = f": {self._death_reason}" if self._life is _Life.OVER else ""
            raise EngineDeadError(f"the engine {self._life.value}{reason}")
        return inbox

    def _end(self, reason: str | None) -> None:
        """The life is over: by `stop` if `reason` is None, otherwise by itself, which the owner is told."""
        with self._lock:
            was_ready = self._life is _Life.READY
            self._life = _Life.OVER
            if not was_ready:
                return
            if reason is not None:
                self._death_reason = reason
            waiting = list(self._replies.values())
            self._replies.clear()
        for reply in waiting:
            reply.set_exception(EngineDeadError(f"the engine is gone: {self._death_reason}"))
        if reason is not None and self._events is not None:
            try:
                self._events.on_dead(reason)
            except Exception:
                _log.exception("the engine's owner failed to take the news of its end")


def readable(error: BaseException) -> str:
    """An error as one line for a user: its message, and its type unless the message was written to stand alone."""
    text = str(error)
    if text and isinstance(error, LoraxError | ValueError | RuntimeError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
