"""The server's order of eviction beats plain LRU where it claims to, and loses nowhere."""

from __future__ import annotations

import pytest
from adapter_churn_sim import Lru, Served, Workload, simulate, workloads

WORKLOADS = workloads(8_000, seed=3)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_the_servers_order_loses_to_lru_nowhere(workload: Workload) -> None:
    lru, served = simulate(Lru(), workload), simulate(Served(), workload)
    assert served.hit_ratio >= lru.hit_ratio - 0.01
    assert served.cost <= lru.cost * 1.02


@pytest.mark.parametrize("workload", WORKLOADS[:3], ids=lambda workload: workload.name)
def test_under_zipf_traffic_it_misses_clearly_less(workload: Workload) -> None:
    lru, served = simulate(Lru(), workload), simulate(Served(), workload)
    assert 1 - served.hit_ratio < 0.92 * (1 - lru.hit_ratio)


@pytest.mark.parametrize(
    ("workload", "at_least"), list(zip(WORKLOADS[5:], (0.45, 0.4, 0.3, 0.7), strict=True))
)
def test_there_is_no_cliff_when_adapters_are_more_than_the_slots(workload: Workload, at_least: float) -> None:
    """Of those that come round and round LRU finds none, though half of them are there."""
    assert simulate(Served(), workload).hit_ratio > at_least
