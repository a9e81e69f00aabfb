"""Loads, failures, permissions and evictions, one decision at a time."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fakes_adapters import PAGE_BYTES, Bench, FakeAdapter, ref

from lorax_backend.adapters.loader import LoadTimeoutError
from lorax_backend.adapters.registry import AdapterRecord, AdapterStatus
from lorax_backend.errors import (
    AdapterDownloadError,
    AdapterError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    AdapterUnauthorizedError,
    ValidationError,
)
from lorax_backend.types import AdapterRef


def numbered(*names: str, **options: int) -> dict[str, FakeAdapter]:
    return {name: FakeAdapter(float(index + 1), **options) for index, name in enumerate(names)}


def test_200_requests_for_one_adapter_are_one_load() -> None:
    bench = Bench(**numbered("a"))
    for _ in range(200):
        bench.acquire("a")
    assert len(bench.loader.jobs) == 1
    assert not bench.settle()
    assert bench.source.fetches == [("a", None)]
    assert bench.adapters.stats()["loads"] == 1
    assert bench.is_loaded("a")


def test_a_loaded_adapter_goes_to_the_device_and_stays() -> None:
    bench = Bench(**numbered("a"))
    assert bench.activate("a") is None, "not known"
    handle = bench.acquire("a")
    assert bench.activate("a") is None, "not loaded"
    bench.settle()
    slot = bench.activate("a")
    assert slot is not None
    assert bench.content(slot) == {1.0}
    bench.deactivate("a")
    bench.adapters.release(handle)
    assert bench.on_device() == {"a"}
    bench.load("a")
    assert bench.activate("a") == slot
    assert bench.adapters.stats()["loads"] == 1


def test_a_wakeup_follows_everything_there_is_to_poll() -> None:
    bench = Bench(**numbered("a"))
    bench.acquire("a")
    for _ in range(2):  # fetched, read
        before = bench.wakeups
        bench.loader.run(bench.loader.jobs[0])
        assert bench.wakeups > before
        bench.adapters.poll()
    assert bench.is_loaded("a")
    before = bench.wakeups
    bench.adapters.acquire(99, AdapterRef("nowhere", "a"), None)
    assert bench.wakeups == before + 1


def test_an_unknown_source_and_a_bad_id_end_only_their_request() -> None:
    bench = Bench(**numbered("a"))
    bench.adapters.acquire(1, AdapterRef("s4", "a"), None)
    bench.adapters.acquire(2, AdapterRef("fake", ""), None)
    bench.adapters.acquire(3, ref("a"), None)
    failed = bench.settle()
    assert set(failed) == {1, 2}
    assert isinstance(failed[1], ValidationError)
    assert "'s4'" in failed[1].message
    assert "fake" in failed[1].message
    assert not bench.adapters.is_loaded(AdapterRef("s4", "a"))
    assert bench.is_loaded("a")


def test_all_spellings_share_one_load() -> None:
    bench = Bench(**numbered("a"))
    bench.acquire("a")
    bench.acquire("a/")
    bench.adapters.acquire(50, AdapterRef("FAKE", "a"), None)
    bench.settle()
    assert len(bench.source.fetches) == 1
    assert bench.adapters.cache_key(ref("a/")) == bench.adapters.cache_key(ref("a")) == "fake:a@commit-1.0"


def test_the_cache_key_is_only_known_of_loaded_weights() -> None:
    bench = Bench(**numbered("a"))
    bench.acquire("a")
    with pytest.raises(KeyError):
        bench.adapters.cache_key(ref("a"))


# Failures


@pytest.mark.parametrize("stage", ["error", "read_error"])
@pytest.mark.parametrize(
    "error",
    [
        AdapterIncompatibleError("wrong"),
        AdapterDownloadError("broke off"),
        AdapterTooLargeError("big"),
        LoadTimeoutError("took longer than 60 s"),
        MemoryError(),
        RuntimeError("a defect"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_ends_those_who_wait_and_the_next_request_tries_again(stage: str, error: Exception) -> None:
    bench = Bench(**numbered("bad", "good"))
    setattr(bench.source.adapters["bad"], stage, error)
    waiting = {bench.acquire("bad") for _ in range(3)}
    bench.acquire("good")
    failed = bench.settle()
    assert set(failed) == waiting
    assert all(isinstance(told, AdapterError) for told in failed.values())
    assert bench.status("bad") is None
    assert bench.is_loaded("good")
    for handle in waiting:
        bench.adapters.release(handle)  # as the engine does with every request that ends
    bench.load("bad")


def test_a_timeout_is_told_as_a_download_error() -> None:
    bench = Bench(**numbered("a"))
    bench.source.adapters["a"].error = LoadTimeoutError("took longer than 60 s")
    handle = bench.acquire("a")
    error = bench.settle()[handle]
    assert isinstance(error, AdapterDownloadError)
    assert "60 s" in str(error)


def test_a_missing_adapter_is_asked_for_again_only_after_a_moment() -> None:
    bench = Bench()
    for _ in range(50):
        handle = bench.acquire("x")
        assert isinstance(bench.settle()[handle], AdapterNotFoundError)
    assert len(bench.source.fetches) == 1
    bench.acquire("x", token="another")
    bench.settle()
    assert len(bench.source.fetches) == 2, "another token is another question"
    bench.clock.now += 2.1
    bench.source.adapters["x"] = FakeAdapter(1.0)
    bench.load("x")


def test_an_adapter_that_can_never_fit_is_refused_by_name() -> None:
    bench = Bench(
        num_pages=2, host_pages=3, max_rank=64, wide=FakeAdapter(1.0, rank=17), ok=FakeAdapter(2.0, rank=16)
    )
    handle = bench.acquire("wide")
    bench.acquire("ok")
    failed = bench.settle()
    assert set(failed) == {handle}
    assert isinstance(failed[handle], AdapterTooLargeError)
    assert "adapter_pages" in str(failed[handle])
    small_host = Bench(num_pages=4, host_pages=1, wide=FakeAdapter(1.0, rank=16))
    handle = small_host.acquire("wide")
    assert "adapter_host_bytes" in str(small_host.settle()[handle])


def test_a_client_that_goes_while_its_adapter_loads_harms_nobody() -> None:
    bench = Bench(**numbered("a", "b"))
    gone, stays = bench.acquire("a"), bench.acquire("a")
    bench.adapters.release(gone)
    bench.adapters.release(gone)
    bench.adapters.release(12345)
    bench.source.adapters["a"].error = AdapterIncompatibleError("wrong")
    assert set(bench.settle()) == {stays}
    last = bench.acquire("b")
    fetch = bench.loader.jobs[0]
    bench.loader.jobs.clear()  # a thread has taken it up, so that it cannot be cancelled
    bench.adapters.release(last)
    fetch.done(fetch.work(), None)
    assert not bench.settle()
    assert bench.adapters.describe() == []
    bench.load("b")


def test_a_load_that_nobody_waits_for_any_more_is_not_begun() -> None:
    bench = Bench(**numbered("a"))
    bench.adapters.release(bench.acquire("a"))
    assert not bench.loader.jobs
    assert bench.adapters.describe() == []
    bench.load("a")


def test_a_request_that_comes_back_joins_the_load_under_way() -> None:
    bench = Bench(**numbered("a"))
    first = bench.acquire("a")
    fetch = bench.loader.jobs.pop()
    bench.adapters.release(first)
    bench.acquire("a")
    fetch.done(fetch.work(), None)
    bench.settle()
    assert bench.source.fetches == [("a", None)]
    assert bench.is_loaded("a")


# Permission


def test_another_token_waits_for_permission_and_then_shares_the_weights() -> None:
    bench = Bench(a=FakeAdapter(1.0, tokens={"alice", "bob"}))
    alice = bench.load("a", "alice")
    bob = bench.acquire("a", "bob")
    assert not bench.is_ready("a", bob), "bob's right is not known yet"
    assert bench.is_ready("a", alice), "and holds up nobody"
    assert bench.activate("a") is not None
    assert not bench.settle()
    assert bench.is_ready("a", bob)
    assert bench.source.checks == [("a", "bob")]
    bench.acquire("a", "bob")
    assert bench.is_loaded("a"), "known by now"
    assert len(bench.source.fetches) == 1


def test_a_token_without_permission_never_gets_a_loaded_adapter() -> None:
    bench = Bench(a=FakeAdapter(1.0, tokens={"alice"}))
    alice = bench.load("a", "alice")
    mallory, nobody = bench.acquire("a", "mallory"), bench.acquire("a")
    assert not bench.is_loaded("a")
    failed = bench.settle()
    assert set(failed) == {mallory, nobody}
    assert all(isinstance(error, AdapterUnauthorizedError) for error in failed.values())
    assert bench.is_loaded("a"), "for alice"
    bench.adapters.release(alice)
    again = bench.acquire("a", "mallory")
    assert isinstance(bench.settle()[again], AdapterUnauthorizedError)
    assert len(bench.source.checks) == 2, "remembered for a moment"


def test_a_public_adapter_asks_for_nobodys_permission() -> None:
    bench = Bench(**numbered("a"))
    bench.load("a")
    bench.acquire("a", "whoever")
    assert bench.is_loaded("a")
    assert not bench.source.checks


def test_a_bad_token_does_not_spoil_the_load_for_a_good_one() -> None:
    bench = Bench(a=FakeAdapter(1.0, tokens={"alice"}))
    mallory, alice = bench.acquire("a", "mallory"), bench.acquire("a", "alice")
    failed = bench.settle()
    assert set(failed) == {mallory}
    assert bench.is_loaded("a")
    assert alice not in failed


def test_what_is_wrong_with_a_private_adapter_is_told_to_its_readers_only() -> None:
    bench = Bench(a=FakeAdapter(1.0, tokens={"alice"}, error=AdapterIncompatibleError("secret shapes")))
    alice, mallory = bench.acquire("a", "alice"), bench.acquire("a", "mallory")
    failed = bench.settle()
    assert isinstance(failed[alice], AdapterIncompatibleError)
    assert isinstance(failed[mallory], AdapterUnauthorizedError)


def test_a_held_back_request_that_goes_frees_the_others() -> None:
    bench = Bench(a=FakeAdapter(1.0, tokens={"alice"}))
    bench.load("a", "alice")
    mallory = bench.acquire("a", "mallory")
    assert not bench.is_loaded("a")
    before = bench.wakeups
    bench.adapters.release(mallory)
    assert bench.is_loaded("a")
    assert bench.wakeups > before
    assert not bench.settle()


def test_no_token_is_shown_to_operators() -> None:
    bench = Bench(a=FakeAdapter(1.0, tokens={"alice-secret"}))
    bench.load("a", "alice-secret")
    record = bench.adapters._loading.find(ref("a"))
    assert "alice-secret" not in str(bench.adapters.describe()) + repr(record)


# The device


def test_the_least_recently_used_idle_adapter_leaves_first() -> None:
    bench = Bench(num_pages=3, **numbered("a", "b", "c", "d", "e"))
    for name in "abc":
        bench.adapters.release(bench.load(name))
        bench.activate(name)
        bench.deactivate(name)
    bench.activate("a")
    bench.deactivate("a")
    bench.load("d")
    assert bench.activate("d") is not None
    assert bench.on_device() == {"c", "a", "d"}
    bench.load("e")
    assert bench.activate("e") is not None
    assert bench.on_device() == {"a", "d", "e"}
    assert bench.adapters.stats()["evictions"] == 2


def test_an_adapter_in_use_is_never_evicted() -> None:
    bench = Bench(num_pages=2, **numbered("a", "b", "c"))
    for name in "abc":
        bench.load(name)
    slots = {name: bench.activate(name) for name in "ab"}
    bench.activate("a")
    assert bench.activate("c") is None
    assert bench.on_device() == {"a", "b"}
    bench.deactivate("a")
    assert bench.activate("c") is None, "a has another user"
    bench.deactivate("a")
    assert bench.activate("c") == slots["a"]


def test_slots_run_out_too() -> None:
    bench = Bench(num_pages=4, max_slots=1, **numbered("a", "b"))
    for name in "ab":
        bench.load(name)
    assert bench.activate("a") == 0
    assert bench.activate("b") is None
    bench.deactivate("a")
    assert bench.activate("b") == 0
    assert bench.content(0) == {2.0}


def test_nothing_is_evicted_for_an_adapter_that_finds_no_room_anyway() -> None:
    bench = Bench(num_pages=4, **numbered("a", "b"), big=FakeAdapter(9.0, rank=32))
    for name in ("a", "b", "big"):
        bench.load(name)
    bench.activate("a")
    bench.activate("b")
    bench.deactivate("b")
    assert bench.activate("big") is None
    assert bench.on_device() == {"a", "b"}
    assert bench.adapters.fits(ref("big"))


def test_adapters_that_requests_wait_for_leave_last() -> None:
    bench = Bench(num_pages=2, **numbered("waited", "idle", "new"))
    bench.load("waited")
    bench.adapters.release(bench.load("idle"))
    for name in ("waited", "idle"):
        bench.activate(name)
        bench.deactivate(name)
    bench.load("new")
    assert bench.activate("new") is not None
    assert bench.on_device() == {"waited", "new"}


def test_an_adapter_evicted_while_wanted_and_gone_from_the_host_is_loaded_again() -> None:
    bench = Bench(num_pages=1, host_pages=1, **numbered("a", "b"))
    bench.load("a")
    bench.activate("a")
    waiting = bench.acquire("b")
    assert not bench.settle(), "b takes a's place on the host, for a runs on the device"
    assert bench.is_loaded("b")
    bench.deactivate("a")  # preempted, still wanted
    assert bench.activate("b") is not None
    assert bench.status("a") == "fetching"
    assert not bench.is_loaded("a")
    bench.deactivate("b")
    bench.adapters.release(waiting)
    assert not bench.settle()
    assert bench.is_loaded("a")
    slot = bench.activate("a")
    assert slot is not None
    assert bench.content(slot) == {1.0}


def test_deactivating_too_often_is_a_defect() -> None:
    bench = Bench(**numbered("a"))
    bench.load("a")
    with pytest.raises(RuntimeError, match="more often"):
        bench.deactivate("a")


# The host


def test_the_host_keeps_the_most_recently_used_within_its_bytes() -> None:
    bench = Bench(host_pages=3, **numbered("a", "b", "c", "d"))
    for name in "abc":
        bench.adapters.release(bench.load(name))
    bench.adapters.release(bench.load("a"))
    bench.adapters.release(bench.load("d"))
    assert bench.status("b") is None
    assert {entry["id"] for entry in bench.adapters.describe()} == {"a", "c", "d"}
    assert bench.adapters.stats()["host_bytes_used"] == 3 * PAGE_BYTES


def test_weights_wait_for_room_on_a_host_full_of_wanted_adapters() -> None:
    bench = Bench(num_pages=4, host_pages=2, **numbered("a", "b", "small"), big=FakeAdapter(9.0, rank=16))
    a, b = bench.load("a"), bench.load("b")
    bench.acquire("big")
    assert not bench.settle()
    assert bench.status("big") == "fetched"
    bench.adapters.release(a)
    assert not bench.settle()
    assert bench.status("big") == "fetched", "it needs both places"
    bench.acquire("small")
    assert not bench.settle()
    assert bench.is_loaded("small"), "one that is too big now holds up no other"
    assert bench.status("a") is None
    bench.adapters.release(b)
    before = bench.wakeups
    bench.activate("small")
    assert not bench.settle()
    assert bench.is_loaded("big")
    assert bench.wakeups > before


def test_a_fetched_adapter_nobody_wants_any_more_is_not_read() -> None:
    bench = Bench(host_pages=1, **numbered("a", "b"))
    bench.load("a")
    handle = bench.acquire("b")
    bench.settle()
    bench.adapters.release(handle)
    assert not bench.settle()
    assert bench.status("b") is None
    assert bench.adapters.stats()["host_bytes_used"] == PAGE_BYTES


def test_a_failed_read_gives_its_room_back() -> None:
    bench = Bench(host_pages=1, **numbered("a", "b"))
    bench.source.adapters["a"].read_error = AdapterIncompatibleError("NaN")
    handle = bench.acquire("a")
    assert set(bench.settle()) == {handle}
    assert bench.adapters.stats()["host_bytes_used"] == 0
    bench.load("b")


# Records


def test_describe_and_stats_tell_operators_what_is_there() -> None:
    bench = Bench(a=FakeAdapter(1.0, rank=9), b=FakeAdapter(2.0))
    bench.load("a")
    bench.activate("a")
    bench.acquire("b")
    first, second = bench.adapters.describe()
    assert (first["id"], first["status"], first["rank"], first["pages"]) == ("a", "on_device", 9, 2)
    assert (first["users"], first["requests"], first["bytes"]) == (1, 1, 2 * PAGE_BYTES)
    assert (first["source"], first["revision"], first["resolved_revision"]) == ("fake", None, "commit-1.0")
    assert (second["id"], second["status"]) == ("b", "fetching")
    stats = bench.adapters.stats()
    assert (stats["pages_total"], stats["pages_used"], stats["on_device"], stats["loading"]) == (4, 2, 1, 1)
    assert (stats["loads"], stats["evictions"]) == (1, 0)


def test_states_change_only_along_the_table() -> None:
    record = AdapterRecord(ref("a"))
    with pytest.raises(RuntimeError, match="fetching to on_device"):
        record.move(AdapterStatus.ON_DEVICE)
    record.move(AdapterStatus.FAILED, "why")
    assert record.describe(0.0)["error"] == "why"


def test_close_stops_the_loader() -> None:
    bench = Bench(**numbered("a"))
    bench.load("a")
    bench.adapters.close()
    assert bench.loader.closed
    assert bench.adapters.describe() == []


def test_policy_needs_neither_torch_nor_the_hub() -> None:
    names = [
        "lifecycle",
        "control",
        "disk_cache",
        "tiers",
        "tensor_names",
        "weight_files",
        "sources.local",
    ]
    code = "\n".join(f"import lorax_backend.adapters.{name}" for name in names)
    code += "\nimport sys; print(*sorted({'torch', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )
    assert result.stdout.split() == []
