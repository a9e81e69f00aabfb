"""The tables of docs/metrics.md, generated from the metrics themselves.

`python -m lorax_backend.serving.metric_reference docs/metrics.md` writes them anew between the file's markers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lorax_backend.generated_text import with_part
from lorax_backend.serving.adapter_metrics import adapter_specs
from lorax_backend.serving.metrics import MetricSpec
from lorax_backend.serving.service_metrics import service_specs

_BEGIN = "<!-- metrics: begin (written by lorax_backend/serving/metric_reference.py) -->"
_END = "<!-- metrics: end -->"
_MOST_VALUES = 5  # of a label, written out


def metric_tables() -> str:
    """Markdown: the service's families, then the adapters'."""
    adapters = adapter_specs()
    names = {spec.name for spec in adapters}
    service = [spec for spec in service_specs(1, 1) if spec.name not in names]
    return "\n".join([
        "## Requests, queue and cache", "", *_table(service), "", "## Adapters and routing", "", *_table(adapters),
    ])  # fmt: skip


def with_tables(text: str) -> str:
    """The document with its tables written anew.

    Raises:
        ValueError: the markers are missing.
    """
    return with_part(text, _BEGIN, _END, metric_tables())


def _table(specs: list[MetricSpec]) -> list[str]:
    rows = (f"| `{spec.name}` | {spec.kind} | {_labels(spec)} | {spec.doc} |" for spec in specs)
    return ["| series | kind | labels | meaning |", "|---|---|---|---|", *rows]


def _labels(spec: MetricSpec) -> str:
    values: dict[str, dict[str, None]] = {}
    for labels in spec.labels:
        for key, value in labels:
            values.setdefault(key, {})[value] = None
    for key in spec.open_names:
        values[key] = {}
    shown = [
        f"`{key}`" + (f" ({', '.join(found)})" if 0 < len(found) <= _MOST_VALUES else "")
        for key, found in values.items()
    ]
    return ", ".join(shown)


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
