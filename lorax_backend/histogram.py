"""Histograms counted where things happen and told to a mirror as counts. Standard library only."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

# LoRAX's, in seconds: from 0.2 ms to 218 s, each half as wide again as the one before.
DURATION_BUCKETS = tuple(0.00015 * 1.5**k for k in range(1, 36))


class Histogram:
    """`counts[i]` is of the values above `bounds[i - 1]` and up to `bounds[i]`; the last has no end."""

    def __init__(self, bounds: tuple[float, ...] = DURATION_BUCKETS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def as_dict(self) -> dict[str, Any]:
        """`bounds`, `counts` one longer, `sum` of the values, `count` of them."""
        return {
            "bounds": list(self.bounds),
            "counts": list(self.counts),
            "sum": self.sum,
            "count": sum(self.counts),
        }
