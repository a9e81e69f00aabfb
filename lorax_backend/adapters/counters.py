"""What happens to adapters, counted by tier, as plain numbers for metrics. Standard library only."""

from __future__ import annotations

from lorax_backend.histogram import Histogram

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
        self.seconds = {tier: Histogram(LOAD_SECONDS) for tier in (DEVICE, HOST, DISK)}
        self.failed_loads = 0
        self.dropped = 0
        self.auth_checks = 0
        self.auth_denials = 0
        self.reloads = 0

    def loaded(self, tier: str, seconds: float) -> None:
        """An adapter has come to `tier`."""
        self.loads[tier] += 1
        self.seconds[tier].observe(seconds)
