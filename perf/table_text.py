"""Results against limits, peers and goals: the same tables for the terminal and for the documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peers


@dataclass(frozen=True, slots=True)
class Table:
    """A title, the column heads and the cells, all text."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def as_text(self) -> str:
        """Aligned columns: the first two to the left, numbers to the right."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        shown = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *shown])

    def as_markdown(self) -> str:
        """Without the title."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(ours: float | None, goal: float | None, more_is_better: bool = False) -> str:
    """`reached`, by how much it is missed, or nothing without a goal."""
    if goal is None:
        return ""
    if ours is None or ours != ours:
        return "not measured"
    ratio = goal / ours if more_is_better else ours / goal
    return "reached" if ratio <= 1.0 else f"missed by {100 * (ratio - 1):.1f} %"


def number(value: float | None, digits: int | None = None) -> str:
    """A number with as many digits as it is worth; a dash for none."""
    if value is None or value != value:
        return "-"
    if digits is None:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def decode_table(result: dict[str, Any]) -> Table:
    """Table B: milliseconds between tokens and tokens a second."""
    listed = {(row.streams, row.kind): row for row in peers.DECODE.get(result["shape"], [])}
    through = "engine alone" if result.get("through") == "engine" else "steps alone, without a scheduler"
    header = ["streams, adapters", "byte floor, ms", "vLLM, ms", "goal, ms", "ours, ms", "p99", "ours, tok/s",
              "vLLM, tok/s", "goal reached"]  # fmt: skip
    rows = []
    for row in result["decode"]:
        peer = listed.get((row["streams"], row["adapters"]))
        goal = peer.goal_ms if peer else None
        rows.append([
            f"{row['streams']}, {row['adapters']}", number(peer.floor_ms if peer else None),
            number(peer.vllm_ms if peer else None), number(goal), number(row["ms_p50"]), number(row["ms_p99"]),
            number(row["tokens_s"], 0), number(peer.vllm_tokens_s if peer else None, 0),
            verdict(row["ms_p50"], goal),
        ])  # fmt: skip
    return Table(f"Decoding, {result['shape']}, {through}: time between tokens (median)", header, rows)


def prefill_table(result: dict[str, Any]) -> Table:
    """Table C: tokens of prompts and answers a second."""
    listed = {(row.streams, row.kind): row for row in peers.PREFILL.get(result["shape"], [])}
    header = [
        "streams, adapters",
        "ceiling, tok/s",
        "vLLM, tok/s",
        "goal, tok/s",
        "ours, tok/s",
        "goal reached",
    ]
    rows = []
    whole = result.get("through") == "engine"
    for row in result["prefill"]:
        peer = listed.get((row["streams"], row["adapters"]))
        goal = peer.goal_tokens_s if peer else None
        # A prompt's step alone is less work than the goal is about.
        judged = (
            verdict(row["tokens_s"], goal, more_is_better=True) if whole else "not comparable" if goal else ""
        )
        rows.append([
            f"{row['streams']}, {row['adapters']}", number(peers.PREFILL_CEILING.get(result["shape"]), 0),
            number(peer.vllm_tokens_s if peer else None, 0), number(goal, 0), number(row["tokens_s"], 0),
            judged,
        ])  # fmt: skip
    what = "prompt 2048, answer 16" if whole else "prompt 2048, its steps alone"
    return Table(f"Prefill, {result['shape']}, {what}", header, rows)


