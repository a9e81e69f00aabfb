"""Copies to a device that take their time: nothing waits for them, and nothing is overwritten under them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from fakes_adapters import LAYOUT, Bench, FakeAdapter, ref
from hypothesis import given
from hypothesis import strategies as st

from lorax_backend.adapters.page_runs import FreeRuns, best_run, runs


class Copy:
    """A copy whose end the test decides."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.waited = False

    def query(self) -> bool:
        return self.done.is_set()

    def synchronize(self) -> None:
        self.waited = True
        assert self.done.is_set(), "a loader thread would wait here"


class SlowCopies:
    """Makes a bench's arena copy as CUDA does: later."""

    def __init__(self, bench: Bench) -> None:
        self.copies: dict[int, Copy] = {}
        self._arena, self._write = bench.arena, bench.arena.write
        bench.arena.write = self.write  # type: ignore[assignment, method-assign]
        bench.arena.is_ready = self.is_ready  # type: ignore[method-assign]

    def write(self, slot: int, adapter: Any) -> Copy:
        self._write(slot, adapter)
        self.copies[slot] = Copy()
        return self.copies[slot]

    def is_ready(self, slot: int) -> bool:
        return self.copies[slot].query()


def numbered(*names: str, **options: int) -> dict[str, FakeAdapter]:
    return {name: FakeAdapter(float(index + 1), **options) for index, name in enumerate(names)}


def test_an_adapter_is_used_when_its_copy_is_over_and_a_wakeup_says_so() -> None:
    bench = Bench(**numbered("a"))
    slow = SlowCopies(bench)
    bench.load("a")
    assert bench.activate("a") is None, "the copy has only begun"
    assert bench.adapters.is_on_device(ref("a"))
    assert bench.activate("a") is None
    assert len(slow.copies) == 1, "begun once"
    (job,) = bench.loader.jobs
    slow.copies[0].done.set()
    before = bench.wakeups
    bench.loader.run(job)
    assert bench.wakeups > before
    assert bench.activate("a") == 0


def test_two_adapters_that_want_the_one_place_do_not_push_each_other_out() -> None:
    bench = Bench(num_pages=1, **numbered("a", "b"))
    slow = SlowCopies(bench)
    a, b = bench.load("a"), bench.load("b")
    assert bench.activate("a") is None
    assert bench.activate("b") is None
    slow.copies[0].done.set()
    assert bench.activate("b") is None, "a has been copied for a request that is still there"
    assert bench.activate("a") == 0
    bench.deactivate("a")
    bench.adapters.release(a)
    assert bench.activate("b") is None
    bench.clock.now += 2
    assert bench.on_device() == {"b"}
    bench.adapters.release(b)


def test_a_place_kept_for_a_request_that_goes_is_free_at_once() -> None:
    bench = Bench(num_pages=1, **numbered("a", "b"))
    slow = SlowCopies(bench)
    a = bench.load("a")
    bench.load("b")
    assert bench.activate("a") is None
    bench.adapters.release(a)
    assert bench.activate("b") is None
    assert bench.on_device() == {"b"}
    slow.copies[0].done.set()
    assert bench.activate("b") == 0


def test_a_prefetched_adapter_is_there_when_it_is_wanted() -> None:
    bench = Bench(**numbered("a"))
    slow = SlowCopies(bench)
    bench.load("a")
    bench.adapters.prefetch([ref("a")])
    slow.copies[0].done.set()
    assert bench.activate("a") == 0


def test_host_pages_are_written_again_only_after_the_copy_from_them() -> None:
    bench = Bench(num_pages=2, host_pages=1, **numbered("a", "b"))
    slow = SlowCopies(bench)
    a = bench.load("a")
    bench.adapters.prefetch([ref("a")])
    bench.adapters.release(a)
    bench.acquire("b")
    jobs = list(bench.loader.jobs)
    fetch = next(job for job in jobs if job.lane == "download")
    bench.loader.run(fetch)
    bench.adapters.poll()
    read = next(job for job in bench.loader.jobs if job.lane == "read")
    slow.copies[0].done.set()
    bench.loader.run(read)
    assert slow.copies[0].waited, "on the loader's thread"
    bench.adapters.poll()
    assert bench.is_loaded("b")


def test_a_read_that_was_given_up_keeps_its_pages_until_its_thread_is_done() -> None:
    bench = Bench(host_pages=1, **numbered("a", "b"))
    handle = bench.acquire("a")
    bench.loader.run(bench.loader.jobs[0])
    bench.adapters.poll()
    read = bench.loader.jobs.pop()
    read.done(None, TimeoutError("took longer than its time"))
    assert {failure.handle for failure in bench.adapters.poll()} == {handle}
    bench.check()
    bench.acquire("b")
    bench.settle()
    assert bench.status("b") == "fetched", "the thread may still write there"
    read.work()
    bench.settle()
    assert bench.is_loaded("b")
    assert set(bench.memory.pages(0, 1).flatten().tolist()) == {2.0}


def test_host_room_is_made_of_the_least_wanted_neighbours() -> None:
    bench = Bench(num_pages=8, host_pages=4, big=FakeAdapter(9.0, rank=16), **numbered("a", "b", "c", "d"))
    for name in "abcd":
        bench.adapters.release(bench.load(name))
    for _ in range(3):
        bench.adapters.release(bench.load("b"))
    bench.load("big")
    assert {entry["id"] for entry in bench.adapters.describe()} == {"a", "b", "big"}


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(1, 6)), max_size=40))
def test_free_runs_never_touch_and_lose_nothing(steps: list[tuple[int, int]]) -> None:
    free, taken = FreeRuns(20), set[int]()
    held: list[tuple[int, int]] = []
    for number, count in steps:
        first = best_run(free, count)
        if first is None or (number % 3 == 0 and held):
            if held:
                first, count = held.pop(number % len(held))
                free.give(first, count)
                taken -= set(range(first, first + count))
            continue
        assert not taken & set(range(first, first + count))
        free.take(first, count)
        taken |= set(range(first, first + count))
        held.append((first, count))
        assert list(free) == list(runs(page for page in range(20) if page not in taken))
        assert free.num_free == 20 - len(taken)


def test_taking_what_is_taken_is_a_defect() -> None:
    free = FreeRuns(4)
    free.take(1, 2)
    with pytest.raises(RuntimeError, match="not free"):
        free.take(0, 2)


def test_pages_next_to_each_other_are_preferred_on_the_device() -> None:
    bench = Bench(num_pages=6, max_slots=6, wide=FakeAdapter(9.0, rank=16), **numbered("a", "b", "c", "d"))
    for name in "abcd":
        bench.load(name)
        bench.activate(name)
    for name in "ac":
        bench.deactivate(name)
        bench.adapters.evict(bench.adapters._loading.records[ref(name)])
    bench.load("wide")
    slot = bench.activate("wide")
    assert slot is not None
    assert bench.arena.slot_pages[slot][:2].tolist() == [4, 5]
    assert LAYOUT.page_size == bench.arena.pages.shape[1]
