"""The metrics of adapters: their tiers, what was asked of each, and what a router of requests wants to know.

Standard library only. The number of series never grows with the number of adapters: by name, only the most asked for
have series of their own, and at most 64 are listed as running or waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from lorax_backend.adapters.counters import DEVICE, DISK, HOST, LOAD_SECONDS, TIERS
from lorax_backend.serving.metrics import COUNTER, GAUGE, HISTOGRAM, Labels, MetricSpec, MetricsRegistry
from lorax_backend.types import BASE_MODEL_ID, AdapterRef, EngineInfo, EngineStats

NAMED_ADAPTERS = 64
OTHER = "other"
_AGEING = 10_000  # requests after which every count is halved, so that yesterday's favourites make room

_LOADABLE = (DEVICE, HOST, DISK)
_TIER_GAUGES = {
    "lorax_adapters": ({DEVICE: "on_device", HOST: "on_host", DISK: "on_disk"}, "adapters held, by tier"),
    "lorax_adapter_bytes_used": (
        {HOST: "host_bytes_used", DISK: "disk_bytes_used"}, "bytes of adapters held, by tier",
    ),
    "lorax_adapter_bytes_total": (
        {HOST: "host_bytes_total", DISK: "disk_bytes_total"}, "bytes adapters may take, by tier",
    ),
}  # fmt: skip
_TIER_COUNTERS = {
    "lorax_adapter_hits_total": (
        "tier_hits",
        TIERS,
        "requests by the tier in which they found their adapter",
    ),
    "lorax_adapter_tier_loads_total": (
        "tier_loads",
        _LOADABLE,
        "adapters brought in, by the tier they came to",
    ),
    "lorax_adapter_tier_evictions_total": ("tier_evictions", _LOADABLE, "adapters let go, by tier"),
}
_GAUGES = {
    "lorax_adapters_known": ("known", "adapters whose state is kept, loaded or not"),
    "lorax_adapters_pinned": ("pinned", "adapters that are never evicted"),
    "lorax_adapter_pages_pinned": ("pages_pinned", "pages of the arena held by pinned adapters"),
    "lorax_adapter_slots_total": ("slots_total", "adapters that the arena can hold at once"),
}
_COUNTERS = {
    "lorax_adapter_failed_loads_total": ("failed_loads", "adapters that could not be loaded"),
    "lorax_adapter_auth_checks_total": (
        "auth_checks",
        "questions to a source whether a token may use an adapter",
    ),
    "lorax_adapter_auth_denials_total": ("auth_denials", "such questions answered with no"),
    "lorax_adapter_reloads_total": ("reloads", "adapters replaced by newer weights"),
}
_LOAD_DURATION = "lorax_adapter_load_duration"
_REQUESTS = "lorax_adapter_request_count"
_TOKENS = "lorax_adapter_generated_tokens_total"
_QUEUE_SECONDS = "lorax_adapter_queue_seconds_total"
_SECONDS = "lorax_adapter_request_seconds_total"
_SUCCESS, _FAILURE = OUTCOMES = ("success", "failure")
_LORA_INFO = "lorax_lora_requests_info"
_CACHE_INFO = "lorax_cache_config_info"
_KV_USAGE = "lorax_kv_cache_usage"


def adapter_specs() -> list[MetricSpec]:
    """All families that `AdapterMetrics` moves."""

    def by(label: str, *values: str) -> tuple[Labels, ...]:
        return tuple(((label, value),) for value in values)

    named = "for the adapters most asked for, and for all others together"
    return [
        *(MetricSpec(name, GAUGE, doc, labels=by("tier", *keys)) for name, (keys, doc) in _TIER_GAUGES.items()),
        *(
            MetricSpec(name, COUNTER, doc, labels=by("tier", *tiers))
            for name, (_, tiers, doc) in _TIER_COUNTERS.items()
        ),
        MetricSpec(
            _LOAD_DURATION,
            HISTOGRAM,
            "bringing an adapter to a tier (disk: download; host: reading; device: copy) in seconds",
            LOAD_SECONDS,
            by("tier", *_LOADABLE),
        ),
        *(MetricSpec(name, GAUGE, doc) for name, (_, doc) in _GAUGES.items()),
        *(MetricSpec(name, COUNTER, doc) for name, (_, doc) in _COUNTERS.items()),
        MetricSpec(_REQUESTS, COUNTER, f"ended requests {named}", (), _by_outcome(OTHER), ("adapter",)),
        MetricSpec(_TOKENS, COUNTER, f"tokens generated {named}", (), _of(OTHER), ("adapter",)),
        MetricSpec(_SECONDS, COUNTER, f"seconds answered requests took, summed, {named}", (), _of(OTHER), ("adapter",)),
        MetricSpec(
            _QUEUE_SECONDS, COUNTER, f"seconds of them in the queue, summed, {named}", (), _of(OTHER), ("adapter",)
        ),
        MetricSpec(
            _LORA_INFO,
            GAUGE,
            "which adapters run and wait, as labels; the value is the time of that, in seconds since 1970",
            labels=(),
            open_names=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        ),
        MetricSpec(
            _CACHE_INFO,
            GAUGE,
            "size of the KV cache, as labels; the value is 1",
            labels=(),
            open_names=("block_size", "num_gpu_blocks"),
        ),
        MetricSpec(_KV_USAGE, GAUGE, "share of the KV blocks that sequences hold, 0 to 1"),
    ]  # fmt: skip


class TopNames:
    """Which names are worth series of their own: those counted most often of late, found with bounded memory.

    Metwally et al., "Efficient computation of frequent and top-k elements in data streams" (2005): of the names
    without a place, as many are counted as have one; a new name takes the least counted's place and count.
    Not thread-safe.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._named: dict[str, int] = {}
        self._others: dict[str, int] = {}
        self._seen = 0

    def __contains__(self, name: str) -> bool:
        return name in self._named

    def count(self, name: str) -> str | None:
        """Count one use of a name; the name that lost its place by it, if any."""
        self._seen += 1
        if self._seen % _AGEING == 0:
            for table in (self._named, self._others):
                table.update({key: uses // 2 for key, uses in table.items()})
        if name in self._named:
            self._named[name] += 1
            return None
        if len(self._named) < self.size:
            self._named[name] = 1
            return None
        uses = self._others.pop(name, None)
        if uses is None:
            uses = 0
            if len(self._others) >= self.size:
                least = min(self._others, key=self._others.__getitem__)
                uses = self._others.pop(least)
        self._others[name] = uses + 1
        last = min(self._named, key=self._named.__getitem__)
        if self._others[name] <= self._named[last]:
            return None
        self._named[name] = self._others.pop(name)
        self._others[last] = self._named.pop(last)
        return last


class AdapterMetrics:
    """Moves the adapters' series of a registry. Thread-safe."""

    def __init__(
        self,
        registry: MetricsRegistry,
        default_source: str = "hub",
        named: int = NAMED_ADAPTERS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` tells seconds since 1970; adapters of `default_source` are listed by their id alone."""
        self._registry = registry
        self._default_source = default_source
        self._clock = clock
        self._lock = threading.Lock()
        self._names = TopNames(named)

    def config(self, info: EngineInfo) -> None:
        """Take in what is fixed once the engine is ready."""
        labels = (("block_size", str(info.block_size)), ("num_gpu_blocks", str(info.num_blocks)))
        self._registry.set_only(_CACHE_INFO, labels, 1)

    def succeeded(self, ref: AdapterRef | None, timings: dict[str, float], generated_tokens: int) -> None:
        """A request has been answered; only such requests earn an adapter series of its own, so that invented names
        get none. `timings` in seconds: total, queue."""
        name = _name(ref)
        with self._lock:
            dropped = self._names.count(name)
            if dropped is not None:
                for family in (_TOKENS, _SECONDS, _QUEUE_SECONDS):
                    self._registry.remove(family, *_of(dropped))
                for labels in _by_outcome(dropped):
                    self._registry.remove(_REQUESTS, labels)
            shown = name if name in self._names else OTHER
            (labels,) = _of(shown)
            self._registry.increment(_REQUESTS, labels=_by_outcome(shown)[0])
            self._registry.increment(_TOKENS, generated_tokens, labels)
            self._registry.increment(_SECONDS, timings.get("total", 0.0), labels)
            self._registry.increment(_QUEUE_SECONDS, timings.get("queue", 0.0), labels)

    def failed(self, ref: AdapterRef | None) -> None:
        """A request has ended with an error."""
        name = _name(ref)
        with self._lock:
            shown = name if name in self._names else OTHER
            self._registry.increment(_REQUESTS, labels=_by_outcome(shown)[1])

    def engine(self, stats: EngineStats) -> None:
        """Take in the engine's report."""
        tiers, registry = stats.adapter_tiers, self._registry
        registry.set(_KV_USAGE, stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0)
        for name, (keys, _) in _TIER_GAUGES.items():
            for tier, key in keys.items():
                registry.set(name, tiers.get(key, 0), (("tier", tier),))
        for name, (key, _, _) in _TIER_COUNTERS.items():
            for tier, total in tiers.get(key, {}).items():
                registry.raise_to(name, total, (("tier", tier),))
        for name, (key, _) in _GAUGES.items():
            registry.set(name, tiers.get(key, 0))
        for name, (key, _) in _COUNTERS.items():
            registry.raise_to(name, tiers.get(key, 0))
        for tier, histogram in tiers.get("load_seconds", {}).items():
            registry.raise_histogram_to(
                _LOAD_DURATION, histogram["counts"], histogram["sum"], (("tier", tier),)
            )
        labels = (
            ("max_lora", str(tiers.get("slots_total", 0))),
            ("running_lora_adapters", self._listed(tiers, "running")),
            ("waiting_lora_adapters", self._listed(tiers, "waiting")),
        )
        registry.set_only(_LORA_INFO, labels, round(self._clock(), 3))

    def _listed(self, tiers: dict[str, Any], key: str) -> str:
        """Names as callers give them, in order, so that an unchanged state stays one series."""
        prefix = f"{self._default_source}:"
        return ",".join(sorted({name.removeprefix(prefix) for name in tiers.get(key, ())}))


def _name(ref: AdapterRef | None) -> str:
    return BASE_MODEL_ID if ref is None else str(ref)


def _of(adapter: str) -> tuple[Labels, ...]:
    return ((("adapter", adapter),),)


def _by_outcome(adapter: str) -> tuple[Labels, ...]:
    return tuple((("adapter", adapter), ("outcome", outcome)) for outcome in OUTCOMES)
