"""What is counted of the model's steps, and that metrics take it over."""

from __future__ import annotations

import pytest
from fakes_engine import make_core, make_request, make_settings

from lorax_backend.engine.core import EngineCore
from lorax_backend.histogram import Histogram
from lorax_backend.serving.service_metrics import ServiceMetrics

PREFILL, DECODE = ((("method", "prefill"),), (("method", "decode"),))


def run(core: EngineCore) -> None:
    while core.has_work:
        core.step()


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_are_counted_by_what_they_do(depth: int) -> None:
    core, *_ = make_core(make_settings(max_num_seqs=4), depth=depth)
    core.add(make_request(1, [1, 2, 3], max_new_tokens=8))
    for _ in range(3):
        core.step()
    core.add(make_request(2, [4, 5, 6], max_new_tokens=2))
    core.add(make_request(3, [7, 8, 9], max_new_tokens=2))
    core.step()
    assert core.stats().max_tokens == (3 + 8) + 2 * (3 + 2)
    run(core)
    counts = core.stats().step_counts
    assert counts["launched"] == counts["succeeded"]
    assert counts["launched"]["prefill"] == 2, "both newcomers share a step"
    assert sum(counts["succeeded"].values()) == core.stats().steps
    assert counts["started"]["count"] == 2
    assert counts["started"]["sum"] == 3
    assert counts["joined"] == 1
    assert core.stats().max_tokens == 0


@pytest.mark.parametrize("place", ["fail_launch", "fail_result"])
def test_a_failed_step_is_counted_as_one(place: str) -> None:
    core, runner, _ = make_core()
    getattr(runner, place).add(0)
    core.add(make_request(1, [1, 2, 3]))
    run(core)
    counts = core.stats().step_counts
    assert counts["failed"] == {"prefill": 1, "decode": 0}
    assert counts["succeeded"] == {"prefill": 0, "decode": 0}


def test_overlapping_steps_share_the_time_they_take_together() -> None:
    core, *_ = make_core(depth=2)
    core.add(make_request(1, [1, 2, 3], max_new_tokens=20))
    started = core._clock()
    run(core)
    seconds = core.stats().step_counts["seconds"]
    assert sum(histogram["count"] for histogram in seconds.values()) == core.stats().steps
    assert 0 <= sum(histogram["sum"] for histogram in seconds.values()) <= core._clock() - started


def test_metrics_take_over_the_counts_and_the_times() -> None:
    core, runner, _ = make_core(make_settings(max_num_seqs=4))
    metrics = ServiceMetrics(100, 200)
    runner.fail_launch.add(5)
    core.add(make_request(1, [1, 2, 3], max_new_tokens=4))
    run(core)
    core.add(make_request(2, [1, 2, 9], max_new_tokens=4))
    run(core)
    for _ in range(2):  # telling twice counts once
        metrics.engine(core.stats())
    value, count = metrics.registry.value, metrics.registry.count
    counts = core.stats().step_counts
    for labels, method in ((PREFILL, "prefill"), (DECODE, "decode")):
        assert value("lorax_batch_inference_count", labels) == counts["launched"][method] > 0
        assert value("lorax_batch_inference_success", labels) == counts["succeeded"][method]
        assert count("lorax_batch_inference_duration", labels) == counts["succeeded"][method]
    failures = [value("lorax_batch_inference_failure", labels) for labels in (PREFILL, DECODE)]
    assert sum(failures) == 1
    assert count("lorax_batch_next_size") == value("lorax_batch_next_size") == 2


def test_a_histograms_counts_fall_between_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.as_dict() == {"bounds": [1.0, 2.0], "counts": [2, 1, 1], "sum": 12.0, "count": 4}
