"""Ctrl-C while a request is under way: it ends the request and raises nothing.

An exception would come up wherever the main thread happens to be, which may be inside gRPC. Where that has just taken a
lock, the lock would never be given back, and the next request would wait for its answer for good; in a destructor, the
exception would be dropped.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Self


class CtrlC:
    """A context in which Ctrl-C calls what `calls` was given, on a thread of its own. Pressed again before that has
    helped, it raises as ever. Only for the main thread. Does nothing where Ctrl-C is ignored or handled otherwise.

    Attributes:
        pressed: True once Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._cancel: Callable[[], object] | None = None
        self._bell: SimpleQueue[bool] = (
            SimpleQueue()
        )  # of all queues and events the one for a signal's handler
        self._installed = False

    def calls(self, cancel: Callable[[], object]) -> None:
        """End the request by `cancel`, which may be called twice, when Ctrl-C is pressed or if it has been."""
        self._cancel = cancel
        if self.pressed:
            cancel()

    def __enter__(self) -> Self:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            threading.Thread(target=self._wait, name="lorax-ctrl-c", daemon=True).start()
            signal.signal(signal.SIGINT, self._press)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._bell.put(False)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        self._bell.put(True)

    def _wait(self) -> None:
        if self._bell.get() and self._cancel is not None:
            self._cancel()
