"""The metrics of a `GenerationService`: which there are, and when they move."""

from __future__ import annotations

from typing import Any

from lorax_backend.engine.step_counters import BATCH_SIZES, METHODS
from lorax_backend.histogram import DURATION_BUCKETS
from lorax_backend.serving.adapter_metrics import AdapterMetrics, adapter_specs
from lorax_backend.serving.metrics import (
    COUNTER,
    GAUGE,
    HISTOGRAM,
    MetricSpec,
    MetricsRegistry,
    length_buckets,
)
from lorax_backend.types import AdapterRef, EngineStats, GenerateRequest

_KINDS = ("generate", "stream")
# LoRAX's words where it has one; adapter failures keep their finer kinds.
_FAILURES = {
    "validation": "validation",
    "unsupported": "validation",
    "overloaded": "overloaded",
    "generation": "generation",
    "incomplete_generation": "incomplete",
    "cancelled": "dropped",
    "template_error": "template",
    "missing_template_variable": "template",
    "tool_error": "tool",
    "embedding_failure": "embedding",
    "classification_failure": "classification",
    "invalid_input": "validation",
    "no fast tokenizer": "validation",
    "unauthorized": "unauthorized",
    "healthcheck": "healthcheck",
    "engine_dead": "engine_dead",
    "shutting_down": "shutting_down",
    "adapter_error": "adapter_error",
    "adapter_not_found": "adapter_not_found",
    "adapter_unauthorized": "adapter_unauthorized",
    "adapter_incompatible": "adapter_incompatible",
    "adapter_too_large": "adapter_too_large",
    "adapter_download_failed": "download_adapter",
}
_STATS_GAUGES = {
    "lorax_batch_current_size": ("running", "sequences being generated"),
    "lorax_queue_length": ("waiting", "sequences waiting for room or for their adapter"),
    "lorax_batch_current_max_tokens": ("max_tokens", "tokens that running sequences may come to together"),
    "lorax_kv_blocks_total": ("blocks_total", "KV blocks of the server"),
    "lorax_kv_blocks_used": ("blocks_used", "KV blocks held by sequences"),
    "lorax_kv_blocks_cached": ("blocks_cached", "KV blocks kept only for their prefix"),
    "lorax_adapter_pages_total": ("adapter_pages_total", "pages of rank 8 in the adapter arena"),
    "lorax_adapter_pages_used": ("adapter_pages_used", "adapter pages that hold an adapter"),
    "lorax_adapters_on_device": ("adapters_on_device", "adapters in the arena"),
    "lorax_adapters_loading": ("adapters_loading", "adapters being downloaded or parsed"),
}
_STEP_COUNTERS = {
    "lorax_batch_inference_count": ("launched", "steps of the model; those with prompt tokens are `prefill`"),
    "lorax_batch_inference_success": ("succeeded", "steps whose tokens were read"),
    "lorax_batch_inference_failure": ("failed", "steps that failed"),
}
_STEP_DURATION = "lorax_batch_inference_duration"
_STEP_STARTED = "lorax_batch_next_size"
_STEP_JOINED = "lorax_batch_concat"
_JOINED = (("reason", "chunking"),)  # LoRAX's word for joining at once: nobody waits for a batch to form
_STATS_COUNTERS = {
    "lorax_adapter_loads_total": ("adapter_loads", "adapters loaded"),
    "lorax_adapter_evictions_total": ("adapter_evictions", "adapters evicted from the arena"),
    "lorax_preemptions_total": ("preemptions", "sequences set back because the KV cache was full"),
    "lorax_prompt_tokens_total": ("prompt_tokens", "prompt tokens of scheduled sequences"),
    "lorax_cached_prompt_tokens_total": ("cached_prompt_tokens", "prompt tokens found in the prefix cache"),
    "lorax_generated_tokens_total": ("generated_tokens", "tokens generated"),
}


