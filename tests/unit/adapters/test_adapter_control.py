"""What operators do with adapters, and that it disturbs no request."""

from __future__ import annotations

from typing import Any

import pytest
from fakes_adapters import Bench, FakeAdapter, ref

from lorax_backend.errors import AdapterIncompatibleError, AdapterTooLargeError, ValidationError
from lorax_backend.types import AdapterRef


def numbered(*names: str, **options: int) -> dict[str, FakeAdapter]:
    return {name: FakeAdapter(float(index + 1), **options) for index, name in enumerate(names)}


def command(bench: Bench, name: str, adapter_id: str = "a", **arguments: Any) -> dict[str, Any]:
    arguments = {"adapter_id": adapter_id, "adapter_source": "fake", **arguments}
    answer = bench.adapters.control(f"adapter_{name}", arguments)
    bench.check()
    return answer


def row(bench: Bench, name: str = "a") -> dict[str, Any]:
    return next(entry for entry in bench.adapters.describe() if entry["id"] == name and not entry["retired"])


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_an_adapter_is_preloaded_to_a_tier_without_waiting(tier: str) -> None:
    bench = Bench(**numbered("a"))
    assert command(bench, "preload", tier=tier)["status"] == "loading"
    assert not bench.settle()
    if tier == "disk":
        assert bench.source.fetches
        assert bench.adapters.stats()["loads"] == 0
        return
    assert row(bench)["tier"] == tier
    assert command(bench, "preload", tier=tier)["status"] == "ready"
    assert bench.adapters.stats()["known"] == 1
    assert row(bench)["requests"] == 0


def test_a_loaded_adapter_is_moved_to_the_device_at_once() -> None:
    bench = Bench(**numbered("a"))
    bench.load("a")
    assert command(bench, "preload")["status"] == "ready"
    assert bench.on_device() == {"a"}


def test_a_pinned_adapter_stays_while_others_come_and_go() -> None:
    """LoRAX's A61: preloaded adapters switched dynamic loading off."""
    bench = Bench(num_pages=2, host_pages=2, **numbered("a", "b", "c", "d"))
    command(bench, "preload", pin=True)
    assert not bench.settle()
    assert row(bench)["pinned"] == "device"
    for name in "bcdbcd":
        handle = bench.load(name)
        assert bench.activate(name) is not None
        bench.deactivate(name)
        bench.adapters.release(handle)
        assert "a" in bench.on_device()
    assert row(bench)["pinned"] == "device"
    command(bench, "unpin")
    for name in "bc":
        bench.load(name)
        bench.activate(name)
    assert bench.on_device() == {"b", "c"}


def test_pins_leave_room_for_others_and_what_can_never_fit_beside_them_is_refused() -> None:
    bench = Bench(num_pages=3, big=FakeAdapter(9.0, rank=24), **numbered("a", "b", "c"))
    for name in "ab":
        command(bench, "pin", name)
    assert not bench.settle()
    with pytest.raises(ValidationError, match="no room"):
        command(bench, "pin", "c")
    bench.load("big")
    assert not bench.adapters.fits(ref("big"))
    bench.load("c")
    assert bench.adapters.fits(ref("c"))
    assert bench.activate("c") is not None


def test_a_failed_preload_is_told_in_the_list_until_it_is_tried_again() -> None:
    bench = Bench(**numbered("a"))
    bench.source.adapters["a"].error = AdapterIncompatibleError("wrong shapes")
    command(bench, "preload", pin=True)
    assert not bench.settle(), "no request failed"
    assert (row(bench)["status"], row(bench)["error"]) == ("failed", "wrong shapes")
    assert row(bench)["error_type"] == AdapterIncompatibleError.error_type
    command(bench, "preload")
    assert not bench.settle()
    assert row(bench)["status"] == "on_device"


def test_a_failed_reload_is_told_beside_the_old_weights_until_the_next_one() -> None:
    bench = Bench(**numbered("a"))
    bench.load("a")
    assert "last_error" not in row(bench)
    bench.source.adapters["a"].error = AdapterIncompatibleError("wrong shapes")
    command(bench, "reload")
    assert not bench.settle(), "no request failed"
    found = row(bench)
    assert (found["tier"], found["last_error"]) == ("host", "wrong shapes")
    assert found["error_type"] == AdapterIncompatibleError.error_type
    command(bench, "reload")
    assert "last_error" not in row(bench)
    assert not bench.settle()
    assert "last_error" not in row(bench)


