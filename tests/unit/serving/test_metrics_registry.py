"""Counters, gauges, histograms: totals, what a mirror is told, and the text form."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from lorax_backend.errors import LoraxError, _tree
from lorax_backend.serving.metrics import COUNTER, GAUGE, HISTOGRAM, MetricSpec, MetricsRegistry
from lorax_backend.serving.service_metrics import _FAILURES, ServiceMetrics

SPECS = [
    MetricSpec("requests", COUNTER, "requests", labels=((("kind", "a"),), (("kind", "b"),))),
    MetricSpec("size", GAUGE, "size"),
    MetricSpec("seconds", HISTOGRAM, "seconds", (0.1, 1.0)),
]
A = (("kind", "a"),)


def test_a_mirror_is_told_differences_of_counters_and_values_of_gauges() -> None:
    registry = MetricsRegistry(SPECS)
    registry.increment("requests", labels=A)
    registry.increment("requests", 2, labels=A)
    registry.set("size", 5)
    updates = {update.spec.name: update for update in registry.drain()}
    assert updates["requests"].amount == 3
    assert updates["requests"].labels == A
    assert updates["size"].amount == 5
    assert registry.drain() == []
    registry.increment("requests", labels=A)
    registry.set("size", 2)
    assert {update.spec.name: update.amount for update in registry.drain()} == {"requests": 1, "size": 2}
    assert registry.value("requests", A) == 4


def test_a_mirror_is_told_every_observation_once() -> None:
    registry = MetricsRegistry(SPECS)
    registry.drain()
    for value in (0.05, 0.5, 5.0):
        registry.observe("seconds", value)
    (update,) = registry.drain()
    assert list(update.values) == [0.05, 0.5, 5.0]
    assert registry.drain() == []
    assert registry.count("seconds") == 3


def test_a_mirror_that_comes_late_is_told_how_many_and_how_much_was_observed() -> None:
    registry = MetricsRegistry(SPECS)
    for value in (0.05, 0.5, 0.7):
        registry.observe("seconds", value)
    (update,) = registry.drain()
    assert sorted(value > 0.1 for value in update.values) == [False, True, True]
    assert sum(update.values) == pytest.approx(1.25)
    assert registry.drain() == []


def test_without_a_mirror_observations_do_not_pile_up() -> None:
    registry = MetricsRegistry(SPECS)
    registry.observe("seconds", 1.0)
    assert registry._series["seconds", ()].fresh == []


def test_counters_counted_elsewhere_never_fall() -> None:
    registry = MetricsRegistry(SPECS)
    registry.raise_to("requests", 7, A)
    registry.raise_to("requests", 3, A)
    assert registry.value("requests", A) == 7


def test_the_text_form_has_cumulative_buckets_and_all_series_from_the_start() -> None:
    registry = MetricsRegistry(SPECS)
    for value in (0.1, 0.5, 5.0):
        registry.observe("seconds", value)
    lines = registry.render().splitlines()
    assert 'requests{kind="b"} 0' in lines
    assert "# TYPE seconds histogram" in lines
    assert 'seconds_bucket{le="0.1"} 1' in lines
    assert 'seconds_bucket{le="1"} 2' in lines
    assert 'seconds_bucket{le="+Inf"} 3' in lines
    assert "seconds_sum 5.6" in lines
    assert "seconds_count 3" in lines


def test_threads_lose_no_counts() -> None:
    registry = MetricsRegistry(SPECS)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(lambda: [registry.increment("requests", labels=A) for _ in range(5000)])
    assert registry.value("requests", A) == 20000


def test_every_kind_of_error_has_a_word_in_the_metrics() -> None:
    metrics = ServiceMetrics(10, 20)
    for kind in _tree(LoraxError):
        assert kind.error_type in _FAILURES
        metrics.failed(kind.error_type)
    series = [labels for name, labels in metrics.registry._series if name == "lorax_request_failure"]
    assert len(series) == len(set(_FAILURES.values()))
