"""Every request's right to its adapter: asked for once in a while, never waited for by others."""

from __future__ import annotations

import pytest
from fakes_adapters import Bench, FakeAdapter

from lorax_backend.adapters.sources.tokens import token_digest
from lorax_backend.errors import AdapterDownloadError, AdapterUnauthorizedError


def private(**options: float) -> Bench:
    return Bench(a=FakeAdapter(1.0, tokens={"alice", "bob"}), **options)  # type: ignore[arg-type]


def test_a_cached_adapter_is_not_a_right_to_it() -> None:
    """LoRAX's A60: it asked once per process and adapter, so a second tenant needed no right."""
    bench = private()
    bench.load("a", "alice")
    assert bench.activate("a") is not None
    mallory = bench.acquire("a", "mallory")
    assert not bench.is_ready("a", mallory)
    assert isinstance(bench.settle()[mallory], AdapterUnauthorizedError)
    assert not bench.is_ready("a", mallory)


def test_one_who_waits_for_permission_holds_up_nobody() -> None:
    bench = private()
    alice = bench.load("a", "alice")
    bench.acquire("a", "mallory")
    assert bench.is_ready("a", alice)
    assert bench.activate("a") is not None


def test_a_right_is_asked_for_again_after_its_time_and_renewed_before_it() -> None:
    bench = private(auth_ttl_s=100.0)
    bench.load("a", "alice")
    bench.clock.now += 40
    assert bench.is_ready("a", bench.acquire("a", "alice"))
    assert bench.source.checks == [], "known well enough"
    assert not bench.loader.jobs
    bench.clock.now += 20
    renewed = bench.acquire("a", "alice")
    assert bench.is_ready("a", renewed), "renewed without waiting"
    assert not bench.settle()
    assert bench.source.checks == [("a", "alice")]
    bench.clock.now += 100
    late = bench.acquire("a", "alice")
    assert not bench.is_ready("a", late), "too old"
    assert not bench.settle()
    assert bench.is_ready("a", late)


def test_a_public_adapter_of_the_servers_own_disk_is_never_asked_about_again() -> None:
    bench = Bench(a=FakeAdapter(1.0), auth_ttl_s=100.0)
    bench.source.remote = False
    bench.load("a")
    bench.clock.now += 1000
    assert bench.is_ready("a", bench.acquire("a", "whoever"))
    assert not bench.loader.jobs
    assert bench.source.checks == []


def test_a_public_adapter_that_comes_over_the_network_is_asked_about_again() -> None:
    bench = Bench(a=FakeAdapter(1.0), auth_ttl_s=100.0)
    bench.load("a")
    bench.clock.now += 1000
    late = bench.acquire("a")
    assert not bench.is_ready("a", late)
    assert not bench.settle()
    assert bench.is_ready("a", late)


def test_a_right_that_was_taken_away_ends_with_its_time_but_ends_no_request_under_way() -> None:
    bench = private(auth_ttl_s=100.0)
    first = bench.load("a", "alice")
    bench.activate("a")
    bench.source.adapters["a"].tokens = {"bob"}
    bench.clock.now += 60
    second = bench.acquire("a", "alice")
    assert bench.is_ready("a", second)
    assert not bench.settle(), "both were let in before the source was asked again"
    assert bench.is_ready("a", first)
    third = bench.acquire("a", "alice")
    assert isinstance(bench.settle()[third], AdapterUnauthorizedError)
    assert bench.adapters.stats()["auth_denials"] >= 1


def test_an_adapter_that_became_private_is_closed_to_others_after_a_while() -> None:
    bench = Bench(auth_ttl_s=100.0, a=FakeAdapter(1.0))
    bench.load("a", "whoever")
    bench.source.adapters["a"].tokens = {"alice"}
    bench.clock.now += 101
    alice, mallory = bench.acquire("a", "alice"), bench.acquire("a", "mallory")
    assert set(bench.settle()) == {mallory}
    assert bench.is_ready("a", alice)


def test_without_a_time_to_live_every_request_is_asked_for() -> None:
    bench = private(auth_ttl_s=0.0)
    for _ in range(3):
        bench.adapters.release(bench.load("a", "alice"))
    assert bench.source.checks == [("a", "alice")] * 2


def test_a_source_that_is_away_takes_no_right_back_and_gives_none() -> None:
    bench = private(auth_ttl_s=100.0)
    bench.load("a", "alice")
    bench.source.check_error = AdapterDownloadError("the hub is away")
    bench.clock.now += 150
    alice, bob = bench.acquire("a", "alice"), bench.acquire("a", "bob")
    failed = bench.settle()
    assert set(failed) == {bob}
    assert bench.is_ready("a", alice)
    bench.clock.now += 4000
    alice = bench.acquire("a", "alice")
    assert isinstance(bench.settle()[alice], AdapterDownloadError), "not for ever"


def test_many_requests_of_one_token_are_one_question() -> None:
    bench = private()
    bench.load("a", "alice")
    for _ in range(50):
        bench.acquire("a", "bob")
    assert not bench.settle()
    assert bench.source.checks == [("a", "bob")]


@pytest.mark.parametrize("token", ["hf_secret", "hf_other"])
def test_a_digest_of_a_token_tells_nothing_but_equality(token: str) -> None:
    assert token_digest(token) == token_digest(token) != token_digest(token + "x")
    assert token not in token_digest(token)
    assert token_digest(None) == token_digest("") == ""


def test_operators_are_told_whether_everybody_may_use_an_adapter() -> None:
    bench = Bench(a=FakeAdapter(1.0, tokens={"alice"}), b=FakeAdapter(2.0))
    bench.acquire("b")
    assert [row["public"] for row in bench.adapters.describe()] == [False], "not known yet"
    bench.load("a", "alice")
    bench.load("b")
    assert {row["id"]: row["public"] for row in bench.adapters.describe()} == {"a": False, "b": True}
