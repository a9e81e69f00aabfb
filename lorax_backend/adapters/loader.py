"""Threads that download and read adapters, so that the engine never waits for a disk or a network.

Work is put in lanes, each with threads of its own: downloads, reads and permission checks do not hold each other up.
Nor does slow work in one lane: what takes longer than a few seconds no longer counts against the lane's threads, and
another thread starts for those behind it. Work that overruns its time is given up: its caller is told, and its thread
ends when the work does, however late. Standard library only.
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

_MAX_EXTRA = 64  # threads that are slow or given up in one lane, beyond which the lane waits for them
_PATIENCE_S = 2.0
_FEW_DEADLINES = 64


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
    slow: bool = False

    def forget(self) -> Done:
        """Keep nothing of what is over, since tickets stay in the list of deadlines for as long as others hang before
        them; the `done` it had."""
        done, self.work, self.done = self.done, _nothing, _nothing
        return done


def _nothing(*_: Any) -> None:
    """In the place of what is over."""


@dataclass(slots=True, eq=False)
class _Lane:
    name: str
    max_threads: int
    waiting: deque[Ticket] = field(default_factory=deque)
    idle: int = 0
    threads: int = 0
    extra: int = 0  # of them, those whose work is slow or was given up
    ready: threading.Condition = field(default_factory=threading.Condition)


class Loader(Protocol):
    """What the adapters' life needs of a loader; `AdapterLoader` or a test's own."""

    def submit(self, lane: str, work: Callable[[], Any], timeout_s: float, done: Done) -> Any: ...

    def cancel(self, ticket: Any) -> bool: ...

    def close(self) -> None: ...


class AdapterLoader:
    """Runs work on daemon threads, which start when first needed. All methods may be called from any thread."""

    def __init__(self, lanes: Mapping[str, int], patience_s: float | None = None) -> None:
        """`lanes` gives the number of threads of each lane, `patience_s` the time after which work counts as slow."""
        self._patience_s = _PATIENCE_S if patience_s is None else patience_s
        self._lock = threading.Lock()
        self._lanes = {
            name: _Lane(name, count, ready=threading.Condition(self._lock)) for name, count in lanes.items()
        }
        # time, a number that settles ties, the work, and whether it is to be given up then or only called slow
        self._deadlines: list[tuple[float, int, Ticket, bool]] = []
        self._most_deadlines = _FEW_DEADLINES
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
        counted = lane.threads - lane.extra
        if len(lane.waiting) > lane.idle and counted < lane.max_threads and lane.extra <= _MAX_EXTRA:
            lane.threads += 1
            threading.Thread(
                target=self._run_lane, args=(lane,), name=f"adapter-{lane.name}", daemon=True
            ).start()
        if self._watchdog is None:
            self._watchdog = threading.Thread(target=self._watch, name="adapter-watchdog", daemon=True)
            self._watchdog.start()

    def _run_lane(self, lane: _Lane) -> None:
        while self._run_next(lane):
            pass

    def _run_next(self, lane: _Lane) -> bool:
        """Wait for one piece of work and do it; False if the thread is to end. A function of its own, so that an idle
        thread holds nothing of its last work: what an adapter's files are leased by must go with the adapter."""
        ticket = self._take(lane)
        if ticket is None:
            return False
        value, error = None, None
        try:
            value = ticket.work()
        except Exception as raised:  # whatever it is, only this adapter's requests pay for it
            error = raised
        done = self._settle(ticket)
        surplus = ticket.slow and self._end_surplus(lane)
        if done is not None and not self._closed:
            done(value, error)
        return not surplus

    def _end_surplus(self, lane: _Lane) -> bool:
        """A slow thread is free again; True if another has taken its place, so that it is to end."""
        with self._lock:
            lane.extra -= 1
            surplus = lane.threads - lane.extra > lane.max_threads
            lane.threads -= surplus
            self._ensure_threads(lane)
            return surplus

    def _take(self, lane: _Lane) -> Ticket | None:
        with self._lock:
            lane.idle += 1
            while not lane.waiting and not self._closed:
                lane.ready.wait()
            lane.idle -= 1
            if self._closed:
                return None
            ticket = lane.waiting.popleft()
            now = time.monotonic()
            for seconds in {min(self._patience_s, ticket.timeout_s), ticket.timeout_s}:
                entry = (now + seconds, next(self._numbers), ticket, seconds == ticket.timeout_s)
                heapq.heappush(self._deadlines, entry)
            if len(self._deadlines) > self._most_deadlines:
                self._forget_settled()
            self._deadline_added.notify()
            return ticket

    def _forget_settled(self) -> None:
        """With the lock held: keep the deadlines of unfinished work alone. One that is far off would stay for as long,
        behind nearer ones of work that comes all the time."""
        self._deadlines = [entry for entry in self._deadlines if not entry[2].settled]
        heapq.heapify(self._deadlines)
        self._most_deadlines = max(_FEW_DEADLINES, 2 * len(self._deadlines))

    def _settle(self, ticket: Ticket) -> Done | None:
        """Whom to tell; None if the watchdog has given the work up."""
        with self._lock:
            first = not ticket.settled
            ticket.settled = True
            done = ticket.forget()
            return done if first else None

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
                _, _, ticket, is_over = heapq.heappop(self._deadlines)
                ticket.settled = is_over
                done = ticket.done
                ticket.lane.extra += not ticket.slow
                ticket.slow = True
                self._ensure_threads(ticket.lane)
            if is_over:
                done(None, LoadTimeoutError(f"took longer than {ticket.timeout_s:g} s"))
