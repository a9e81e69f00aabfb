"""One thread that asks every live request's channel whether its caller has gone. Standard library only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from lorax_backend.serving.delivery import LiveRequest

# With a thousand live requests a sweep takes 0.1 s, since each question is a round trip to another process that
# competes with sending. Sweeps then come less often instead of taking up the road.
_SHARE_OF_TIME = 0.2


class CancellationPoller:
    """Calls `on_gone` for each live request whose channel says so, or can no longer say.

    Args:
        interval: seconds between two sweeps while there are live requests; longer if sweeps take long.
        snapshot: the live requests.
        on_gone: ends one of them.
        on_crash: told of errors this thread does not expect; it goes on afterwards.
    """

    def __init__(
        self,
        interval: float,
        snapshot: Callable[[], list[LiveRequest]],
        on_gone: Callable[[LiveRequest], None],
        on_crash: Callable[[str, BaseException], None],
    ) -> None:
        self._interval = interval
        self._snapshot = snapshot
        self._on_gone = on_gone
        self._on_crash = on_crash
        self._wakeup = threading.Event()
        self._resting = False
        self._asked = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="lorax-cancel-poller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def poke(self) -> None:
        """Look again now."""
        self._asked = True
        self._wakeup.set()

    def poke_if_idle(self) -> None:
        """There are live requests again. They are looked at after the usual time and not at once: their callers have
        only just asked, and a look takes the road and the interpreter's lock that the requests need."""
        if self._resting:
            self._resting = False
            self._wakeup.set()

    def stop(self, timeout: float) -> None:
        self._stopping = True
        self._wakeup.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        wait: float | None = self._interval
        while not self._stopping:
            try:
                wait = self._sweep()
            except BaseException as error:
                self._on_crash(self._thread.name, error)
            self._wait(wait)
            if wait is None and not (self._asked or self._stopping):
                self._wait(self._interval)
            self._asked = False

    def _wait(self, seconds: float | None) -> None:
        self._wakeup.wait(seconds)
        self._wakeup.clear()

    def _sweep(self) -> float | None:
        """Ask all; the seconds to wait before the next sweep, None to rest until poked."""
        started = time.monotonic()
        # Set before the look, so that a request that comes just after it finds the poller resting and pokes it.
        self._resting = True
        requests = self._snapshot()
        if not requests:
            return None
        self._resting = False
        for live in requests:
            if not live.failing() and not live.ended and self._is_gone(live):
                self._on_gone(live)
        spent = time.monotonic() - started
        return max(self._interval, spent * (1 / _SHARE_OF_TIME - 1))

    @staticmethod
    def _is_gone(live: LiveRequest) -> bool:
        try:
            return live.channel.is_cancelled()
        except Exception:
            return True  # a channel that cannot answer leads to nobody
