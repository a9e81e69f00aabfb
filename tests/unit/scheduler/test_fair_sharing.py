"""Who gets how much, and who waits for whom, when adapters compete. Times are simulated."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from fakes_engine import FakeAdapter, FakeClock, FakeProvider, make_core, make_request, make_settings
from scheduler_simulation import Simulation, percentile, poisson

from lorax_backend.errors import OverloadedError
from lorax_backend.scheduler.settings import SchedulerSettings, parse_weights
from lorax_backend.types import EngineRequest

Arrivals = list[tuple[float, EngineRequest]]


def engine(**changes: int | float) -> SchedulerSettings:
    values: dict[str, int | float] = {
        "num_blocks": 4096,
        "block_size": 16,
        "max_num_seqs": 64,
        "max_batch_tokens": 1024,
        "max_input_length": 2048,
        "max_total_tokens": 4096,
    }
    return make_settings(**{**values, **changes})


def slots(count: int, *names: str, **options: int) -> FakeProvider:
    adapters = {name: FakeAdapter(**options) for name in names}
    return FakeProvider(adapters, num_slots=count, num_pages=count)


def victims(count: int = 200, rate: float = 12.0) -> Arrivals:
    """Ordinary traffic over eight adapters."""
    draw = random.Random(1)
    return [
        (
            at,
            make_request(
                n,
                [draw.randrange(9) for _ in range(draw.randrange(50, 200))],
                f"victim-{draw.randrange(8)}",
                max_new_tokens=draw.randrange(10, 60),
            ),
        )
        for n, at in enumerate(poisson(rate, count, draw))
    ]


def flood(count: int, prompt: int, answer: int, at: float = 1.0) -> Arrivals:
    """Requests of one adapter, all at once; no two share a prefix."""
    return [
        (at, make_request(10**6 + n, [n, *[1] * (prompt - 1)], "flood", max_new_tokens=answer))
        for n in range(count)
    ]


@pytest.mark.parametrize(("count", "prompt", "answer"), [(400, 50, 200), (100, 1500, 100), (300, 300, 300)])
def test_a_flood_of_one_adapter_makes_the_others_wait_little_longer_than_without_it(
    count: int, prompt: int, answer: int
) -> None:
    names = ["flood", *(f"victim-{n}" for n in range(8))]
    waits = []
    for arrivals in (victims(), victims() + flood(count, prompt, answer)):
        simulation = Simulation(engine(), slots(16, *names))
        simulation.run(arrivals)
        waits.append([simulation.outcomes[n].first_token_s or 0.0 for n in range(200)])
    quiet, noisy = waits
    assert percentile(noisy, 0.99) <= 1.5 * percentile(quiet, 0.99)
    assert sum(noisy) <= 1.5 * sum(quiet)


def test_adapters_that_compete_get_tokens_by_their_weights() -> None:
    settings = engine(max_num_seqs=16, adapter_weights={"heavy": 3.0})
    simulation = Simulation(settings, slots(4, "heavy", "light"))
    arrivals = [
        (0.0, make_request(2 * n + k, [n, k] * 20, name, max_new_tokens=30))
        for n in range(300)
        for k, name in enumerate(("heavy", "light"))
    ]
    for _, request in arrivals:
        simulation.add(request)
    while simulation.num_steps < 400:
        simulation.step()
    shares = simulation.tokens_of
    assert 2.6 <= shares["heavy"] / shares["light"] <= 3.4


def test_long_prompts_buy_no_larger_share_than_short_ones() -> None:
    simulation = Simulation(engine(max_num_seqs=16, prefix_caching=False), slots(4, "long", "short"))
    for n in range(200):
        simulation.add(make_request(n, [1] * 800, "long", max_new_tokens=10))
    for n in range(200, 1500):
        simulation.add(make_request(n, [1] * 40, "short", max_new_tokens=10))
    while simulation.num_steps < 300:
        simulation.step()
    assert 0.8 <= simulation.tokens_of["long"] / simulation.tokens_of["short"] <= 1.25


def test_what_was_used_while_nobody_else_waited_is_forgotten() -> None:
    simulation = Simulation(engine(max_num_seqs=8), slots(4, "early", "late"))
    for n in range(40):
        simulation.add(make_request(n, [n] * 100, "early", max_new_tokens=40))
    while simulation.num_steps < 100:
        simulation.step()
    simulation.tokens_of.clear()
    for n in range(100, 300):
        simulation.add(make_request(n, [n] * 100, "late", max_new_tokens=40))
        simulation.add(make_request(n + 1000, [n] * 100, "early", max_new_tokens=40))
    for _ in range(400):
        simulation.step()
    assert 0.75 <= simulation.tokens_of["late"] / simulation.tokens_of["early"] <= 1.33


def test_priority_buys_share_between_adapters_and_precedence_within_one() -> None:
    simulation = Simulation(engine(max_num_seqs=8), slots(4, "urgent", "normal"))
    for n in range(300):
        simulation.add(make_request(2 * n, [n] * 40, "urgent", max_new_tokens=20, priority=1))
        simulation.add(make_request(2 * n + 1, [n] * 40, "normal", max_new_tokens=20))
    while simulation.num_steps < 400:
        simulation.step()
    assert 1.7 <= simulation.tokens_of["urgent"] / simulation.tokens_of["normal"] <= 2.4


def test_an_adapter_runs_no_more_sequences_than_its_cap() -> None:
    core, runner, _ = make_core(make_settings(max_running_per_adapter=2), slots(4, "a", "b"))
    for n in range(12):
        core.add(make_request(n, [n], "ab"[n % 2], max_new_tokens=5))
    for _ in range(40):
        core.step()
    assert not core.has_work
    of_a = [sum(1 for handle, _ in batch if handle % 2 == 0) for batch in runner.batches]
    assert max(of_a) == 2
    assert max(map(len, runner.batches)) == 4


def test_requests_beyond_an_adapters_queue_are_refused_and_hurt_no_other_adapter() -> None:
    settings = make_settings(max_queued_per_adapter=3, max_num_seqs=1)
    core, _, provider = make_core(settings, slots(4, "a", "b"))
    outputs = [output for n in range(5) for output in core.add(make_request(n, [n], "a"))]
    assert [output.handle for output in outputs] == [3, 4]
    assert outputs[0].error is not None
    assert outputs[0].error["error_type"] == OverloadedError.error_type
    assert "local:a" in outputs[0].error["error"]
    assert "max_queued_per_adapter=3" in outputs[0].error["error"]
    assert core.add(make_request(9, [1], "b")) == []
    assert core.add(make_request(10, [1])) == []
    assert provider.num_wanted == 4


def test_preempted_sequences_take_no_places_in_their_adapters_queue() -> None:
    """They were let in before; else a shortage of blocks would refuse requests that the queue has room for."""
    settings = make_settings(max_queued_per_adapter=2, num_blocks=8, prefix_caching=False)
    core, _, _ = make_core(settings, slots(4, "a"))
    for n in range(2):
        core.add(make_request(n, [n] * 8, "a", max_new_tokens=20))
    while not core.scheduler.num_preemptions:
        core.step()
    assert core.scheduler.num_waiting == 1
    refused = [bool(core.add(make_request(n, [n] * 20, "a"))) for n in (2, 3, 4)]
    assert refused == [False, False, True]
    core.cancel(1)
    assert core.add(make_request(5, [5], "a")), (
        "one that was preempted gives up no place that it did not have"
    )
    core.cancel(2)
    assert core.add(make_request(6, [6], "a")) == []
    while core.has_work:
        core.step()
    assert [queue.preempted for queue in core.scheduler._waiting._queues.values()] == [0]


@pytest.mark.parametrize("adapter", [None, "late"])
def test_a_request_that_waits_too_long_is_refused_even_while_its_adapter_loads(adapter: str | None) -> None:
    clock = FakeClock()
    core, _, provider = make_core(make_settings(max_num_seqs=1), slots(4, "late", polls=1000), clock=clock)
    core.add(make_request(1, max_new_tokens=40))
    core.add(make_request(2, adapter=adapter, queue_timeout_s=2.0))
    core.add(make_request(3, queue_timeout_s=9.0))
    assert core.patience_s == 2.0
    clock.now = 1.9
    core.step()
    clock.now = 2.0
    errors = [output for output in core.step() if output.error]
    assert [output.handle for output in errors] == [2]
    assert errors[0].error is not None
    assert errors[0].error["error_type"] == "overloaded"
    assert "waited 2.0 s in the queue" in errors[0].error["error"]
    assert provider.num_wanted == 0
    assert core.patience_s == 7.0


def test_a_request_that_was_scheduled_in_time_is_not_refused_later() -> None:
    clock = FakeClock()
    core, _, _ = make_core(clock=clock)
    core.add(make_request(1, max_new_tokens=20, queue_timeout_s=2.0))
    core.step()
    assert core.patience_s is None
    clock.now = 5.0
    assert all(output.error is None for _ in range(25) for output in core.step())


def test_deadlines_of_requests_that_were_served_are_not_kept() -> None:
    core, _, _ = make_core()
    for n in range(1000):
        core.add(make_request(n, max_new_tokens=1, queue_timeout_s=3600.0))
        core.step()
    assert len(core.scheduler._deadlines) <= 64


def test_a_busy_adapter_yields_its_room_within_a_slice_and_what_runs() -> None:
    """LoRAX never takes room from an adapter with continuous traffic."""
    simulation = Simulation(
        engine(adapter_cycle_time_s=2.0), slots(1, "busy", "patient"), step_seconds=lambda _: 0.1
    )
    busy = [(0.1 * n, make_request(n, [n] * 10, "busy", max_new_tokens=8)) for n in range(300)]
    simulation.run([*busy, (0.5, make_request(999, [1], "patient"))])
    assert 1.5 <= (simulation.outcomes[999].queue_s or 0.0) <= 2.0 + 0.9


@pytest.mark.parametrize("num_adapters", [8, 16])
def test_adapters_twice_the_slots_cost_no_cliff(num_adapters: int) -> None:
    """Copies grow gently, since requests for an adapter on the device are taken together, and answers keep coming."""
    draw = random.Random(3)
    names = [f"adapter-{n}" for n in range(num_adapters)]
    provider = slots(8, *names)
    simulation = Simulation(engine(max_num_seqs=16, adapter_cycle_time_s=0.5), provider)
    arrivals = [
        (at, make_request(n, [n] * draw.randrange(20, 100), draw.choice(names), max_new_tokens=30))
        for n, at in enumerate(poisson(60.0, 800, draw))
    ]
    simulation.run(arrivals)
    busy_s = simulation.clock.now
    copies = provider.copies
    assert copies <= 800 * (0.45 if num_adapters > 8 else 0.02)
    assert busy_s <= 800 * 30 * 0.0125 / 16 * 1.25


def test_requests_of_adapters_on_the_device_are_taken_together() -> None:
    provider = slots(2, "a", "b", "c", "d")
    simulation = Simulation(engine(max_num_seqs=4), provider)
    for n in range(80):
        simulation.add(make_request(n, [n] * 20, "abcd"[n % 4], max_new_tokens=10))
    simulation.run([])
    assert provider.copies <= 20


def test_adapters_that_come_next_are_named_for_prefetching() -> None:
    provider = slots(1, "a", "b", "c")
    core, _, _ = make_core(make_settings(), provider)
    for n, name in enumerate("abc"):
        core.add(make_request(n, [n], name, max_new_tokens=9))
    core.step()
    assert [ref.id for ref in provider.prefetched] == ["b", "c"]


def test_an_adapter_whose_copy_is_under_way_makes_nobody_yield() -> None:
    clock = FakeClock()
    provider = slots(2, "a", "b")
    provider.copying.add("b")
    core, runner, _ = make_core(make_settings(adapter_cycle_time_s=1.0), provider, clock=clock)
    core.add(make_request(1, [1], "a", max_new_tokens=30))
    core.step()
    clock.now = 5.0
    core.add(make_request(2, [1], "b"))
    core.step()
    core.add(make_request(3, [1], "a"))
    core.step()
    assert [handle for handle, _ in runner.batches[-1]] == [1, 3]
    provider.copying.clear()
    core.step()
    assert {handle for handle, _ in runner.batches[-1]} == {1, 2, 3}


def test_rows_are_taken_back_from_a_flood_for_an_adapter_with_less_than_half_its_share() -> None:
    provider = slots(4, "flood", "victim")
    core, runner, _ = make_core(make_settings(num_blocks=200), provider)
    core.add(make_request(100, [1], "victim", max_new_tokens=1))
    core.step()
    provider.activate(make_request(0, adapter="victim").adapter)  # it stays on the device
    for n in range(8):
        core.add(make_request(n, [n], "flood", max_new_tokens=40))
    for _ in range(3):
        core.step()
    for n in range(101, 106):
        core.add(make_request(n, [n], "victim", max_new_tokens=40))
    for _ in range(6):
        core.step()
    counts = [sum(1 for handle, _ in runner.batches[-1] if handle > 100), len(runner.batches[-1])]
    assert counts == [2, 8]
    assert core.scheduler.num_preemptions == 1


@pytest.mark.parametrize(
    ("text", "weights"), [("", {}), ('{"a": 2, "__base_model__": 0.5}', {"a": 2.0, "__base_model__": 0.5})]
)
def test_weights_are_read_from_json(text: str, weights: dict[str, float]) -> None:
    assert parse_weights(text) == weights


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": "2"}', '{"a": true}'])
def test_weights_that_are_no_object_of_numbers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="adapter_weights"):
        parse_weights(text)


@pytest.mark.parametrize(
    "make", [lambda: engine(adapter_weights={"a": 0.0}), lambda: engine(adapter_cycle_time_s=-1.0)]
)
def test_a_weight_or_slice_that_makes_no_sense_is_refused(make: Callable[[], SchedulerSettings]) -> None:
    with pytest.raises(ValueError, match="adapter_"):
        make()


@pytest.mark.parametrize(("seconds", "tokens"), [(0.5, 256), (5.0, 1000)])
def test_steps_are_short_while_others_are_there_and_whole_a_second_after_they_have_gone(
    seconds: float, tokens: int
) -> None:
    clock = FakeClock()
    core, runner, _ = make_core(engine(), slots(2, "other", "busy"), clock=clock)
    core.add(make_request(1, [1, 2], "other", max_new_tokens=1))
    for _ in range(5):
        core.step()
    clock.now += seconds
    core.add(make_request(2, [2] * 1000, "busy", max_new_tokens=1))
    for _ in range(5):
        core.step()
    assert next(batch for batch in runner.batches if batch[0][0] == 2) == [(2, tokens)]
