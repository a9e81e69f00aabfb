"""A few threads, shared so that nobody gets more than one of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor


class Lanes:
    """Runs pieces of work, those of one key one after the other and in order. Keys take turns.

    Owns the threads and the queues. Work must not raise.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._lock = threading.Lock()
        self._waiting: dict[Hashable, deque[Callable[[], None]]] = {}

    def submit(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run `work` when it is its turn.

        Raises:
            RuntimeError: the lanes have been stopped.
        """
        with self._lock:
            lane = self._waiting.get(key)
            if lane is not None:
                lane.append(work)
                return
            self._waiting[key] = deque([work])
        self._pool.submit(self._run_one, key)

    def stop(self) -> None:
        """Take nothing more; what has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run_one(self, key: Hashable) -> None:
        with self._lock:
            work = self._waiting[key].popleft()
        try:
            work()
        finally:
            with self._lock:
                more = bool(self._waiting[key])
                if not more:
                    del self._waiting[key]
        if more:
            try:
                self._pool.submit(self._run_one, key)
            except RuntimeError:  # stopped meanwhile
                return
