"""The gateway's own counts, summed over its worker processes.

Each worker writes its row of one small file that all of them map, so that any of them can report the sum.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

ROUTES = (
    "generate", "generate_stream", "chat_completions", "completions", "embeddings", "models", "tokenize",
    "adapters", "info", "health", "startup", "metrics", "other",
)  # fmt: skip
STATUSES = ("2xx", "4xx", "429", "5xx")
COUNTERS = {
    "disconnects": "callers that left before their answer ended",
    "failovers": "requests sent on to another Triton server",
    "generated_tokens": "tokens of answers that passed through to their end",
    "stream_errors": "streams that ended with an error event",
}
GAUGES = {
    "requests_in_flight": "HTTP requests being answered now",
    "streams_in_flight": "event streams open now",
}
_REQUESTS = [f"requests/{route}/{status}" for route in ROUTES for status in STATUSES]
_NAMES = {name: index for index, name in enumerate([*COUNTERS, *GAUGES, *_REQUESTS])}


def create_file(workers: int, folder: Path | None = None) -> Path:
    """An empty file of counts for that many workers; its maker removes it."""
    with tempfile.NamedTemporaryFile(prefix="lorax-gateway-", dir=folder, delete=False) as file:
        file.write(bytes(8 * len(_NAMES) * workers))
        return Path(file.name)


class Counters:
    """One worker's counts; `total` sums those of all. Used from one event loop."""

    def __init__(self, path: Path | None = None, worker: int = 0) -> None:
        """Without a `path` there is only this process."""
        if path is None:
            self._cells = memoryview(bytearray(8 * len(_NAMES))).cast("d")
        else:
            with path.open("r+b") as file:
                self._cells = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")
        self._offset = worker * len(_NAMES)

    def add(self, name: str, amount: float = 1.0) -> None:
        """Add to one of COUNTERS or GAUGES."""
        self._cells[self._offset + _NAMES[name]] += amount

    def request(self, route: str, status: int) -> None:
        """Count an answered request."""
        group = "429" if status == 429 else f"{status // 100}xx"
        self.add(f"requests/{route}/{group if group in STATUSES else '5xx'}")

    def total(self, name: str) -> float:
        """The sum over all workers."""
        return sum(self._cells[_NAMES[name] :: len(_NAMES)])

    def render(self) -> str:
        """All counts as Prometheus text."""
        lines = [
            "# HELP lorax_gateway_requests_total HTTP requests answered, by route and status",
            "# TYPE lorax_gateway_requests_total counter",
        ]
        for route in ROUTES:
            for status in STATUSES:
                value = self.total(f"requests/{route}/{status}")
                if value:
                    labels = f'{{route="{route}",status="{status}"}}'
                    lines.append(f"lorax_gateway_requests_total{labels} {value:.0f}")
        for names, kind, suffix in ((COUNTERS, "counter", "_total"), (GAUGES, "gauge", "")):
            for name, doc in names.items():
                full = f"lorax_gateway_{name}{suffix}"
                lines += [f"# HELP {full} {doc}", f"# TYPE {full} {kind}", f"{full} {self.total(name):.0f}"]
        return "\n".join(lines) + "\n"
