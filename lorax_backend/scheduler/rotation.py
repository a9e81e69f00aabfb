"""Whose adapters have room on the device, when there are more adapters with work than fit.

An adapter in use cannot be evicted, so one kept busy by continuous traffic would keep its room for ever. Therefore,
while adapters wait for room, those that have been in use for a whole time slice are closed, the longest in use first:
nothing more is admitted for them, so they drain, and their room goes to those that have waited for it longest. Each
waiting adapter closes one, and one more for every further slice that it waits in vain, since it may need the room of
several. A closed adapter that still has work lines up behind those that wait already.

Bound: an adapter that is first in line has room after at most n + 1 slices and the time in which what runs comes to its
end, n being the number of adapters in use; those behind it follow in order.
"""

from __future__ import annotations

from itertools import islice

from lorax_backend.scheduler.adapter_queue import AdapterQueue


class Rotation:
    """Owns the order of adapters in use and of those that wait for room."""

    def __init__(self, slice_s: float) -> None:
        self._slice_s = slice_s
        self._in_use: dict[AdapterQueue, float] = {}  # since when, oldest first
        self._claims: dict[AdapterQueue, float] = {}  # since when, oldest first
        self._closed: set[AdapterQueue] = set()

    @property
    def claims(self) -> list[AdapterQueue]:
        """Those that wait for room, the first in line first."""
        return list(self._claims)

    def start(self, queue: AdapterQueue, now: float) -> None:
        """A first sequence runs with the adapter."""
        self._in_use[queue] = now
        self._claims.pop(queue, None)

    def stop(self, queue: AdapterQueue) -> None:
        """No sequence runs with it any more."""
        self._in_use.pop(queue, None)
        self._closed.discard(queue)

    def claim(self, queue: AdapterQueue, now: float) -> None:
        """It found no room; it lines up if it has not done so."""
        self._claims.setdefault(queue, now)

    def withdraw(self, queue: AdapterQueue) -> None:
        """It needs no room any more."""
        self._claims.pop(queue, None)

    def choose(self, now: float) -> None:
        """Decide who is closed in this step."""
        self._closed.clear()
        if not self._claims:
            return
        oldest = next(iter(self._claims.values()))
        wanted = len(self._claims) + int((now - oldest) / self._slice_s) if self._slice_s > 0 else None
        for queue, since in islice(self._in_use.items(), wanted):
            if now - since < self._slice_s:
                break
            self._closed.add(queue)

    def is_closed(self, queue: AdapterQueue) -> bool:
        return queue in self._closed

    def has_overdue_claim(self, now: float) -> bool:
        """True if the first in line has waited for a whole slice: nobody else may take room before it."""
        return bool(self._claims) and now - next(iter(self._claims.values())) >= self._slice_s
