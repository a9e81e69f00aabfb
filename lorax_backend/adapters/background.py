"""Work on the loader's threads, whose results the engine thread takes in when it polls. Standard library only."""

from __future__ import annotations

import functools
import logging
import queue
from collections.abc import Callable
from typing import Any

from lorax_backend.adapters.loader import Loader, LoadTimeoutError
from lorax_backend.errors import AdapterDownloadError, AdapterError
from lorax_backend.types import AdapterRef

_log = logging.getLogger(__name__)

DOWNLOAD, READ, PERMISSION, COPY, DISK = LANES = ("download", "read", "permission", "copy", "disk")

_PERMISSION_TIMEOUT_S = 30.0

Then = Callable[[Any, AdapterError | None], None]


class Background:
    """One writer and no lock: threads only put what they finished into a queue, which the engine thread empties."""

    def __init__(self, loader: Loader, timeout_s: float) -> None:
        self.wakeup: Callable[[], None] = lambda: None
        self._loader = loader
        self._timeout_s = timeout_s
        self._results: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def submit(self, ref: AdapterRef, lane: str, work: Callable[[], Any], then: Then) -> Any:
        """Give work for an adapter to the threads; `run_finished` calls `then(value, error)` when it is done."""

        def done(value: Any, error: Exception | None) -> None:
            told = None if error is None else _as_adapter_error(ref, error)
            self.post(functools.partial(then, value, told))

        timeout_s = min(self._timeout_s, _PERMISSION_TIMEOUT_S) if lane == PERMISSION else self._timeout_s
        return self._loader.submit(lane, work, timeout_s, done)

    def post(self, handler: Callable[[], None]) -> None:
        """Have the engine thread call `handler` at its next poll; from any thread."""
        self._results.put(handler)
        self.wakeup()

    def run_finished(self) -> bool:
        """Call all handlers there are; True if there were any."""
        found = False
        while True:
            try:
                handler = self._results.get_nowait()
            except queue.Empty:
                return found
            found = True
            handler()

    def cancel(self, ticket: Any) -> bool:
        """True if the work had not begun and never will."""
        return self._loader.cancel(ticket)

    def set_wakeup(self, wakeup: Callable[[], None]) -> None:
        """See AdapterProvider; what has finished already is told at once."""
        self.wakeup = wakeup
        if not self._results.empty():
            wakeup()

    def close(self) -> None:
        self._loader.close()


def _as_adapter_error(ref: AdapterRef, error: Exception) -> AdapterError:
    """What to tell the requests, and the log. Runs on a loader thread."""
    if isinstance(error, AdapterError):
        told = error
    elif isinstance(error, LoadTimeoutError):
        told = AdapterDownloadError(f"{ref}: loading it {error}; try again later")
    else:
        _log.error("unexpected failure of adapter %s", ref, exc_info=error)
        told = AdapterError(f"{ref} could not be loaded ({type(error).__name__}); the server's log says more")
    _log.warning("adapter %s: %s", ref, told.message)
    # The traceback holds frames, and they hold weights.
    return told.with_traceback(None)
