"""Time limits for blocking waits: gRPC's sync streams have none of their own between two responses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls a function if a wait lasts too long. Owns one thread, which runs only while there are waits.

    Waits come and go for every token, so `arm` and `disarm` only touch a dict; the thread sleeps until the earliest
    deadline it has seen and then looks again.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waits: dict[int, tuple[float, Callable[[], object]]] = {}
        self._next_id = 0
        self._wake_at: float | None = None  # None: no thread runs

    def arm(self, timeout: float, expire: Callable[[], object]) -> int:
        """Call `expire` from the watchdog's thread in `timeout` seconds unless the wait is disarmed before."""
        deadline = time.monotonic() + timeout
        with self._condition:
            self._next_id += 1
            self._waits[self._next_id] = (deadline, expire)
            if self._wake_at is None:
                self._wake_at = deadline
                threading.Thread(target=self._run, name="lorax-client-watchdog", daemon=True).start()
            elif deadline < self._wake_at:
                self._condition.notify()
            return self._next_id

    def disarm(self, wait_id: int) -> bool:
        """End a wait; False if its time had run out."""
        with self._condition:
            return self._waits.pop(wait_id, None) is not None

    def _run(self) -> None:
        while True:
            with self._condition:
                now = time.monotonic()
                expired = [key for key, (deadline, _) in self._waits.items() if deadline <= now]
                calls = [self._waits.pop(key)[1] for key in expired]
                if not calls:
                    if not self._waits:
                        self._wake_at = None
                        return
                    self._wake_at = min(deadline for deadline, _ in self._waits.values())
                    self._condition.wait(self._wake_at - now)
            # Outside the lock: cancelling a call may run callbacks that arm or disarm.
            for call in calls:
                call()