def test_unloading_waits_for_the_requests_under_way_and_new_ones_load_anew() -> None:
    bench = Bench(**numbered("a"))
    old = bench.load("a")
    slot = bench.activate("a")
    assert command(bench, "unload")["status"] == "unloading"
    current = bench.adapters.resolve(ref("a"))
    assert current != ref("a")
    bench.adapters.acquire(500, current, None)
    assert not bench.settle()
    assert len(bench.source.fetches) == 2
    assert bench.adapters.activate(current) not in (None, slot)
    bench.deactivate("a")
    bench.adapters.release(old)
    assert bench.adapters.stats()["known"] == 1
    bench.adapters.deactivate(current)
    bench.adapters.release(500)
    assert command(bench, "unload")["status"] == "unloaded"
    assert command(bench, "unload")["status"] == "not_loaded"
    assert bench.adapters.describe() == []
    assert bench.adapters.resolve(ref("a")) == ref("a"), "nothing is left of the old generations"


def test_a_reload_gives_new_requests_the_new_weights_and_old_ones_keep_theirs() -> None:
    """LoRAX's B15: a prefix cache must never mix the two."""
    bench = Bench(num_pages=4, **numbered("a"))
    old = bench.load("a")
    slot = bench.activate("a")
    assert slot is not None
    key = bench.adapters.cache_key(ref("a"))
    bench.source.adapters["a"].number = 7.0
    assert command(bench, "reload")["status"] == "loading"
    assert bench.adapters.resolve(ref("a")) == ref("a"), "until the new weights are here"
    assert not bench.settle()
    current = bench.adapters.resolve(ref("a"))
    bench.adapters.acquire(500, current, None)
    assert bench.adapters.is_ready(500, current)
    new_slot = bench.adapters.activate(current)
    assert new_slot is not None
    assert (bench.content(slot), bench.content(new_slot)) == ({1.0}, {7.0})
    assert bench.adapters.cache_key(current) != key == bench.adapters.cache_key(ref("a"))
    bench.deactivate("a")
    assert bench.activate("a") == slot, "preempted and back: still the old weights"
    bench.deactivate("a")
    bench.adapters.release(old)
    assert bench.on_device() == {"a"}
    assert bench.adapters.stats()["pages_used"] == 1
    assert bench.adapters.stats()["reloads"] == 1


def test_old_weights_whose_requests_are_not_over_are_never_lost() -> None:
    bench = Bench(num_pages=1, host_pages=4, **numbered("a", "b", "c"))
    bench.load("a")
    bench.activate("a")
    bench.source.adapters["a"].number = 7.0
    command(bench, "reload")
    bench.settle()
    bench.deactivate("a")  # preempted
    for name in "bc":
        handle = bench.load(name)
        assert bench.activate(name) is not None
        bench.deactivate(name)
        bench.adapters.release(handle)
    slot = bench.activate("a")
    assert slot is not None
    assert bench.content(slot) == {1.0}
    assert bench.source.fetches.count(("a", None)) == 2, "the first load and the reload"


def test_a_reload_of_the_same_weights_changes_nothing() -> None:
    bench = Bench(**numbered("a"))
    bench.load("a")
    command(bench, "reload")
    assert not bench.settle()
    assert bench.adapters.resolve(ref("a")) == ref("a")
    assert bench.adapters.stats()["known"] == bench.adapters.stats()["loads"] == 1


def test_a_reload_that_fails_leaves_the_old_weights_in_place() -> None:
    bench = Bench(**numbered("a"))
    handle = bench.load("a")
    bench.source.adapters["a"].error = AdapterIncompatibleError("wrong shapes")
    command(bench, "reload")
    assert not bench.settle()
    assert bench.is_ready("a", handle)
    assert bench.adapters.resolve(ref("a")) == ref("a")
    assert bench.adapters.stats()["known"] == 1


def test_a_reload_keeps_the_pin() -> None:
    bench = Bench(**numbered("a"))
    command(bench, "pin")
    bench.settle()
    bench.source.adapters["a"].number = 7.0
    command(bench, "reload")
    bench.settle()
    assert (row(bench)["pinned"], row(bench)["tier"]) == ("device", "device")
    assert bench.adapters.stats()["pages_used"] == 1


def test_an_adapter_that_changed_while_its_requests_were_put_aside_is_not_mixed_in() -> None:
    bench = Bench(num_pages=1, host_pages=1, **numbered("a", "b"))
    old = bench.load("a")
    bench.activate("a")
    bench.acquire("b")
    bench.settle()  # b takes a's place on the host, for a runs on the device
    bench.source.adapters["a"].number = 7.0
    bench.deactivate("a")
    assert bench.activate("b") is not None
    assert "changed" in str(bench.settle()[old])


