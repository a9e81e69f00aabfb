"""The engine loop, and the engine that runs it on a thread of this process.

`EngineLoop` is the same in every engine: commands come in from any thread, one thread runs the core and hands what
comes out to a sink. `InProcessEngine` calls the owner from that thread; `engine.process` has the other kind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from lorax_backend.engine.client import Builder, EngineClientBase, EngineInbox, EngineSink, Progress, readable
from lorax_backend.engine.core import EngineCore
from lorax_backend.errors import GenerationError, LoraxError
from lorax_backend.types import EngineInfo, EngineRequest, TokenOutput

_log = logging.getLogger(__name__)

_STATS_INTERVAL_S = 1.0
_STALLED_WAIT_S = (
    0.02  # for a sequence that found no room although nothing runs: the adapters' copies may be late
)


class EngineLoop:
    """Runs a core on the thread that calls `run`; every other method may be called from any thread.

    While there is nothing to compute the thread sleeps until a command comes or the adapters wake it.
    """

    def __init__(
        self, core: EngineCore, sink: EngineSink, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._core = core
        self._sink = sink
        self._clock = clock
        self._changed = threading.Condition()
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
        with self._changed:
            self._woken = True
            self._changed.notify()

    def stop(self) -> None:
        """Let `run` return after the step it is in."""
        self._stopping = True
        self.wake()

    def run(self) -> None:
        """Step until `stop`. What the core or the sink raises goes to the caller: the engine cannot go on."""
        while not self._stopping:
            outputs: list[TokenOutput] = []
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
        limit = self._core.patience_s
        if self._core.has_work:
            limit = _STALLED_WAIT_S if limit is None else min(limit, _STALLED_WAIT_S)
        else:
            self._send_stats()
        with self._changed:
            self._changed.wait_for(lambda: self._commands or self._woken or self._stopping, limit)
            self._woken = False

    def _send_stats(self) -> None:
        self._next_stats = self._clock() + _STATS_INTERVAL_S
        self._sink.on_stats(self._core.stats())

    def _post(self, command: Callable[[], list[TokenOutput]]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

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
