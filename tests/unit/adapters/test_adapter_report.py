"""What the report of adapters costs and tells. It is made each second on the engine's thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from fakes_adapters import Bench, FakeAdapter, ref

from lorax_backend.adapters.disk_cache import DiskCache

SLOTS = 4


def lines_run(call: Callable[[], Any]) -> int:
    """Lines of Python that a call runs, as a measure of its work that no other load on the machine changes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def server_with(known: int) -> Bench:
    """So many adapters on the host, each asked for, and as many on the device as there are slots."""
    bench = Bench(
        num_pages=SLOTS,
        host_pages=known,
        max_slots=SLOTS,
        **{f"a{number}": FakeAdapter(float(number)) for number in range(known)},
    )
    for number in range(known):
        handle = bench.acquire(f"a{number}")
        assert not bench.settle()
        if number < SLOTS:
            assert bench.activate(f"a{number}") is not None
            bench.adapters.deactivate(ref(f"a{number}"))
        bench.adapters.release(handle)
    assert bench.adapters.stats()["known"] == known
    return bench


def test_the_report_costs_the_same_however_many_adapters_are_known() -> None:
    few, many = server_with(100), server_with(900)
    assert lines_run(many.adapters.stats) <= lines_run(few.adapters.stats) + 20


def test_the_most_asked_for_are_named_even_after_one_of_them_is_forgotten() -> None:
    bench = Bench(**{f"a{number}": FakeAdapter(float(number)) for number in range(80)})
    asked = {f"a{number}": 1 + number % 7 for number in range(80)}
    for name, times in asked.items():
        for _ in range(times):
            bench.adapters.release(bench.load(name))
    popular = bench.adapters.stats()["popular"]
    ranked = sorted(asked.values(), reverse=True)
    assert list(popular.values()) == ranked[:64]
    assert all(asked[name.removeprefix("fake:")] == times for name, times in popular.items())
    first = next(iter(popular)).removeprefix("fake:")
    bench.adapters.control("adapter_unload", {"adapter_id": first, "adapter_source": "fake"})
    assert f"fake:{first}" not in bench.adapters.stats()["popular"]
    for _ in range(9):
        bench.adapters.release(bench.load("a0"))  # asked for once until now, and without a place
    assert bench.adapters.stats()["popular"]["fake:a0"] == 10
    assert len(bench.adapters.stats()["popular"]) == 64


def test_the_report_counts_what_loads_waits_runs_and_is_pinned() -> None:
    bench = Bench(host_pages=3, **{name: FakeAdapter(1.0) for name in "abcde"})
    running = bench.load("a")
    assert bench.activate("a") is not None
    waiting = bench.load("b")
    bench.adapters.control("adapter_pin", {"adapter_id": "c", "adapter_source": "fake", "tier": "host"})
    bench.settle()
    loading = bench.acquire("d")
    stats = bench.adapters.stats()
    assert (stats["known"], stats["loading"], stats["pinned"]) == (4, 1, 1)
    assert (stats["running"], stats["waiting"]) == (["fake:a"], ["fake:b", "fake:d"])
    bench.adapters.control("adapter_unload", {"adapter_id": "c", "adapter_source": "fake"})
    bench.adapters.deactivate(ref("a"))
    for handle in (running, waiting, loading):
        bench.adapters.release(handle)
    bench.settle()
    stats = bench.adapters.stats()
    assert (stats["loading"], stats["pinned"], stats["running"], stats["waiting"]) == (0, 0, [], [])


def test_the_report_of_the_disk_waits_for_nobody_and_adds_nothing_up(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 1 << 20)
    held, done, released = threading.Event(), threading.Event(), []

    def hold() -> None:
        with cache._lock:  # as somebody does who looks for room
            held.set()
            released.append(done.wait(30))

    lines = []
    for number in range(60):
        folder = cache.repository("s3", f"a{number}") / "snapshots" / "r1"
        with cache.writing(cache.repository("s3", f"a{number}"), 100, f"a{number}"):
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_bytes(b"0" * 100)
            assert cache.lease("s3", f"a{number}", folder) is not None
        if number in (9, 59):
            lines.append(lines_run(cache.stats))
    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(30)
    stats = cache.stats()
    done.set()
    holder.join(60)
    assert released == [True], "the report came while the lock was held"
    assert (stats["entries"], stats["bytes_used"]) == (60, 6000)
    assert lines[0] == lines[1]
    cache.purge("s3", "a3")
    assert cache.stats()["bytes_used"] == 5900
    cache.shrink()
    assert cache.stats()["bytes_used"] == sum(entry["bytes"] for entry in cache.entries()) < 4500
    assert DiskCache(tmp_path / "cache", 1 << 20).stats()["bytes_used"] == cache.stats()["bytes_used"]
