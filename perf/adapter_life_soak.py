"""Thousands of adapters under Zipf traffic for minutes: everything is answered, and memory stays flat."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_life_engine import Driver, Load, Record
from adapter_life_report import Row, hit_ratios
from adapter_life_workloads import Outcome, poisson, zipf_order
from stream_stats import percentile

from lorax_backend.types import AdapterRef

_WARM_UP = 0.25  # share of the time after which memory is judged: tiers full, allocators warm
_MAX_GROWTH = 0.03  # of the memory at that point, from there to the end
_MAX_GROWTH_BYTES = 24 << 20  # less is noise of allocators
_MAX_IN_FLIGHT = 96  # more wait for an answer first, so that a slow machine is loaded, not drowned


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """How long and how much; `rate` in requests a second."""

    minutes: float
    rate: float
    prompt: tuple[int, int] = (16, 128)
    output: tuple[int, int] = (8, 32)
    seed: int = 23


@dataclass(slots=True)
class _Tally:
    """What is kept of the answers: numbers, not tokens, lest the driver grows by what it measures."""

    answered: int = 0
    unanswered: int = 0
    first_error: str = ""
    ttft: list[float] = field(default_factory=list)
    worst_stall: float = 0.0

    def add(self, record: Record) -> None:
        if record.answered:
            self.answered += 1
            self.ttft.append(record.ttft_ms)
            self.worst_stall = max(self.worst_stall, max(record.gaps_ms, default=0.0))
        else:
            self.unanswered += 1
            self.first_error = self.first_error or record.error or f"{len(record.times)} tokens"


def memory_trend(samples: Sequence[tuple[float, float]], warm_up: float = _WARM_UP) -> dict[str, Any]:
    """How memory moved after a warm-up. `samples` are (seconds, bytes).

    `growth` is the larger of two: the least-squares line's over the judged time, and the median of its last quarter
    over that of its first. `flat`: it is within the tolerance.
    """
    end = samples[-1][0]
    judged = [(t, b) for t, b in samples if t >= warm_up * end]
    quarter = max(1, len(judged) // 4)
    first = percentile([b for _, b in judged[:quarter]], 0.5)
    last = percentile([b for _, b in judged[-quarter:]], 0.5)
    mean_t = sum(t for t, _ in judged) / len(judged)
    mean_b = sum(b for _, b in judged) / len(judged)
    spread = sum((t - mean_t) ** 2 for t, _ in judged)
    slope = sum((t - mean_t) * (b - mean_b) for t, b in judged) / spread if spread else 0.0
    growth = max(last - first, slope * (judged[-1][0] - judged[0][0]))
    allowed = max(_MAX_GROWTH * first, float(_MAX_GROWTH_BYTES))
    mib = float(1 << 20)
    return {
        "samples": len(judged), "first_mib": round(first / mib, 1), "last_mib": round(last / mib, 1),
        "slope_mib_per_min": round(60 * slope / mib, 3), "growth_mib": round(growth / mib, 2),
        "allowed_mib": round(allowed / mib, 1), "flat": growth <= allowed,
    }  # fmt: skip


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gpu_bytes(pid: int) -> int | None:
    """GPU memory of a process; that in use on the first GPU where the driver does not tell processes apart; None
    without a GPU."""
    processes = _nvidia_smi("--query-compute-apps=pid,used_memory")
    own = [int(used) for found, used in processes if found == str(pid) and used.isdigit()]
    whole = [int(used) for (used,) in _nvidia_smi("--query-gpu=memory.used", "--id=0") if used.isdigit()]
    return sum(own) << 20 if own else whole[0] << 20 if whole else None


def _nvidia_smi(*query: str) -> list[list[str]]:
    """Rows of an answer; none if there is no such program."""
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    return rows if done.returncode == 0 else []


class _Sampler:
    """Looks at memory now and then, on a thread of its own."""

    def __init__(self, driver: Driver, every_s: float) -> None:
        self.samples: dict[str, list[tuple[float, float]]] = {}
        self.peak_known = 0
        self._driver = driver
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = time.perf_counter()

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(60)

    def _run(self) -> None:
        own = os.getpid()
        while not self._stopped.wait(self._every_s):
            if not self._driver.alive:
                return
            now = time.perf_counter() - self._started
            self._add("engine", now, resident_bytes(self._driver.pid))
            if self._driver.pid != own:
                self._add("driver", now, resident_bytes(own))
            used = gpu_bytes(self._driver.pid)
            if used is not None:
                self._add("gpu", now, used)
            self.peak_known = max(self.peak_known, self._driver.stats.adapter_tiers.get("known", 0))

    def _add(self, name: str, now: float, value: float) -> None:
        self.samples.setdefault(name, []).append((now, value))


def soak(driver: Driver, adapters: list[AdapterRef], plan: SoakPlan) -> Outcome:
    """Traffic for `plan.minutes`; the outcome's failures say what was not as it must be."""
    driver.forget_all()
    rng = random.Random(plan.seed)
    wanted, arrivals = zipf_order(rng, adapters), poisson(rng, plan.rate)
    tally, used = _Tally(), set()
    before = driver.control("stats")["adapter_tiers"]
    driver.on_done = tally.add
    sent, delayed, started = 0, 0, time.perf_counter()
    try:
        with _Sampler(driver, max(0.5, 60 * plan.minutes / 150)) as sampler:
            while (due := next(arrivals)) < 60 * plan.minutes:
                time.sleep(max(0.0, started + due - time.perf_counter()))
                delayed += driver.in_flight >= _MAX_IN_FLIGHT
                driver.wait(_MAX_IN_FLIGHT - 1)
                if time.perf_counter() - started > 60 * plan.minutes:
                    break
                adapter = next(wanted)
                used.add(adapter)
                driver.send(Load(0.0, adapter, rng.randint(*plan.prompt), rng.randint(*plan.output)))
                sent += 1
            driver.wait()
    finally:
        driver.on_done = None
    after = driver.control("stats")["adapter_tiers"]
    seconds = time.perf_counter() - started
    trends = {name: memory_trend(samples) for name, samples in sampler.samples.items() if len(samples) > 7}
    outcome = Outcome()
    outcome.details["soak"] = {
        "seconds": round(seconds, 1), "requests": sent, "answered": tally.answered, "delayed_by_load": delayed,
        "adapters_registered": len(adapters), "adapters_used": len(used), "hit_ratios": hit_ratios(before, after),
        "loads": {tier: after["tier_loads"][tier] - before["tier_loads"][tier] for tier in after["tier_loads"]},
        "peak_known_adapters": sampler.peak_known, "ttft_p50": percentile(tally.ttft, 0.5),
        "ttft_p99": percentile(tally.ttft, 0.99), "worst_stall": tally.worst_stall, "memory": trends,
        "samples_mib": {name: [(round(t, 1), round(b / 2**20, 1)) for t, b in samples]
                        for name, samples in sampler.samples.items()},
    }  # fmt: skip
    outcome.rows += [
        Row("soak", "requests unanswered", sent - tally.answered, None, 0),
        Row("soak", "ttft_p50", percentile(tally.ttft, 0.5)),
        Row("soak", "ttft_p99", percentile(tally.ttft, 0.99)),
        Row("soak", "worst_stall", tally.worst_stall),
        *(
            Row("soak", f"hits in tier {tier}, %", 100 * share)
            for tier, share in hit_ratios(before, after).items()
        ),
        *(
            Row("soak", f"{name} memory growth, MiB", t["growth_mib"], None, t["allowed_mib"])
            for name, t in trends.items()
        ),
    ]
    if sent != tally.answered:
        outcome.failures.append(
            f"soak: {sent - tally.answered} of {sent} requests unanswered: {tally.first_error}"
        )
    if not trends:
        outcome.failures.append("soak: too short to judge the memory")
    outcome.failures += [
        f"soak: memory of the {name} grew by {t['growth_mib']} MiB"
        for name, t in trends.items()
        if not t["flat"]
    ]
    driver.forget_all()
    return outcome
