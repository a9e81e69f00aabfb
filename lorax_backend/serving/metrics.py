"""Counters, gauges and histograms of the serving side, in plain Python.

Names and buckets are LoRAX's where it has the metric. Nothing here talks to Triton: the model mirrors `drain()` to
Triton's metrics about once a second, because every call there costs a round trip to another process.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Labels = tuple[tuple[str, str], ...]

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
DURATION_BUCKETS = tuple(0.00015 * 1.5**k for k in range(1, 36))
_KEPT_OBSERVATIONS = 100_000


def length_buckets(longest: int) -> tuple[float, ...]:
    """100 equal steps up to `longest` tokens."""
    return tuple(longest * step / 100 for step in range(1, 101))


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric family. `labels` lists every label set it will ever have, so that all series exist from the start."""

    name: str
    kind: str
    doc: str
    buckets: tuple[float, ...] = ()
    labels: tuple[Labels, ...] = ((),)


@dataclass(frozen=True, slots=True)
class MetricUpdate:
    """What to do to one series of a mirror: add `amount` (counter), set it (gauge), or observe each of `values`."""

    spec: MetricSpec
    labels: Labels
    amount: float = 0.0
    values: Sequence[float] = ()


@dataclass(slots=True)
class _Series:
    value: float = 0.0
    drained: float = 0.0
    counts: list[int] = field(default_factory=list)
    total: int = 0
    fresh: list[float] = field(default_factory=list)


class MetricsRegistry:
    """Owner of all series. All methods are thread-safe and take microseconds."""

    def __init__(self, specs: Iterable[MetricSpec]) -> None:
        self._lock = threading.Lock()
        self._mirrored = False
        self.specs: dict[str, MetricSpec] = {spec.name: spec for spec in specs}
        self._series: dict[tuple[str, Labels], _Series] = {
            (spec.name, labels): _Series(counts=[0] * (len(spec.buckets) + 1))
            for spec in self.specs.values()
            for labels in spec.labels
        }

    def increment(self, name: str, amount: float = 1.0, labels: Labels = ()) -> None:
        """Add to a counter."""
        with self._lock:
            self._get(name, labels).value += amount

    def raise_to(self, name: str, total: float, labels: Labels = ()) -> None:
        """Bring a counter to a total counted elsewhere; a smaller total is ignored."""
        with self._lock:
            series = self._get(name, labels)
            series.value = max(series.value, total)

    def set(self, name: str, value: float, labels: Labels = ()) -> None:
        """Set a gauge."""
        with self._lock:
            self._get(name, labels).value = value

    def observe(self, name: str, value: float, labels: Labels = ()) -> None:
        """Add a value to a histogram."""
        with self._lock:
            series = self._get(name, labels)
            series.value += value
            series.total += 1
            series.counts[bisect.bisect_left(self.specs[name].buckets, value)] += 1
            if self._mirrored and len(series.fresh) < _KEPT_OBSERVATIONS:
                series.fresh.append(value)

    def value(self, name: str, labels: Labels = ()) -> float:
        """A counter's or gauge's value; the sum of a histogram's values."""
        with self._lock:
            return self._get(name, labels).value

    def count(self, name: str, labels: Labels = ()) -> int:
        """How many values a histogram has taken in."""
        with self._lock:
            return self._get(name, labels).total

    def drain(self) -> list[MetricUpdate]:
        """What changed since the last call, for the one mirror. Single observations are kept from the first call on."""
        updates = []
        with self._lock:
            self._mirrored = True
            for (name, labels), series in self._series.items():
                spec = self.specs[name]
                if spec.kind == HISTOGRAM:
                    if series.fresh:
                        updates.append(MetricUpdate(spec, labels, values=series.fresh))
                        series.fresh = []
                elif series.value != series.drained:
                    amount = series.value - (series.drained if spec.kind == COUNTER else 0.0)
                    updates.append(MetricUpdate(spec, labels, amount))
                    series.drained = series.value
        return updates

    def render(self) -> str:
        """All series in Prometheus text format."""
        lines = []
        with self._lock:
            for spec in self.specs.values():
                lines += [f"# HELP {spec.name} {spec.doc}", f"# TYPE {spec.name} {spec.kind}"]
                for (name, labels), series in self._series.items():
                    if name == spec.name:
                        lines += _render(spec, labels, series)
        return "\n".join(lines) + "\n"

    def _get(self, name: str, labels: Labels) -> _Series:
        series = self._series.get((name, labels))
        if series is None:
            spec = self.specs[name]
            series = self._series[name, labels] = _Series(counts=[0] * (len(spec.buckets) + 1))
        return series


def _render(spec: MetricSpec, labels: Labels, series: _Series) -> list[str]:
    if spec.kind != HISTOGRAM:
        return [f"{spec.name}{_braces(labels)} {series.value:g}"]
    lines, cumulative = [], 0
    for bound, count in zip((*spec.buckets, None), series.counts, strict=True):
        cumulative += count
        le = (*labels, ("le", "+Inf" if bound is None else f"{bound:.6g}"))
        lines.append(f"{spec.name}_bucket{_braces(le)} {cumulative}")
    braces = _braces(labels)
    return [*lines, f"{spec.name}_sum{braces} {series.value:g}", f"{spec.name}_count{braces} {series.total}"]


def _braces(labels: Labels) -> str:
    escaped = (
        (key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in labels
    )
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}" if labels else ""
