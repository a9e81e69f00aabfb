"""Mirrors the service's metrics to Triton's, so that they appear on the server's metrics page.

Every call to a Triton metric is a round trip to the server's process, so one thread carries over what
changed, about once a second.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from lorax_backend.serving.metrics import (
    COUNTER,
    GAUGE,
    HISTOGRAM,
    Labels,
    MetricSpec,
    MetricsRegistry,
    MetricUpdate,
)

_log = logging.getLogger(__name__)


class MetricsMirror:
    """Owns the Triton metric families and the thread that moves them. `labels` are put on every series."""

    def __init__(self, registry: MetricsRegistry, labels: dict[str, str], interval_s: float = 1.0) -> None:
        self._registry = registry
        self._labels = labels
        self._interval_s = interval_s
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, Labels], Any] = {}
        self._values: dict[tuple[str, Labels], float] = {}  # of counters and gauges, to make a series anew
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-mirror", daemon=True)
        try:
            for spec in registry.specs.values():
                for series_labels in spec.labels:
                    self._get(spec, series_labels)
        except pb_utils.TritonModelException as error:
            _log.warning("no metrics on the server's metrics page: %s", error)
            return
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Carry over the last changes and end the thread, within `timeout` seconds."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        updates = self._registry.drain()
        try:
            self._remove({(update.spec.name, update.labels) for update in updates if update.removed})
        except Exception:
            _log.exception("old series could not be taken off the metrics page")
        for update in updates:
            try:
                self._apply(update)
            except Exception:
                _log.exception("metric %s could not be mirrored", update.spec.name)

    def _apply(self, update: MetricUpdate) -> None:
        if update.removed:
            return
        series, key = self._get(update.spec, update.labels), (update.spec.name, update.labels)
        if update.spec.kind == COUNTER:
            series.increment(update.amount)
            self._values[key] = self._values.get(key, 0.0) + update.amount
        elif update.spec.kind == GAUGE:
            series.set(update.amount)
            self._values[key] = update.amount
        else:
            for value in update.values:
                series.observe(value)

    def _remove(self, gone: set[tuple[str, Labels]]) -> None:
        """Take series of counters and gauges off the page. Triton lets go of a series only with its whole family, so
        the family is made anew with those that stay."""
        for key in gone:
            self._values.pop(key, None)
        for name in {name for name, _ in gone}:
            spec = self._registry.specs[name]
            kept = [key for key in self._series if key[0] == name and key not in gone]
            for key in [key for key in self._series if key[0] == name]:
                del self._series[key]
            self._families.pop(name, None)
            for key in kept:
                self._apply(MetricUpdate(spec, key[1], self._values.pop(key, 0.0)))

    def _get(self, spec: MetricSpec, labels: Labels) -> Any:
        series = self._series.get((spec.name, labels))
        if series is None:
            options = {"buckets": list(spec.buckets)} if spec.kind == HISTOGRAM else {}
            series = self._family(spec).Metric(labels=self._labels | dict(labels), **options)
            self._series[spec.name, labels] = series
        return series

    def _family(self, spec: MetricSpec) -> Any:
        family = self._families.get(spec.name)
        if family is None:
            kinds = pb_utils.MetricFamily
            kind = {COUNTER: kinds.COUNTER, GAUGE: kinds.GAUGE, HISTOGRAM: kinds.HISTOGRAM}[spec.kind]
            family = kinds(name=spec.name, description=spec.doc, kind=kind)
            self._families[spec.name] = family
        return family
