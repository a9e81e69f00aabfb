"""The workloads of adapters that come and go; each returns its rows, and details for the result file."""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import exp, log
from pathlib import Path
from typing import Any

from adapter_life_engine import Driver, Load, Record
from adapter_life_report import (
    CHURN,
    COLD_DISK_EXTRA_MS,
    NOISY_RATIO,
    NOISY_VLLM,
    STALL_STEPS,
    STALL_VLLM,
    TIERS,
    Row,
    first_error,
    hit_ratios,
    rows_of,
    summarize,
)

from lorax_backend.types import AdapterRef

WEIGHTS = "adapter_model.safetensors"
PLACES = ("base", "device", "host", "page cache", "cold disk", "hub", "ram disk")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of each workload; tokens, seconds, counts."""

    churn_requests: tuple[tuple[float, int], ...] = ((4.0, 240), (12.0, 400))
    prompt: tuple[int, int] = (32, 512)
    output: tuple[int, int] = (32, 192)
    noisy_seconds: float = 20.0
    noisy_rate: float = 20.0
    victims: int = 8
    victim_rate: float = 0.5
    repeats: int = 8
    places: tuple[str, ...] = PLACES
    streams: int = 16
    stall_tokens: int = 400
    newcomers: int = 16
    newcomer_every_s: float = 0.15


# A CPU is busy with a fraction of what a GPU does beside it; full, it would show its own queue and not the adapters'.
CPU_SIZES = Sizes(prompt=(16, 128), output=(16, 64), noisy_rate=10.0)


@dataclass(slots=True)
class Fleet:
    """Adapters on disk: `adapters` of rank 16 by popularity-free number, one on a RAM disk (None: there is none),
    and names on the local hub, each to be used once."""

    adapters: list[AdapterRef]
    on_ram_disk: AdapterRef | None
    on_hub: Iterator[AdapterRef]


@dataclass(slots=True)
class Outcome:
    """What a workload found. `failures` names what must not happen on any machine."""

    rows: list[Row] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def require_answers(self, name: str, records: list[Record]) -> None:
        error = first_error(records)
        if error is not None:
            lost = sum(not record.answered for record in records)
            self.failures.append(f"{name}: {lost} of {len(records)} requests unanswered: {error}")


Workload = Callable[[Driver, Fleet, Sizes, bool], Outcome]


def zipf_order(rng: random.Random, adapters: list[AdapterRef], exponent: float = 1.0) -> Iterator[AdapterRef]:
    """Endless draws; who is popular is drawn too, so that it is not the order on disk."""
    order = list(adapters)
    rng.shuffle(order)
    weights = list(itertools.accumulate((rank + 1) ** -exponent for rank in range(len(order))))
    while True:
        yield rng.choices(order, cum_weights=weights)[0]


def poisson(rng: random.Random, rate: float) -> Iterator[float]:
    """Endless times of arrival, in seconds."""
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


def _between(rng: random.Random, bounds: tuple[int, int]) -> int:
    """Log-uniform."""
    return round(exp(rng.uniform(log(bounds[0]), log(bounds[1]))))


def churn(driver: Driver, fleet: Fleet, sizes: Sizes, judged: bool) -> Outcome:
    """Poisson arrivals, adapters by Zipf(1.0), log-uniform lengths, beginning with empty tiers."""
    outcome = Outcome()
    for rate, count in sizes.churn_requests:
        rng = random.Random(int(7 + rate))
        driver.forget_all()
        wanted, arrivals = zipf_order(rng, fleet.adapters), poisson(rng, rate)
        loads = [
            Load(next(arrivals), next(wanted), _between(rng, sizes.prompt), _between(rng, sizes.output))
            for _ in range(count)
        ]
        before = driver.control("stats")["adapter_tiers"]
        records = driver.run(loads)
        after = driver.control("stats")["adapter_tiers"]
        name = f"churn {rate:g}/s"
        summary = summarize(records)
        outcome.rows += rows_of(name, summary, CHURN.get(rate, {}), judged)
        outcome.details[name] = summary | {
            "adapters_used": len({load.adapter for load in loads}),
            "hit_ratios": hit_ratios(before, after),
            "device_loads": after["tier_loads"]["device"] - before["tier_loads"]["device"],
        }
        outcome.require_answers(name, records)
    return outcome


def noisy(driver: Driver, fleet: Fleet, sizes: Sizes, judged: bool) -> Outcome:
    """One adapter floods; what others, which send little, see of it."""
    outcome = Outcome()
    rng = random.Random(11)
    loud, *quiet = fleet.adapters[: sizes.victims + 1]

    def stream(adapter: AdapterRef, rate: float, group: str) -> list[Load]:
        times = itertools.takewhile(lambda t: t < sizes.noisy_seconds, poisson(rng, rate))
        return [Load(t, adapter, sizes.prompt[1] // 2, sizes.output[1] * 2 // 3, group) for t in times]

    victims = [load for adapter in quiet for load in stream(adapter, sizes.victim_rate, "victim")]
    flood = stream(loud, sizes.noisy_rate, "noisy")
    summaries = {}
    for name, loads in (("quiet", victims), ("flooded", victims + flood)):
        driver.forget_all()
        for adapter in (loud, *quiet):  # what is measured is the flood, not the first load
            driver.one(Load(0.0, adapter, 16, 2))
        records = driver.run(loads)
        outcome.require_answers(f"noisy, {name}", records)
        summaries[name] = summarize([record for record in records if record.load.group == "victim"])
        if name == "flooded":
            summaries["noisy one"] = summarize([r for r in records if r.load.group == "noisy"])
    against: dict[str, tuple[float | None, float | None]] = {
        name: (value, None) for name, value in NOISY_VLLM.items()
    }
    outcome.rows += rows_of("noisy, victims", summaries["flooded"], against, judged)
    ratio = summaries["flooded"]["ttft_p99"] / max(summaries["quiet"]["ttft_p99"], 1e-9)
    outcome.rows.append(
        Row("noisy, victims", "ttft_p99 over quiet run's", ratio, None, NOISY_RATIO if judged else None)
    )
    outcome.details["noisy"] = summaries
    return outcome


def tiers(driver: Driver, fleet: Fleet, sizes: Sizes, judged: bool) -> Outcome:
    """The first token of one request on an idle engine, by where its adapter is."""
    driver.forget_all()
    outcome = Outcome()
    adapter = fleet.adapters[0]
    reading: list[float] = []

    def from_cold_disk() -> AdapterRef:
        driver.unload(adapter)
        weights = Path(adapter.id, WEIGHTS)
        drop_from_page_cache(weights)
        started = time.perf_counter()
        weights.read_bytes()
        reading.append(1e3 * (time.perf_counter() - started))
        drop_from_page_cache(weights)
        return adapter

    def unloaded(ref: AdapterRef) -> AdapterRef:
        driver.unload(ref)
        return ref

    def on_host() -> AdapterRef:
        driver.to_host(adapter)
        return adapter

    ram = fleet.on_ram_disk
    places: dict[str, Callable[[], AdapterRef | None]] = {
        "base": lambda: None,
        "device": lambda: adapter,
        "host": on_host,
        "page cache": lambda: unloaded(adapter),
        "cold disk": from_cold_disk,
        "hub": lambda: next(fleet.on_hub),
    }
    if ram is not None:
        places["ram disk"] = lambda: unloaded(ram)
    for _ in range(2):
        driver.one(Load(0.0, adapter, 128, 4))
    for place, prepare in places.items():
        if place not in sizes.places:
            continue
        records = []
        for _ in range(sizes.repeats):
            ref = prepare()
            time.sleep(0.05)  # the engine is idle again
            records.append(driver.one(Load(0.0, ref, 128, 4)))
        outcome.require_answers(f"tiers, {place}", records)
        times = [record.ttft_ms for record in records if record.answered]
        if not times:
            continue
        vllm, goal = TIERS[place] if judged else (None, None)
        if place == "cold disk" and judged:
            goal = statistics.median(reading) + COLD_DISK_EXTRA_MS
        outcome.rows.append(Row("tiers, idle engine", f"ttft {place}", statistics.median(times), vllm, goal))
        outcome.details[place] = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    if reading:
        outcome.details["reading the cold file"] = {"median": statistics.median(reading)}
    return outcome


def stall(driver: Driver, fleet: Fleet, sizes: Sizes, judged: bool) -> Outcome:
    """Warm streams decode while newcomers arrive: nobody, adapters that are on the device, adapters on cold disk."""
    driver.forget_all()
    outcome = Outcome()
    warm = fleet.adapters[: sizes.streams]
    cold = fleet.adapters[sizes.streams : sizes.streams + sizes.newcomers]
    for adapter in warm:
        driver.one(Load(0.0, adapter, 16, 2))

    def drop(load: Load) -> None:
        if load.group == "newcomer" and load.adapter is not None:
            drop_from_page_cache(Path(load.adapter.id, WEIGHTS))

    summaries = {}
    for name, newcomers in (
        ("nobody comes", []),
        ("resident newcomers", warm[: sizes.newcomers]),
        ("cold newcomers", cold),
    ):
        loads = [Load(0.0, adapter, 128, sizes.stall_tokens, "stream") for adapter in warm]
        loads += [
            Load(0.5 + n * sizes.newcomer_every_s, a, 128, 8, "newcomer") for n, a in enumerate(newcomers)
        ]
        records = driver.run(loads, drop if name == "cold newcomers" else None)
        outcome.require_answers(f"stall, {name}", records)
        streams = [steady(record) for record in records if record.load.group == "stream"]
        summaries[name] = summarize(streams)
        arrived = [record for record in records if record.load.group == "newcomer"]
        summaries[name]["newcomers_ttft_p50"] = summarize(arrived)["ttft_p50"]
    step = summaries["nobody comes"]["itl_p50"]
    for name, summary in summaries.items():
        summary["worst_stall_in_steps"] = summary["worst_stall"] / step if step else 0.0
        vllm = STALL_VLLM if judged and name == "cold newcomers" else {}
        rows = [
            Row(f"stall, {name}", n, summary[n], vllm.get(n)) for n in ("itl_p50", "itl_p99", "worst_stall")
        ]
        goal = STALL_STEPS if judged and name == "cold newcomers" else None
        rows.append(
            Row(f"stall, {name}", "worst stall, median steps", summary["worst_stall_in_steps"], None, goal)
        )
        outcome.rows += rows
    outcome.details["stall"] = summaries
    return outcome


def steady(record: Record, after: int = 8) -> Record:
    """Without the first tokens, among which the other streams' prompts are still computed."""
    return replace(
        record, times=record.times[after:], load=replace(record.load, output=record.load.output - after)
    )


def drop_from_page_cache(file: Path) -> None:
    """The next reader gets it from the disk; without effect on a RAM disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


WORKLOADS: dict[str, Workload] = {"churn": churn, "noisy": noisy, "tiers": tiers, "stall": stall}
