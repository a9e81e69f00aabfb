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
_KEPT_OBSERVATIONS = 100_000


def length_buckets(longest: int) -> tuple[float, ...]:
    """100 equal steps up to `longest` tokens."""
    return tuple(longest * step / 100 for step in range(1, 101))


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric family. `labels` lists the label sets that exist from the start, and every one it will ever have but
    those of a family with `open_names`: labels whose values come up as it goes, and whose owner keeps them few."""

    name: str
    kind: str
    doc: str
    buckets: tuple[float, ...] = ()
    labels: tuple[Labels, ...] = ((),)
    open_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MetricUpdate:
    """What to do to one series of a mirror: add `amount` (counter), set it (gauge), observe each of `values`, or drop
    the series if it is `removed`."""

    spec: MetricSpec
    labels: Labels
    amount: float = 0.0
    values: Sequence[float] = ()
    removed: bool = False


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
        self._removed: set[tuple[str, Labels]] = set()
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

    def raise_histogram_to(self, name: str, counts: Sequence[int], total: float, labels: Labels = ()) -> None:
        """Bring a histogram to `counts` per bucket and a sum of `total` counted elsewhere; smaller counts are ignored.

        A mirror is told observations that make up the same counts and the same sum.
        """
        with self._lock:
            series = self._get(name, labels)
            added = [new - old for new, old in zip(counts, series.counts, strict=True)]
            if min(added) < 0 or not any(added):
                return
            if self._mirrored:
                values = _stand_ins(self.specs[name].buckets, added, total - series.value)
                series.fresh += values[: _KEPT_OBSERVATIONS - len(series.fresh)]
            series.counts, series.value, series.total = list(counts), total, sum(counts)

    def set_only(self, name: str, labels: Labels, value: float) -> None:
        """Set a gauge whose labels carry what it tells: its other series go."""
        with self._lock:
            for key in [key for key in self._series if key[0] == name and key[1] != labels]:
                self._remove(key)
            self._get(name, labels).value = value

    def remove(self, name: str, labels: Labels) -> None:
        """Forget a series; it starts anew when it moves again."""
        with self._lock:
            self._remove((name, labels))

    def value(self, name: str, labels: Labels = ()) -> float:
        """A counter's or gauge's value; the sum of a histogram's values."""
        with self._lock:
            return self._get(name, labels).value

    def count(self, name: str, labels: Labels = ()) -> int:
        """How many values a histogram has taken in."""
        with self._lock:
            return self._get(name, labels).total

    def drain(self) -> list[MetricUpdate]:
        """What changed since the last call, for the one mirror. Single observations are kept from the first call on; of
        what was observed before, counts and sums alone are told, as by `raise_histogram_to`. Removals come first."""
        with self._lock:
            if not self._mirrored:
                for (name, _), series in self._series.items():
                    if series.total:
                        series.fresh = _stand_ins(self.specs[name].buckets, series.counts, series.value)
                self._mirrored = True
            updates = [MetricUpdate(self.specs[name], labels, removed=True) for name, labels in self._removed]
            self._removed.clear()
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

    def _remove(self, key: tuple[str, Labels]) -> None:
        if self._series.pop(key, None) is not None and self._mirrored:
            self._removed.add(key)

    def _get(self, name: str, labels: Labels) -> _Series:
        series = self._series.get((name, labels))
        if series is None:
            spec = self.specs[name]
            series = self._series[name, labels] = _Series(counts=[0] * (len(spec.buckets) + 1))
        return series


def _stand_ins(bounds: Sequence[float], counts: Sequence[int], total: float) -> list[float]:
    """Values of which `counts` fall into each bucket and which sum up to `total`, if such values exist: as far along
    each bucket as is needed."""
    lows = (0.0, *bounds)
    rest = total - sum(count * low for count, low in zip(counts, lows, strict=True))
    room = sum(count * (high - low) for count, low, high in zip(counts, lows, bounds, strict=False))
    along = min(1.0, max(1e-6, rest / room)) if room else 1e-6
    beyond = max(0.0, rest - room) / counts[-1] if counts[-1] else 0.0
    if counts[-1]:
        beyond = max(beyond, 1e-6 * bounds[-1])
    values = []
    for index, count in enumerate(counts):
        last = index == len(bounds)
        values += [lows[index] + (beyond if last else along * (bounds[index] - lows[index]))] * count
    return values


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