def kernel_table(result: dict[str, Any]) -> Table:
    """Table E: what LoRA adds to a layer's four sites, microseconds."""
    listed = {(row.tokens, row.adapters, row.rank): row for row in peers.KERNELS.get(model_of(result), [])}
    header = ["tokens, adapters, rank", "byte floor", "vLLM", "SGLang csgmv", "SGLang triton_v2", "goal", "ours",
              "goal reached"]  # fmt: skip
    rows = []
    for row in result["lora"]:
        peer = listed.get((row["tokens"], row["adapters"], row["rank"]))
        goal = peer.goal_us if peer else None
        columns = [peer.vllm_us, peer.csgmv_us, peer.triton_v2_us] if peer else [None] * 3
        rows.append([
            f"{row['tokens']}, {row['adapters']}, {row['rank'] or '8 to 64 mixed'}", number(row["floor_us"]),
            *map(number, columns), number(goal), number(row["in_situ_us"]), verdict(row["in_situ_us"], goal),
        ])  # fmt: skip
    title = "LoRA in situ, microseconds a layer (o, qkv, gate_up, down)"
    return Table(title + (": KERNEL TESTS NOT CHECKED" if result.get("unchecked") else ""), header, rows)


def model_of(result: dict[str, Any]) -> str:
    """The shape that kernels were measured with; results without the field are of the 8B."""
    return str(result.get("model", "8b"))


def sweep_table(result: dict[str, Any]) -> Table:
    """Tokens a second over the number of registered adapters."""
    header = [
        "adapters",
        "tok/s",
        "of the one before",
        "first token p50, ms",
        "p99",
        "loads",
        "evictions",
        "failed",
    ]
    rows = []
    before: float | None = None
    for row in result["sweep"]:
        share = f"{row['tokens_s'] / before:.0%}" if before else ""
        before = row["tokens_s"]
        rows.append([
            str(row["registered"]), number(row["tokens_s"], 0), share, number(row["ttft_ms_p50"]),
            number(row["ttft_ms_p99"]), str(row["adapter_loads"]), str(row["adapter_evictions"]),
            str(row["failed"]),
        ])  # fmt: skip
    title = (
        f"Adapters registered, {result['shape']}, {result['streams']} streams,"
        f" {result['arena_adapters']} adapters fit the device"
    )
    return Table(title, header, rows)


def served_table(result: dict[str, Any]) -> Table:
    """Table F: through tritonserver against the engine alone, turn by turn."""
    header = ["measure", "engine alone", "through the server", "difference", "goal", "goal reached"]
    rows = [
        [row["measure"], number(row["alone"]), number(row["served"]), row["difference"], row["goal"],
         {True: "reached", False: "missed", None: "not measured" if row["goal"] else ""}[row["reached"]]]
        for row in result["verdicts"]
    ]  # fmt: skip
    return Table(f"Through the server, {result['shape']}, {result['streams']} streams", header, rows)


def life_table(result: dict[str, Any]) -> Table:
    """Table D: what adapters cost as they come and go; milliseconds where the number does not say what else."""
    header = ["workload", "number", "vLLM", "goal", "ours", "goal reached"]
    rows = [
        [row["workload"], row["number"], number(row["vllm"]), number(row["goal"]), number(row["ours"]),
         {True: "reached", False: "missed", None: ""}[row["met"]]]
        for row in result["rows"]
    ]  # fmt: skip
    return Table(f"Adapters coming and going, {result['model']}", header, rows)


_TABLES = (
    ("decode", decode_table),
    ("prefill", prefill_table),
    ("lora", kernel_table),
    ("sweep", sweep_table),
    ("verdicts", served_table),
    ("rows", life_table),
)


def tables_of(result: dict[str, Any]) -> list[Table]:
    """Every table that a result's fields give."""
    return [make(result) for field, make in _TABLES if result.get(field)]


def text_of(result: dict[str, Any]) -> str:
    """A result for the terminal, with where it and the peers' numbers come from."""
    facts = result.get("environment", {})
    ours = f"ours: {facts.get('gpu', '?')}, {facts.get('cpu', '?')}, torch {facts.get('torch', '?')}"
    theirs = (
        f"peers, floors and goals: {peers.HARDWARE}, {peers.MEASURED}, {peers.VLLM}; {peers.KERNEL_PEERS}"
    )
    return "\n\n".join([table.as_text() for table in tables_of(result)] + [f"{ours}\n{theirs}"])
