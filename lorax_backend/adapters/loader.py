"""Threads that download and read adapters, so that the engine never waits for a disk or a network.

Work is put in lanes, each with threads of its own: downloads, reads and permission checks do not hold each other up.
Work that overruns its time is given up: its caller is told, another thread takes the place of the one that is stuck,
and that one ends when its work does, however late. Standard library only.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Done = Callable[[Any, Exception | None], None]

_MAX_STUCK = 64  # threads given up in one lane, beyond which the lane waits for them


class LoadTimeoutError(Exception):
    """The work took longer than its time and was given up."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One piece of work. `done(value, error)` is called once, from any thread, unless the ticket was cancelled."""

    lane: _Lane
    work: Callable[[], Any] = field(repr=False)
    timeout_s: float
    done: Done = field(repr=False)
    settled: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    name: str
    max_threads: int
    waiting: deque[Ticket] = field(default_factory=deque)
    idle: int = 0
    threads: int = 0
    stuck: int = 0
    ready: threading.Condition = field(default_factory=threading.Condition)


class Loader(Protocol):
    """What the adapters' life needs of a loader; `AdapterLoader` or a test's own."""

    def submit(self, lane: str, work: Callable[[], Any], timeout_s: float, done: Done) -> Any: ...

    def cancel(self, ticket: Any) -> bool: ...

    def close(self) -> None: ...


class AdapterLoader:
    """Runs work on daemon threads, which start when first needed. All methods may be called from any thread."""

    def __init__(self, lanes: Mapping[str, int]) -> None:
        """`lanes` gives the number of threads of each lane."""
        self._lock = threading.Lock()
        self._lanes = {
            name: _Lane(name, count, ready=threading.Condition(self._lock)) for name, count in lanes.items()
        }
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._deadline_added = threading.Condition(self._lock)
        self._numbers = itertools.count()
        self._watchdog: threading.Thread | None = None
        self._closed = False

    def submit(self, lane: str, work: Callable[[], Any], timeout_s: float, done: Done) -> Ticket:
        """Queue work; its time starts when a thread takes it up.

        Raises:
            RuntimeError: the loader is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the adapter loader is closed")
            target = self._lanes[lane]
            ticket = Ticket(target, work, timeout_s, done)
            target.waiting.append(ticket)
            self._ensure_threads(target)
            target.ready.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> bool:
        """True if the work had not begun and never will; its `done` is not called then."""
        with self._lock:
            try:
                ticket.lane.waiting.remove(ticket)
            except ValueError:
                return False
            ticket.settled = True
            return True

    def close(self) -> None:
        """Forget what waits and let the threads end after their present work, whose `done` is not called."""
        with self._lock:
            self._closed = True
            for lane in self._lanes.values():
                lane.waiting.clear()
                lane.ready.notify_all()
            self._deadlines.clear()
            self._deadline_added.notify_all()

    def _ensure_threads(self, lane: _Lane) -> None:
        alive = lane.threads - lane.stuck
        if len(lane.waiting) > lane.idle and alive < lane.max_threads and lane.stuck <= _MAX_STUCK:
            lane.threads += 1
            threading.Thread(
                target=self._run_lane, args=(lane,), name=f"adapter-{lane.name}", daemon=True
            ).start()
        if self._watchdog is None:
            self._watchdog = threading.Thread(target=self._watch, name="adapter-watchdog", daemon=True)
            self._watchdog.start()

    def _run_lane(self, lane: _Lane) -> None:
        while True:
            ticket = self._take(lane)
            if ticket is None:
                return
            value, error = None, None
            try:
                value = ticket.work()
            except Exception as raised:  # whatever it is, only this adapter's requests pay for it
                error = raised
            if not self._settle(ticket):
                with self._lock:
                    lane.threads -= 1
                    lane.stuck -= 1
                    self._ensure_threads(lane)
                return
            if not self._closed:
                ticket.done(value, error)

    def _take(self, lane: _Lane) -> Ticket | None:
        with self._lock:
            lane.idle += 1
            while not lane.waiting and not self._closed:
                lane.ready.wait()
            lane.idle -= 1
            if self._closed:
                return None
            ticket = lane.waiting.popleft()
            heapq.heappush(
                self._deadlines, (time.monotonic() + ticket.timeout_s, next(self._numbers), ticket)
            )
            self._deadline_added.notify()
            return ticket

    def _settle(self, ticket: Ticket) -> bool:
        """False if the watchdog has given the work up."""
        with self._lock:
            first = not ticket.settled
            ticket.settled = True
            return first

    def _watch(self) -> None:
        while True:
            with self._lock:
                while self._deadlines and self._deadlines[0][2].settled:
                    heapq.heappop(self._deadlines)
                if self._closed:
                    return
                now = time.monotonic()
                if not self._deadlines or self._deadlines[0][0] > now:
                    self._deadline_added.wait(self._deadlines[0][0] - now if self._deadlines else None)
                    continue
                ticket = heapq.heappop(self._deadlines)[2]
                ticket.settled = True
                ticket.lane.stuck += 1
                self._ensure_threads(ticket.lane)
            ticket.done(None, LoadTimeoutError(f"took longer than {ticket.timeout_s:g} s"))
