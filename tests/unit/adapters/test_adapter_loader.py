"""The loader's threads: bounded, apart by lane, and never lost to work that hangs."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lorax_backend.adapters.loader import AdapterLoader, LoadTimeoutError

WAIT = 10.0


class Results:
    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def __call__(self, value: Any, error: Exception | None) -> None:
        self._queue.put((value, error))

    def next(self) -> tuple[Any, Exception | None]:
        return self._queue.get(timeout=WAIT)

    @property
    def empty(self) -> bool:
        return self._queue.empty()


@pytest.fixture
def loader() -> Iterator[AdapterLoader]:
    loader = AdapterLoader({"download": 2, "read": 1})
    yield loader
    loader.close()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hanging work waits for; opened when the test ends."""
    event = threading.Event()
    yield event
    event.set()


def hang(gate: threading.Event, started: threading.Semaphore) -> Callable[[], None]:
    def work() -> None:
        started.release()
        gate.wait(WAIT)

    return work


def test_values_and_errors_come_back(loader: AdapterLoader) -> None:
    results = Results()
    loader.submit("read", lambda: 42, WAIT, results)
    assert results.next() == (42, None)
    loader.submit("read", lambda: 1 // 0, WAIT, results)
    value, error = results.next()
    assert value is None
    assert isinstance(error, ZeroDivisionError)


def test_no_more_threads_work_than_a_lane_has(loader: AdapterLoader, gate: threading.Event) -> None:
    started, results = threading.Semaphore(0), Results()
    for _ in range(5):
        loader.submit("download", hang(gate, started), WAIT, results)
    assert started.acquire(timeout=WAIT)
    assert started.acquire(timeout=WAIT)
    assert not started.acquire(timeout=0.05)
    gate.set()
    for _ in range(5):
        assert results.next() == (None, None)


def test_a_full_lane_holds_up_no_other(loader: AdapterLoader, gate: threading.Event) -> None:
    started, results = threading.Semaphore(0), Results()
    for _ in range(9):
        loader.submit("download", hang(gate, started), WAIT, Results())
    loader.submit("read", lambda: "read", WAIT, results)
    assert results.next() == ("read", None)


def test_work_that_hangs_is_given_up_and_its_thread_replaced(
    loader: AdapterLoader, gate: threading.Event
) -> None:
    started, hung, results = threading.Semaphore(0), Results(), Results()
    for _ in range(3):
        loader.submit("read", hang(gate, started), 0.05, hung)
        value, error = hung.next()
        assert value is None
        assert isinstance(error, LoadTimeoutError)
        assert "0.05 s" in str(error)
    loader.submit("read", lambda: "goes on", WAIT, results)
    assert results.next() == ("goes on", None)


def test_work_given_up_is_not_reported_twice_and_its_thread_ends(loader: AdapterLoader) -> None:
    gate, hung, results, workers = threading.Event(), Results(), Results(), []

    def work() -> None:
        workers.append(threading.current_thread())
        gate.wait(WAIT)

    loader.submit("read", work, 0.05, hung)
    hung.next()
    loader.submit("read", lambda: "meanwhile", WAIT, results)
    assert results.next() == ("meanwhile", None), "on another thread"
    gate.set()
    workers[0].join(WAIT)
    assert not workers[0].is_alive()
    loader.submit("read", lambda: "after", WAIT, results)
    assert results.next() == ("after", None)
    assert hung.empty


def test_time_runs_from_the_start_of_the_work_not_from_its_queueing(
    loader: AdapterLoader, gate: threading.Event
) -> None:
    started, results = threading.Semaphore(0), Results()
    loader.submit("read", hang(gate, started), WAIT, Results())
    loader.submit("read", lambda: "late", 0.05, results)
    assert started.acquire(timeout=WAIT)
    assert not gate.wait(0.1)
    gate.set()
    assert results.next() == ("late", None)


def test_waiting_work_can_be_cancelled_and_running_work_cannot(
    loader: AdapterLoader, gate: threading.Event
) -> None:
    started, first, second = threading.Semaphore(0), Results(), Results()
    running = loader.submit("read", hang(gate, started), WAIT, first)
    waiting = loader.submit("read", lambda: "never", WAIT, second)
    assert started.acquire(timeout=WAIT)
    assert loader.cancel(waiting)
    assert not loader.cancel(waiting)
    assert not loader.cancel(running)
    gate.set()
    first.next()
    assert second.empty


def test_a_closed_loader_takes_nothing_and_reports_nothing(gate: threading.Event) -> None:
    loader, started, results = AdapterLoader({"read": 1}), threading.Semaphore(0), Results()
    workers: list[threading.Thread] = []

    def work() -> None:
        workers.append(threading.current_thread())
        started.release()
        gate.wait(WAIT)

    loader.submit("read", work, WAIT, results)
    loader.submit("read", lambda: "waits", WAIT, results)
    assert started.acquire(timeout=WAIT)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.submit("read", lambda: None, WAIT, results)
    gate.set()
    workers[0].join(WAIT)
    assert not workers[0].is_alive()
    assert results.empty


def test_many_short_works_all_come_back(loader: AdapterLoader) -> None:
    results = Results()
    for number in range(500):
        loader.submit("download", lambda number=number: number, WAIT, results)
    assert sorted(results.next()[0] for _ in range(500)) == list(range(500))


def test_slow_work_makes_way_in_its_own_lane(gate: threading.Event) -> None:
    """LoRAX's A51: one task did all loads, one after another."""
    loader = AdapterLoader({"download": 2}, patience_s=0.02)
    started, slow, results = threading.Semaphore(0), Results(), Results()
    for _ in range(6):
        loader.submit("download", hang(gate, started), WAIT, slow)
    loader.submit("download", lambda: "quick", WAIT, results)
    assert results.next() == ("quick", None), "behind six that hang"
    assert slow.empty, "which are not given up"
    gate.set()
    for _ in range(6):
        assert slow.next() == (None, None)
    for number in range(20):
        loader.submit("download", lambda number=number: number, WAIT, results)
    assert sorted(results.next()[0] for _ in range(20)) == list(range(20))
    assert loader._lanes["download"].threads <= 2, "the extra threads have ended"
    assert loader._lanes["download"].extra == 0
    loader.close()


class Weights:
    """Something large."""


def test_nothing_of_work_that_is_over_is_kept_while_other_work_hangs(
    loader: AdapterLoader, gate: threading.Event
) -> None:
    hanging = threading.Semaphore(0)
    loader.submit("download", hang(gate, hanging), 60.0, lambda value, error: None)
    assert hanging.acquire(timeout=WAIT)
    all_gone = finish_work(loader)
    results = Results()
    loader.submit("read", lambda: None, 60.0, results)
    results.next()  # the read lane's only thread has gone on
    assert all(gone.wait(WAIT) for gone in all_gone)


def test_a_thread_without_work_keeps_nothing_of_its_last(loader: AdapterLoader) -> None:
    assert all(gone.wait(WAIT) for gone in finish_work(loader))


def finish_work(loader: AdapterLoader) -> list[threading.Event]:
    """Have work done; set when what it was given, and what it returned, are no more."""
    given, made, results, all_gone = Weights(), Weights(), Results(), []
    for weights in (given, made):
        all_gone.append(threading.Event())
        weakref.finalize(weights, all_gone[-1].set)

    def work(given: Weights = given, made: Weights = made) -> Weights:
        return made

    loader.submit("read", work, 60.0, results)
    assert results.next() == (made, None)
    return all_gone


def test_deadlines_of_finished_work_do_not_pile_up_behind_work_that_hangs() -> None:
    loader, release = AdapterLoader({"read": 2}), threading.Event()
    try:
        loader.submit("read", lambda: release.wait(60), 100.0, lambda value, error: None)
        for _ in range(500):
            finished = threading.Event()
            loader.submit("read", lambda: None, 200.0, lambda value, error, over=finished: over.set())  # type: ignore[misc]
            assert finished.wait(60)
            assert len(loader._deadlines) <= 70
    finally:
        release.set()
        loader.close()
