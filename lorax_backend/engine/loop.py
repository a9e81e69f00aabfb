"""The engine loop, and the engine that runs it on a thread of this process.

`EngineLoop` is the same in every engine: commands come in from any thread, one thread runs the core and hands what
comes out to a sink. `InProcessEngine` calls the owner from that thread; `engine.process` has the other kind.
"""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from lorax_backend.engine.client import Builder, EngineClientBase, EngineInbox, EngineSink, Progress, readable
from lorax_backend.engine.core import EngineCore
from lorax_backend.errors import GenerationError, LoraxError
from lorax_backend.types import EngineInfo, EngineRequest, TokenOutput

_log = logging.getLogger(__name__)

_STATS_INTERVAL_S = 1.0
_STALLED_WAIT_S = (
    0.02  # for a sequence that found no room although nothing runs: the adapters' copies may be late
)
_SETTLE_S = 0.01  # so long nothing comes before the engine counts as idle and says so


class CommandSource(Protocol):
    """Where commands come from that no thread brings: the loop's own thread looks, before every step and when it is
    woken by the descriptor. A thread that only handed them on would cost a request two changes of threads."""

    def fileno(self) -> int:
        """Readable when there are commands, or when there will be none any more."""
        ...

    def drain(self, loop: EngineLoop) -> None:
        """Call the loop's methods for all commands there are, without waiting for any."""
        ...


class _Bell:
    """Wakes a thread that sleeps until it rings, or until another descriptor can be read.

    The descriptor lives as long as this object, and whoever may ring holds the object.
    """

    def __init__(self, other: CommandSource | None) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        for descriptor in (self._descriptor, *([] if other is None else [other.fileno()])):
            self._poll.register(descriptor, select.POLLIN)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def ring(self) -> None:
        """Wake the sleeper, or the next one; from any thread."""
        os.eventfd_write(self._descriptor, 1)

    def sleep(self, limit_s: float) -> bool:
        """Until it has rung since the last time or the other can be read, which is True, or the time is over."""
        # Rounded up: a little too early would be too early again and again.
        ready = self._poll.poll(None if limit_s == math.inf else math.ceil(limit_s * 1e3))
        if any(descriptor == self._descriptor for descriptor, _ in ready):
            os.eventfd_read(self._descriptor)
        return bool(ready)


class EngineLoop:
    """Runs a core on the thread that calls `run`; every other method may be called from any thread.

    While there is nothing to compute the thread sleeps until a command comes or the adapters wake it.
    """

    def __init__(
        self,
        core: EngineCore,
        sink: EngineSink,
        clock: Callable[[], float] = time.monotonic,
        source: CommandSource | None = None,
    ) -> None:
        """`source` is asked for commands besides those that come by the methods."""
        self._core = core
        self._sink = sink
        self._clock = clock
        self._source = source
        self._bell = _Bell(source)
        self._asleep = False
        self._commands: deque[Callable[[], list[TokenOutput]]] = deque()
        self._woken = False
        self._stopping = False
        self._next_stats = 0.0
        core.adapters.set_wakeup(self.wake)

    def submit(self, request: EngineRequest) -> None:
        self._post(lambda: self._core.add(request))

    def cancel(self, handle: int) -> None:
        self._post(lambda: self._cancel(handle))

    def control(self, ticket: int, command: str, arguments: dict[str, Any]) -> None:
        self._post(lambda: self._control(ticket, command, arguments))

    def wake(self) -> None:
        """Look again whether there is something to do."""
        self._woken = True
        self._ring()

    def stop(self) -> None:
        """Let `run` return after the step it is in."""
        self._stopping = True
        self.wake()

    def run(self) -> None:
        """Step until `stop`. What the core or the sink raises goes to the caller: the engine cannot go on."""
        while not self._stopping:
            outputs: list[TokenOutput] = []
            if self._source is not None:
                self._source.drain(self)
            for _ in range(
                len(self._commands)
            ):  # not those that come meanwhile, or they could hold up the steps
                outputs += self._commands.popleft()()
            outputs += self._core.step()
            if outputs:
                self._sink.on_outputs(outputs)
            if self._core.stalled:
                self._sleep()
            elif self._clock() >= self._next_stats:
                self._send_stats()

    def _sleep(self) -> None:
        limit = _STALLED_WAIT_S
        if not self._core.has_work:
            # Those who take in a report are just sending the last tokens, and may be asking for more.
            if self._rest(self._at_most(_SETTLE_S)):
                return
            self._send_stats()
            limit = math.inf
        self._rest(self._at_most(limit))

    def _at_most(self, limit_s: float) -> float:
        patience_s = self._core.patience_s
        return limit_s if patience_s is None else min(limit_s, patience_s)

    def _rest(self, limit_s: float) -> bool:
        """Sleep until there is something to look at, which it tells, or the time is over."""
        # Set before the look: who brings something later sees it and rings, and what came before is seen.
        self._asleep = True
        found = bool(self._commands or self._woken or self._stopping) or self._bell.sleep(limit_s)
        self._asleep = self._woken = False
        return found

    def _send_stats(self) -> None:
        self._next_stats = self._clock() + _STATS_INTERVAL_S
        self._sink.on_stats(self._core.stats())

    def _post(self, command: Callable[[], list[TokenOutput]]) -> None:
        self._commands.append(command)
        self._ring()

    def _ring(self) -> None:
        if self._asleep:
            self._bell.ring()

    def _cancel(self, handle: int) -> list[TokenOutput]:
        self._core.cancel(handle)
        return []

    def _control(self, ticket: int, command: str, arguments: dict[str, Any]) -> list[TokenOutput]:
        reply: dict[str, Any] | LoraxError
        try:
            reply = self._core.control(command, arguments)
        except LoraxError as error:
            reply = error
        except Exception as error:
            _log.exception("control command %r failed", command)
            reply = GenerationError(f"{command}: {readable(error)}")
        self._sink.on_reply(ticket, reply)
        return []


class InProcessEngine(EngineClientBase):
    """An engine on a thread of this process. `build` runs on that thread too, so that everything the device ties to a
    thread is set where it is used. `EngineEvents` are called from the engine's thread and hold it up."""

    def __init__(self, build: Builder, progress: Progress | None = None) -> None:
        super().__init__(progress)
        self._build = build
        self._loop: EngineLoop | None = None
        self._thread: threading.Thread | None = None

    def _launch(self, started: Future[tuple[EngineInbox, EngineInfo]]) -> None:
        self._thread = threading.Thread(target=self._run, args=(started,), name="engine", daemon=True)
        self._thread.start()

    def _shut_down(self, timeout: float) -> None:
        if self._loop is not None:
            self._loop.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
            if self._thread.is_alive():
                _log.warning("the engine thread did not stop within %g s", timeout)

    def _run(self, started: Future[tuple[EngineInbox, EngineInfo]]) -> None:
        try:
            built = self._build(self._report_progress)
        except BaseException as error:
            _log.debug("the model cannot be loaded", exc_info=True)
            failure = RuntimeError(readable(error))
            failure.__cause__ = error
            started.set_exception(failure)
            return
        try:
            self._loop = EngineLoop(built.core, self)
            self._ready(started, self._loop, built.info)
            if self.alive:  # it may have been stopped while it was loading
                self._loop.run()
        except BaseException as error:
            _log.exception("the engine died")
            self._end(readable(error))
        finally:
            self._close(built.core)

    @staticmethod
    def _close(core: EngineCore) -> None:
        try:
            core.close()
        except Exception:
            _log.exception("the engine could not free what it held")
