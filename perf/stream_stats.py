"""Latency and throughput of streamed generation, out of the file perf_analyzer exports.

perf_analyzer's own table ends at whole requests. What matters for text is when the first token came and how evenly
the others followed; a response may carry several tokens, so tokens are counted by the ids in `token_ids`, never by
responses. All times are in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class Stream:
    """One finished request: the adapter it named, and each response's time since it was sent and token count."""

    adapter: str
    sent_ms: float
    arrivals_ms: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def token_gaps_ms(self) -> list[float]:
        """Time between tokens. Tokens that came in one response share the wait before it evenly."""
        gaps = []
        for before, now, count in zip(self.arrivals_ms, self.arrivals_ms[1:], self.tokens[1:], strict=False):
            gaps.extend([(now - before) / count] * count)
        return gaps


@dataclass(frozen=True, slots=True)
class Summary:
    """Numbers of a set of streams that ran in one experiment."""

    requests: int
    tokens: int
    responses: int
    seconds: float
    ttft_ms: tuple[float, float, float]
    token_gap_ms: tuple[float, float, float]
    request_ms: tuple[float, float, float]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest ranks; 0.0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def read_streams(path: Path) -> list[list[Stream]]:
    """One list of streams for each experiment in an exported file.

    Raises:
        ValueError: a request has responses but no token ids: it was sent without `return_token_ids`.
    """
    document = json.loads(path.read_text())
    return [
        [_stream(request) for request in experiment["requests"]] for experiment in document["experiments"]
    ]


def _stream(request: dict[str, Any]) -> Stream:
    sent = float(request["timestamp"])
    arrivals = []
    tokens = []
    for stamp, outputs in zip(request["response_timestamps"], request["response_outputs"], strict=True):
        count = _count_ids(outputs.get("token_ids"))
        if count:
            arrivals.append((stamp - sent) / _NS_PER_MS)
            tokens.append(count)
    if not tokens:
        raise ValueError(
            "a request got no token ids; send it with return_token_ids, and see the server's log"
        )
    return Stream(
        _text(request["request_inputs"].get("adapter_id")), sent / _NS_PER_MS, tuple(arrivals), tuple(tokens)
    )


def _count_ids(value: Any) -> int:
    if value is None or value == "":
        return 0
    return len(value) if isinstance(value, list) else 1


def _text(value: Any) -> str:
    return str(value[0] if isinstance(value, list) and value else value or "")


def summarize(streams: Iterable[Stream]) -> Summary:
    """Summary of streams that ran side by side."""
    streams = list(streams)
    begin = min(stream.sent_ms for stream in streams)
    end = max(stream.sent_ms + stream.arrivals_ms[-1] for stream in streams)
    return Summary(
        requests=len(streams),
        tokens=sum(sum(stream.tokens) for stream in streams),
        responses=sum(len(stream.tokens) for stream in streams),
        seconds=(end - begin) / 1e3,
        ttft_ms=_spread([stream.arrivals_ms[0] for stream in streams]),
        token_gap_ms=_spread([gap for stream in streams for gap in stream.token_gaps_ms]),
        request_ms=_spread([stream.arrivals_ms[-1] for stream in streams]),
    )


def _spread(values: list[float]) -> tuple[float, float, float]:
    return percentile(values, 0.5), percentile(values, 0.9), percentile(values, 0.99)


def markdown_table(rows: Iterable[tuple[str, Summary]]) -> str:
    """Rows of (label, summary); latencies as p50 / p90 / p99 in milliseconds."""
    lines = [
        "| load | requests | tokens | tokens a response | tokens/s | time to first token | between tokens | request |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, summary in rows:
        spreads = (summary.ttft_ms, summary.token_gap_ms, summary.request_ms)
        cells = [
            label,
            str(summary.requests),
            str(summary.tokens),
            f"{summary.tokens / max(summary.responses, 1):.2f}",
            f"{summary.tokens_per_s:.1f}",
            *(" / ".join(f"{value:.1f}" for value in spread) for spread in spreads),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
