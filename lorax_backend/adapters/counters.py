"""What happens to adapters, counted by tier, as plain numbers for metrics. Standard library only."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

DEVICE, HOST, DISK, REMOTE = TIERS = ("device", "host", "disk", "remote")

LOAD_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
)


class Histogram:
    """Counts of durations. `counts[i]` is of those above `bounds[i - 1]` and up to `bounds[i]`; the last has no end."""

    def __init__(self, bounds: tuple[float, ...] = LOAD_SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def as_dict(self) -> dict[str, Any]:
        """`bounds` in seconds, `counts` one longer, `sum` in seconds, `count`."""
        return {
            "bounds": list(self.bounds),
            "counts": list(self.counts),
            "sum": self.sum,
            "count": sum(self.counts),
        }


class AdapterCounters:
    """Attributes are dicts by tier, which only grow.

    hits: requests by where their adapter was: on the device or the host when they came, else on disk or remote.
    loads: adapters brought in: to the device; to the host from disk; to disk from remote.
    evictions: adapters let go to make room, or on demand.
    seconds: how long a load took: the copy to the device (as far as the host waits for it), reading and casting
        from disk to host, downloading.
    """

    def __init__(self) -> None:
        self.hits = dict.fromkeys(TIERS, 0)
        self.loads = dict.fromkeys((DEVICE, HOST, DISK), 0)
        self.evictions = dict.fromkeys((DEVICE, HOST), 0)
        self.seconds = {tier: Histogram() for tier in (DEVICE, HOST, DISK)}
        self.failed_loads = 0
        self.dropped = 0
        self.auth_checks = 0
        self.auth_denials = 0
        self.reloads = 0

    def loaded(self, tier: str, seconds: float) -> None:
        """An adapter has come to `tier`."""
        self.loads[tier] += 1
        self.seconds[tier].observe(seconds)
