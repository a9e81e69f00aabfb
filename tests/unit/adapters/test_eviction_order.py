"""Who leaves first: neither those asked for again and again, nor all just before their turn."""

from __future__ import annotations

from fakes_adapters import Bench, FakeAdapter, ref

from lorax_backend.adapters.eviction import EvictionOrder


def first(order: EvictionOrder) -> str:
    return next(iter(order)).id


def leave(order: EvictionOrder) -> str:
    left = first(order)
    order.remove(ref(left), evicted=True)
    return left


def ask(order: EvictionOrder, name: str, room: int) -> bool:
    """A request; True if its adapter was there."""
    found = ref(name) in order
    order.hit(ref(name))
    if not found:
        if len(order) == room:
            leave(order)
        order.add(ref(name), 1)
    return found


def test_one_that_was_asked_for_once_leaves_before_one_asked_for_again_however_long_ago() -> None:
    order = EvictionOrder()
    for name in ("again", "again", "once", "latest"):
        ask(order, name, 9)
    assert [leave(order) for _ in range(3)] == ["once", "latest", "again"]


def test_among_those_asked_for_as_often_the_least_recently_used_leaves() -> None:
    order = EvictionOrder()
    for name in ("a", "b", "c", "c", "a", "b"):
        ask(order, name, 9)
    order.touch(ref("c"))  # its request has just ended
    assert [leave(order) for _ in range(3)] == ["a", "b", "c"]


def test_a_scan_through_many_takes_no_favourites_place() -> None:
    order = EvictionOrder()
    favourites = [f"f{number}" for number in range(12)]
    for name in favourites * 3:
        ask(order, name, 16)
    for number in range(500):
        ask(order, f"s{number}", 16)
    assert all(ref(name) in order for name in favourites)


def test_old_favourites_make_room_for_new_ones() -> None:
    order = EvictionOrder()
    for name in [f"old{number}" for number in range(16)] * 20:
        ask(order, name, 16)
    found = [ask(order, f"new{number}", 16) for _ in range(40) for number in range(12)]
    assert all(found[-12:])


def test_one_that_had_to_leave_is_remembered_and_others_are_forgotten() -> None:
    order = EvictionOrder()
    for name in ("a", "a", "a", "b"):
        ask(order, name, 9)
    order.remove(ref("a"), evicted=True)
    for name in ("c", "a", "d", "e"):
        ask(order, name, 9)
    assert [leave(order) for _ in range(4)][-1] != "a", "one of the newcomers is spared"
    assert ref("a") in order
    order.remove(ref("a"))  # not evicted: unloaded, or replaced
    order.add(ref("a"), 1)
    order.add(ref("x"), 1)
    assert first(order) == "a"


def test_the_memory_of_those_who_left_is_bounded() -> None:
    order = EvictionOrder()
    for number in range(10_000):
        ask(order, f"a{number}", 32)
    assert len(order._past) <= 4 * 32


def test_requests_that_waited_for_a_load_count_as_asking_again() -> None:
    order = EvictionOrder()
    order.add(ref("crowd"), 1, requests=5)
    for number in range(20):
        ask(order, f"a{number}", 4)
    assert ref("crowd") in order


def test_u34_adapters_twice_the_slots_that_come_in_turn_are_often_still_there() -> None:
    """Others fall off a cliff here: with plain LRU each adapter is evicted just before its turn."""
    names = [f"a{number}" for number in range(16)]
    bench = Bench(num_pages=8, max_slots=8, **{name: FakeAdapter(float(n)) for n, name in enumerate(names)})
    rounds = 12
    for name in names * rounds:
        handle = bench.load(name)
        assert bench.activate(name) is not None
        bench.deactivate(name)
        bench.adapters.release(handle)
    hits = bench.adapters.stats()["tier_hits"]
    assert hits["device"] >= (rounds - 2) * 16 * 0.3
    assert hits["host"] == rounds * 16 - 16 - hits["device"]