def service_specs(max_input_length: int, max_total_tokens: int) -> list[MetricSpec]:
    """Every family that the service moves."""

    def seconds(name: str, doc: str) -> MetricSpec:
        return MetricSpec(name, HISTOGRAM, doc + " in seconds", DURATION_BUCKETS)

    by_method = tuple((("method", kind),) for kind in _KINDS)
    by_step = tuple((("method", method),) for method in METHODS)
    by_error = tuple((("err", word),) for word in dict.fromkeys(_FAILURES.values()))
    inputs, totals = length_buckets(max_input_length), length_buckets(max_total_tokens)
    return [
        MetricSpec("lorax_request_count", COUNTER, "requests received", labels=by_method),
        MetricSpec("lorax_request_success", COUNTER, "requests answered to their end"),
        MetricSpec("lorax_request_failure", COUNTER, "requests that ended with an error", labels=by_error),
        MetricSpec("lorax_requests_in_flight", GAUGE, "requests received and not yet ended"),
        seconds("lorax_request_duration", "whole request"),
        seconds("lorax_request_validation_duration", "checking and tokenizing a request"),
        seconds("lorax_request_queue_duration", "waiting until first scheduled"),
        seconds("lorax_request_inference_duration", "from first scheduled to last token"),
        seconds("lorax_request_mean_time_per_token_duration", "inference per generated token"),
        seconds("lorax_request_time_to_first_token_duration", "from receipt to first token"),
        MetricSpec("lorax_request_input_length", HISTOGRAM, "prompt tokens of a request", inputs),
        MetricSpec("lorax_request_generated_tokens", HISTOGRAM, "tokens generated for a request", totals),
        MetricSpec("lorax_request_max_new_tokens", HISTOGRAM, "most tokens a request allowed", totals),
        MetricSpec(
            "lorax_request_skipped_tokens",
            HISTOGRAM,
            "tokens that took no step of the model; 0, since nothing is speculated",
            totals,
        ),
        *(MetricSpec(name, GAUGE, doc) for name, (_, doc) in _STATS_GAUGES.items()),
        *(MetricSpec(name, COUNTER, doc) for name, (_, doc) in _STATS_COUNTERS.items()),
        *(MetricSpec(name, COUNTER, doc, labels=by_step) for name, (_, doc) in _STEP_COUNTERS.items()),
        MetricSpec(_STEP_DURATION, HISTOGRAM, "a step of the model in seconds", DURATION_BUCKETS, by_step),
        MetricSpec(_STEP_STARTED, HISTOGRAM, "sequences that begin in a step in which any does", BATCH_SIZES),
        MetricSpec(
            _STEP_JOINED, COUNTER, "steps in which sequences join others that run already", labels=(_JOINED,)
        ),
        *adapter_specs(),
    ]


class ServiceMetrics:
    """Moves the registry's series at the events of a request's life. Thread-safe."""

    def __init__(self, max_input_length: int, max_total_tokens: int, default_source: str = "hub") -> None:
        self.registry = MetricsRegistry(service_specs(max_input_length, max_total_tokens))
        self.adapters = AdapterMetrics(self.registry, default_source)

    def received(self, stream: bool) -> None:
        self.registry.increment("lorax_request_count", labels=(("method", _KINDS[stream]),))

    def validated(self, seconds: float, prompt_tokens: int, max_new_tokens: int) -> None:
        self.registry.observe("lorax_request_validation_duration", seconds)
        self.registry.observe("lorax_request_input_length", prompt_tokens)
        self.registry.observe("lorax_request_max_new_tokens", max_new_tokens)

    def failed(self, error_type: str, request: GenerateRequest | None = None) -> None:
        """`request` is None if it could not be read."""
        word = _FAILURES.get(error_type, "generation")
        self.registry.increment("lorax_request_failure", labels=(("err", word),))
        if request is not None:
            self.adapters.failed(request.adapter)

    def succeeded(
        self, timings: dict[str, float], generated_tokens: int, adapter: AdapterRef | None = None
    ) -> None:
        """`timings` in seconds: total, queue, inference, first_token."""
        self.adapters.succeeded(adapter, timings, generated_tokens)
        observe = self.registry.observe
        self.registry.increment("lorax_request_success")
        observe("lorax_request_duration", timings["total"])
        observe("lorax_request_queue_duration", timings["queue"])
        observe("lorax_request_inference_duration", timings["inference"])
        observe("lorax_request_mean_time_per_token_duration", timings["inference"] / max(generated_tokens, 1))
        observe("lorax_request_time_to_first_token_duration", timings["first_token"])
        observe("lorax_request_generated_tokens", generated_tokens)
        observe("lorax_request_skipped_tokens", 0)

    def in_flight(self, count: int) -> None:
        self.registry.set("lorax_requests_in_flight", count)

    def engine(self, stats: EngineStats) -> None:
        for name, (field, _) in _STATS_GAUGES.items():
            self.registry.set(name, getattr(stats, field))
        for name, (field, _) in _STATS_COUNTERS.items():
            self.registry.raise_to(name, getattr(stats, field))
        if stats.step_counts:
            self._steps(stats.step_counts)
        self.adapters.engine(stats)

    def _steps(self, counts: dict[str, Any]) -> None:
        """`counts` as `StepCounters.as_dict` has them."""
        registry, started = self.registry, counts["started"]
        for method in METHODS:
            labels, seconds = (("method", method),), counts["seconds"][method]
            for name, (key, _) in _STEP_COUNTERS.items():
                registry.raise_to(name, counts[key][method], labels)
            registry.raise_histogram_to(_STEP_DURATION, seconds["counts"], seconds["sum"], labels)
        registry.raise_histogram_to(_STEP_STARTED, started["counts"], started["sum"])
        registry.raise_to(_STEP_JOINED, counts["joined"], _JOINED)
