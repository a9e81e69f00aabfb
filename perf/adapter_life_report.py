"""What the life of adapters is measured against, and the numbers made of requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapter_life_engine import Record
from stream_stats import percentile

JUDGED_MODEL = "llama3-8b"  # goals in milliseconds are for this shape on one NVIDIA H100 80GB HBM3


@dataclass(frozen=True, slots=True)
class Row:
    """One number: ours, vLLM 0.26.0's on the H100 (None: not measured), and our goal (None: none)."""

    workload: str
    name: str
    ours: float
    vllm: float | None = None
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ours <= self.goal


# Milliseconds of vLLM and of our goal; 200 adapters of rank 16, 32 on the GPU, 64 in CPU memory, Zipf(1.0).
CHURN: dict[float, dict[str, tuple[float | None, float | None]]] = {
    4.0: {"ttft_p50": (48, 30), "ttft_p99": (1164, 120), "itl_p50": (9.7, None), "itl_p99": (75, 20),
          "worst_stall": (498, None)},
    12.0: {"ttft_p50": (83, 45), "ttft_p99": (345, 150), "itl_p50": (15.0, None), "itl_p99": (103, 30),
           "worst_stall": (198, None)},
}  # fmt: skip
NOISY_VLLM = {"ttft_p50": 72, "ttft_p99": 303, "itl_p50": 14.4, "itl_p99": 88, "worst_stall": 150}
NOISY_RATIO = 1.5
# Time to first token on an idle engine, prompt 128. A cold file's goal is its reading time and this.
TIERS: dict[str, tuple[float | None, float | None]] = {
    "base": (12.5, 10), "device": (20.3, 11), "host": (34.2, 14), "ram disk": (61.4, 40),
    "page cache": (None, None), "cold disk": (127, None), "hub": (None, None),
}  # fmt: skip
COLD_DISK_EXTRA_MS = 20
STALL_VLLM = {"itl_p99": 92, "worst_stall": 119}
STALL_STEPS = 2.0


def summarize(records: Sequence[Record]) -> dict[str, float]:
    """Milliseconds to the first token and between tokens, of the requests that were answered."""
    good = [record for record in records if record.answered]
    first = [record.ttft_ms for record in good]
    gaps = [gap for record in good for gap in record.gaps_ms]
    return {
        "requests": len(records),
        "unanswered": len(records) - len(good),
        "ttft_p50": percentile(first, 0.5),
        "ttft_p99": percentile(first, 0.99),
        "itl_p50": percentile(gaps, 0.5),
        "itl_p99": percentile(gaps, 0.99),
        "worst_stall": max(gaps, default=0.0),
    }


def first_error(records: Sequence[Record]) -> str | None:
    """Why a request was not answered, if one was not."""
    for record in records:
        if not record.answered:
            return record.error or f"{len(record.times)} tokens instead of {record.load.output}"
    return None


def rows_of(
    workload: str,
    summary: dict[str, float],
    against: dict[str, tuple[float | None, float | None]],
    judged: bool,
) -> list[Row]:
    """A row for each number; vLLM's and the goal only where the measurement is like theirs."""
    names = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "worst_stall")
    blank: tuple[float | None, float | None] = (None, None)
    return [
        Row(workload, name, summary[name], *(against.get(name, blank) if judged else blank)) for name in names
    ]


def table(rows: Sequence[Row]) -> str:
    """Rows under each other, for people."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"

    lines = [f"{'workload':<26}{'number':<28}{'ours':>10}{'vLLM':>10}{'goal':>10}  met"]
    for row in rows:
        met = {None: "", True: "yes", False: "NO"}[row.met]
        lines.append(
            f"{row.workload:<26}{row.name:<28}{number(row.ours):>10}{number(row.vllm):>10}{number(row.goal):>10}  {met}"
        )
    return "\n".join(lines)


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {"workload": r.workload, "number": r.name, "ours": round(r.ours, 3), "vllm": r.vllm, "goal": r.goal,
         "met": r.met}
        for r in rows
    ]  # fmt: skip


def hit_ratios(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Share of the requests between two reports that found their adapter in each tier."""
    counts = {tier: total - before["tier_hits"].get(tier, 0) for tier, total in after["tier_hits"].items()}
    total = sum(counts.values())
    return {tier: round(count / total, 4) if total else 0.0 for tier, count in counts.items()}
