"""Streams and what came back of them, the same for an engine alone and for a server, and the numbers made of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from stream_stats import percentile


@dataclass(slots=True)
class Request:
    """One stream: prompt ids, adapter id (empty: the base model), tokens wanted, and how many seconds after the others
    it is sent."""

    prompt: list[int]
    adapter: str = ""
    max_tokens: int = 16
    delay_s: float = 0.0


@dataclass(slots=True)
class Record:
    """What came back. Times in seconds on the system's monotonic clock; `arrivals` are (time, new tokens)."""

    sent: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def first_token_ms(self) -> float:
        """Milliseconds from sending to the first token; NaN if none came."""
        return 1e3 * (self.arrivals[0][0] - self.sent) if self.arrivals else float("nan")


def finished(records: Sequence[Record]) -> list[Record]:
    """Those that ended without error and with tokens."""
    return [record for record in records if not record.error and record.arrivals]


def steady_window(records: Sequence[Record]) -> tuple[float, float] | None:
    """The time in which every stream decodes: from the last first token to the first last one. None if there is no
    such time: the streams were too short for their number."""
    good = finished(records)
    if not good:
        return None
    begin, end = max(r.arrivals[0][0] for r in good), min(r.arrivals[-1][0] for r in good)
    return (begin, end) if end > begin else None


def token_gaps_ms(records: Sequence[Record], window: tuple[float, float] | None = None) -> list[float]:
    """Time between tokens of each stream, in the window if there is one. Tokens that came in one response share the
    wait before it evenly."""
    begin, end = window or (float("-inf"), float("inf"))
    gaps: list[float] = []
    for record in finished(records):
        for (before, _), (now, count) in zip(record.arrivals, record.arrivals[1:], strict=False):
            if begin <= before and now <= end:
                gaps += [1e3 * (now - before) / count] * count
    return gaps


def tokens_in(records: Sequence[Record], window: tuple[float, float]) -> int:
    """Tokens that arrived after the window's begin, up to its end."""
    return sum(n for r in finished(records) for when, n in r.arrivals if window[0] < when <= window[1])


def summarize(records: Sequence[Record], prompt_tokens: int) -> dict[str, float | None]:
    """Milliseconds and tokens a second; `prompt_tokens` is the length of each prompt. `steady_tok_s` is None if there
    was no time in which every stream decoded."""
    good = finished(records)
    if not good:
        return {"failed": len(records)}
    gaps, window = token_gaps_ms(good), steady_window(good)
    first, last = min(r.sent for r in good), max(r.arrivals[-1][0] for r in good)
    tokens = sum(len(r.token_ids) for r in good)
    return {
        "failed": len(records) - len(good),
        "ttft_p50": statistics.median(r.first_token_ms for r in good),
        "itl_p50": percentile(gaps, 0.5),
        "itl_p99": percentile(gaps, 0.99),
        "steady_tok_s": tokens_in(good, window) / (window[1] - window[0]) if window else None,
        "total_tok_s": (tokens + prompt_tokens * len(good)) / (last - first) if last > first else None,
        "tokens_a_response": tokens / sum(len(r.arrivals) for r in good),
    }