def test_purging_forgets_weights_and_errors() -> None:
    bench = Bench(**numbered("a", "b"))
    for name in "ab":
        bench.adapters.release(bench.load(name))
    assert command(bench, "purge")["status"] == "purging"
    assert {entry["id"] for entry in bench.adapters.describe()} == {"b"}
    assert bench.adapters.control("adapter_purge", {"all": True})["status"] == "purging"
    assert bench.adapters.describe() == []
    bench.load("a")


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("adapter_fly", {}, "adapter_preload"),
        ("adapter_preload", {}, "adapter_id is missing"),
        ("adapter_preload", {"adapter_id": 3}, "must be a string"),
        ("adapter_preload", {"adapter_id": "a", "speed": 3}, "'speed'"),
        ("adapter_preload", {"adapter_id": "a", "adapter_source": "fake", "tier": "tape"}, "'tape'"),
        ("adapter_preload", {"adapter_id": "a", "adapter_source": "fake", "pin": "yes"}, "true or false"),
        ("adapter_pin", {"adapter_id": "a", "adapter_source": "fake", "tier": "disk"}, "tier"),
        ("adapter_preload", {"adapter_id": "a", "adapter_source": "gcs"}, "adapter_source"),
    ],
)
def test_bad_commands_are_refused_by_name(name: str, arguments: dict[str, Any], words: str) -> None:
    bench = Bench(**numbered("a"))
    with pytest.raises(ValidationError, match=words):
        bench.adapters.control(name, arguments)
    assert bench.adapters.describe() == []


def test_prefetching_takes_only_room_that_nobody_needs() -> None:
    bench = Bench(num_pages=2, **numbered("a", "b", "c"))
    for name in "ab":
        bench.load(name)
    bench.adapters.prefetch([ref("a"), ref("b"), AdapterRef("fake", "unknown")])
    assert bench.on_device() == {"a", "b"}
    handle = bench.load("c")
    bench.adapters.prefetch([ref("c")])
    assert bench.on_device() == {"a", "b"}, "requests wait for both"
    bench.adapters.release(handle)


def test_the_list_tells_what_operators_ask_for() -> None:
    bench = Bench(a=FakeAdapter(1.0, rank=9))
    for _ in range(3):
        bench.load("a")
    bench.activate("a")
    bench.clock.now += 5
    found = row(bench)
    assert (found["tier"], found["rank"], found["hits"], found["users"]) == ("device", 9, 3, 1)
    assert (found["last_used_s"], found["pinned"], found["requests"]) == (5.0, None, 3)
    stats = bench.adapters.stats()
    assert stats["tier_hits"] == {"device": 0, "host": 2, "disk": 0, "remote": 1}
    assert stats["tier_loads"] == {"device": 1, "host": 1, "disk": 1}
    assert {tier: histogram["count"] for tier, histogram in stats["load_seconds"].items()} == stats[
        "tier_loads"
    ]
    assert stats["running"] == ["fake:a"]
    assert stats["popular"] == {"fake:a": 3}


def test_an_adapter_too_large_is_told_to_its_requests_beside_a_preload() -> None:
    bench = Bench(num_pages=1, host_pages=1, a=FakeAdapter(1.0, rank=16))
    command(bench, "preload")
    handle = bench.acquire("a")
    assert isinstance(bench.settle()[handle], AdapterTooLargeError)
    assert row(bench)["status"] == "failed"


def test_a_command_without_a_right_to_a_private_adapter_pins_nothing() -> None:
    bench = Bench(a=FakeAdapter(1.0, tokens={"alice"}))
    handle = bench.acquire("a", "alice")
    command(bench, "pin")
    assert not bench.settle()
    assert bench.is_ready("a", handle)
    assert row(bench)["pinned"] is None
    command(bench, "pin", api_token="alice")
    assert not bench.settle()
    assert row(bench)["pinned"] == "device"


def test_a_pin_that_turns_out_too_large_is_told_and_not_made() -> None:
    bench = Bench(num_pages=4, big=FakeAdapter(9.0, rank=24), **numbered("a"))
    command(bench, "pin", "a")
    command(bench, "pin", "big")
    assert not bench.settle()
    assert row(bench, "big")["pinned"] is None
    assert row(bench, "a")["pinned"] == "device"
