"""The metrics of adapters: tiers, series by name that stay few, and what routers read."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from lorax_backend.adapters.counters import LOAD_SECONDS, Histogram
from lorax_backend.gateway.counters import COUNTERS, GAUGES
from lorax_backend.serving.adapter_metrics import AdapterMetrics, TopNames, adapter_specs
from lorax_backend.serving.metric_reference import with_tables
from lorax_backend.serving.metrics import HISTOGRAM, MetricSpec, MetricsRegistry
from lorax_backend.serving.service_metrics import ServiceMetrics
from lorax_backend.types import AdapterRef, EngineStats

TIMINGS = {"total": 2.0, "queue": 0.5}


def make(named: int = 4) -> tuple[MetricsRegistry, AdapterMetrics]:
    registry = MetricsRegistry(adapter_specs())
    ticks = itertools.count(1000)
    return registry, AdapterMetrics(registry, "hub", named, clock=lambda: float(next(ticks)))


def ref(name: str, source: str = "hub") -> AdapterRef:
    return AdapterRef(source, name)


def adapters_shown(registry: MetricsRegistry, family: str = "lorax_adapter_request_count") -> set[str]:
    return {dict(labels)["adapter"] for name, labels in registry._series if name == family}


def infos(registry: MetricsRegistry) -> list[dict[str, str]]:
    return [dict(labels) for name, labels in registry._series if name == "lorax_lora_requests_info"]


def test_each_adapter_and_the_base_model_have_their_own_requests_tokens_and_seconds() -> None:
    registry, metrics = make()
    metrics.succeeded(ref("a"), TIMINGS, 10)
    metrics.succeeded(ref("a"), TIMINGS, 5)
    metrics.succeeded(None, TIMINGS, 7)
    metrics.failed(ref("a"))
    a = (("adapter", "hub:a"),)
    assert registry.value("lorax_adapter_request_count", (*a, ("outcome", "success"))) == 2
    assert registry.value("lorax_adapter_request_count", (*a, ("outcome", "failure"))) == 1
    assert registry.value("lorax_adapter_generated_tokens_total", a) == 15
    assert registry.value("lorax_adapter_request_seconds_total", a) == 4.0
    assert registry.value("lorax_adapter_queue_seconds_total", a) == 1.0
    assert registry.value("lorax_adapter_generated_tokens_total", (("adapter", "__base_model__"),)) == 7


def test_a_thousand_adapters_leave_a_bounded_page_and_no_request_uncounted() -> None:
    registry, metrics = make(named=4)
    for number in range(1000):
        metrics.succeeded(ref(f"adapter-{number}"), TIMINGS, 1)
    for family in ("lorax_adapter_request_count", "lorax_adapter_generated_tokens_total"):
        assert len(adapters_shown(registry, family)) <= 5
    kept = sum(
        registry.value("lorax_adapter_generated_tokens_total", (("adapter", name),))
        for name in adapters_shown(registry)
    )
    assert kept >= 1000 - 2 * 4 * 1000 / 8  # what dropped series had counted goes with them
    assert "other" in adapters_shown(registry)


def test_an_adapter_that_becomes_busy_takes_the_series_of_the_idlest() -> None:
    registry, metrics = make(named=2)
    for name, times in (("old", 1), ("busy", 5), ("new", 3)):
        for _ in range(times):
            metrics.succeeded(ref(name), TIMINGS, 1)
    assert adapters_shown(registry) == {"hub:busy", "hub:new", "other"}


def test_names_that_only_fail_get_no_series() -> None:
    registry, metrics = make()
    for number in range(50):
        metrics.failed(ref(f"invented-{number}"))
    assert adapters_shown(registry) == {"other"}
    other = (("adapter", "other"), ("outcome", "failure"))
    assert registry.value("lorax_adapter_request_count", other) == 50


def test_the_most_used_of_skewed_names_are_found_with_bounded_memory() -> None:
    draw = random.Random(1)
    names, weights = [f"n{i}" for i in range(500)], [1 / (i + 1) for i in range(500)]
    top = TopNames(16)
    for name in draw.choices(names, weights, k=20_000):
        top.count(name)
        assert len(top._named) <= 16
        assert len(top._others) <= 16
    assert all(f"n{i}" in top for i in range(8))


def test_yesterdays_favourite_makes_room() -> None:
    top = TopNames(1)
    for _ in range(20_000):
        top.count("yesterday")
    for _ in range(20_000):
        top.count("today")
    assert "today" in top
    assert "yesterday" not in top


def test_the_lora_gauge_is_one_series_that_lists_adapters_as_callers_name_them() -> None:
    registry, metrics = make()
    metrics.engine(
        EngineStats(adapter_tiers={"slots_total": 8, "running": ["hub:b", "hub:a"], "waiting": []})
    )
    metrics.engine(
        EngineStats(
            adapter_tiers={"slots_total": 8, "running": ["hub:a"], "waiting": ["local:/c", "local:/c"]}
        )
    )
    assert infos(registry) == [
        {"max_lora": "8", "running_lora_adapters": "a", "waiting_lora_adapters": "local:/c"}
    ]
    (labels,) = [labels for name, labels in registry._series if name == "lorax_lora_requests_info"]
    assert registry.value("lorax_lora_requests_info", labels) == 1001.0


def test_the_tiers_report_reaches_gauges_counters_and_histograms() -> None:
    registry, metrics = make()
    histogram = Histogram(LOAD_SECONDS)
    histogram.observe(0.02)
    histogram.observe(400.0)
    metrics.engine(
        EngineStats(
            blocks_total=10,
            blocks_used=4,
            adapter_tiers={
                "on_host": 3,
                "host_bytes_used": 1024,
                "tier_hits": {"remote": 6},
                "tier_evictions": {"disk": 2},
                "load_seconds": {"host": histogram.as_dict()},
                "auth_denials": 1,
            },
        )
    )
    host = (("tier", "host"),)
    assert registry.value("lorax_adapters", host) == 3
    assert registry.value("lorax_adapter_bytes_used", host) == 1024
    assert registry.value("lorax_adapter_hits_total", (("tier", "remote"),)) == 6
    assert registry.value("lorax_adapter_tier_evictions_total", (("tier", "disk"),)) == 2
    assert registry.count("lorax_adapter_load_duration", host) == 2
    assert registry.value("lorax_adapter_load_duration", host) == pytest.approx(400.02)
    assert registry.value("lorax_kv_cache_usage") == 0.4
    assert registry.value("lorax_adapter_auth_denials_total") == 1


def test_a_mirror_gets_the_same_counts_and_sum_as_a_histogram_counted_elsewhere() -> None:
    draw = random.Random(7)
    registry = MetricsRegistry([MetricSpec("seconds", HISTOGRAM, "seconds", LOAD_SECONDS)])
    registry.drain()
    elsewhere, mirror = Histogram(LOAD_SECONDS), Histogram(LOAD_SECONDS)
    for _ in range(50):
        for _ in range(draw.randrange(4)):
            elsewhere.observe(draw.choice([draw.uniform(0.0001, 0.1), draw.uniform(0.1, 300)]))
        registry.raise_histogram_to("seconds", elsewhere.counts, elsewhere.sum)
        for update in registry.drain():
            for value in update.values:
                mirror.observe(value)
    assert mirror.counts == elsewhere.counts
    assert mirror.sum == pytest.approx(elsewhere.sum, rel=1e-3)


def test_a_mirror_is_told_to_drop_a_series_before_what_replaces_it_comes() -> None:
    registry, metrics = make()
    metrics.engine(EngineStats(adapter_tiers={"running": ["hub:a"]}))
    registry.drain()
    metrics.engine(EngineStats(adapter_tiers={"running": ["hub:b"]}))
    moved = [update for update in registry.drain() if update.spec.name == "lorax_lora_requests_info"]
    assert [(dict(update.labels)["running_lora_adapters"], update.removed) for update in moved] == [
        ("a", True), ("b", False),
    ]  # fmt: skip


def test_a_series_that_is_back_begins_anew_in_a_mirror() -> None:
    registry, _ = make()
    labels = (("adapter", "x"),)
    registry.increment("lorax_adapter_generated_tokens_total", 5, labels)
    registry.drain()
    registry.remove("lorax_adapter_generated_tokens_total", labels)
    registry.increment("lorax_adapter_generated_tokens_total", 2, labels)
    removal, addition = registry.drain()
    assert removal.removed
    assert not addition.removed
    assert addition.amount == 2


def test_the_reference_lists_every_metric() -> None:
    text = Path("docs/metrics.md").read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m lorax_backend.serving.metric_reference docs/metrics.md"
    for name in ServiceMetrics(1, 1).registry.specs:
        assert f"| `{name}` |" in text
    gateway = ["requests_total", *(f"{name}_total" for name in COUNTERS), *GAUGES]
    for name in gateway:
        assert f"| `lorax_gateway_{name}` |" in text
