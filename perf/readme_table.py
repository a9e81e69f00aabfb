#!/usr/bin/env python3
"""Writes the measured tables of README.md and perf/results/README.md from the JSON beside them.

    python perf/readme_table.py                        # after a result in perf/results has changed
    python perf/readme_table.py --take OUT             # first bring in what perf/gpu_all.py left in OUT
    python perf/readme_table.py --check                # exit with 1 if a document is not what the results say

Only what stands between the markers is written, so numbers and documents cannot part; a test runs the check.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "perf")]

import peers
from table_text import (
    Table,
    decode_table,
    kernel_table,
    life_table,
    number,
    prefill_table,
    served_table,
    sweep_table,
)

from lorax_backend.generated_text import with_part

_BEGIN = "<!-- measured: begin (written by perf/readme_table.py) -->"
_END = "<!-- measured: end -->"


@dataclass(frozen=True, slots=True)
class Source:
    """A result: what it is about, the files that may hold it, best first, and the field that makes its table."""

    title: str
    files: tuple[str, ...]
    field: str


DECODE_8B = Source("Decoding, Llama-3-8B's shape: ms between tokens",
                   ("table_b-llama3-8b-h100.json", "engine-llama3-8b-h100.json"), "decode")  # fmt: skip
DECODE_1B = Source("Decoding, Llama-3.2-1B's shape: ms between tokens",
                   ("table_b-llama3-1b-h100.json", "engine-llama3-1b-h100.json"), "decode")  # fmt: skip
PREFILL = Source("Long prompts, Llama-3-8B's shape: tokens a second",
                 ("table_c-llama3-8b-h100.json", "engine-llama3-8b-h100.json"), "prefill")  # fmt: skip
KERNELS = Source("LoRA kernels in situ, microseconds a layer", ("kernels-llama3-8b-h100.json",), "lora")
SWEEP = Source("Adapters registered, 128 streams", ("sweep-llama3-8b-h100.json",), "sweep")
SWEEP_BESIDE = Source(
    "Adapters registered, 128 streams, while another engine on the same GPU served the ten minutes' traffic below",
    ("sweep_beside_soak-llama3-8b-h100.json",), "sweep",
)  # fmt: skip
SERVED = Source(
    "Through tritonserver's gRPC, against the engine alone", ("table_f-llama3-8b-h100.json",), "verdicts"
)
LIFE = Source("Adapters coming and going: 200 of them, 32 on the GPU, 64 in host memory; ms",
              ("adapter_life-llama3-8b-h100.json",), "rows")  # fmt: skip
CHURN = Source("Adapters coming and going: requests at random times, adapters by Zipf(1.0); ms",
               ("adapter_churn-llama3-8b-h100.json",), "rows")  # fmt: skip
SOAK = Source("Ten minutes with 2,000 adapters", ("adapter_soak-llama3-8b-h100.json",), "rows")
SOURCES = (DECODE_8B, DECODE_1B, PREFILL, KERNELS, SWEEP, SWEEP_BESIDE, SERVED, CHURN, LIFE, SOAK)
_MAKE = {"decode": decode_table, "prefill": prefill_table, "lora": kernel_table, "sweep": sweep_table,
         "verdicts": served_table, "rows": life_table}  # fmt: skip
# What perf/gpu_all.py leaves, by the name it is kept under.
_TAKEN = {
    "kernels-8b": "kernels-llama3-8b",
    "kernels-1b": "kernels-llama3-1b",
    "gemm-8b": "gemm-llama3-8b",
    "gemm-1b": "gemm-llama3-1b",
}
_NOT_TAKEN = {"summary", "kernel_tests"}


def find(source: Source, results: Path = RESULTS) -> tuple[str, dict[str, Any]] | None:
    """Name and content of the best file there is."""
    for name in source.files:
        path = results / name
        if path.is_file():
            return name, json.loads(path.read_text())
    return None


def origin(name: str, result: dict[str, Any]) -> str:
    """Where a table's numbers come from, as a line below it."""
    facts = result["environment"]
    through = {"engine": "the whole engine, alone"}.get(result.get("through", ""), "")
    if "through" not in result and "decode" in result:
        through = "the model's steps alone, without a scheduler"
    versions = f"torch {facts.get('torch', '?')}, triton {facts.get('triton', '?')}"
    parts = [f"[{name}]({name})", through, facts.get("gpu", "?"), versions, f"`{result['command']}`"]
    return ", ".join(part for part in parts if part)


def long_tables(results: Path = RESULTS) -> str:
    """Every table in full, for perf/results/README.md."""
    blocks = []
    for source in SOURCES:
        found = find(source, results)
        if found is None:
            continue
        name, result = found
        table: Table = _MAKE[source.field](result)
        blocks.append(f"### {source.title}\n\n{table.as_markdown()}\n\n{origin(name, result)}")
    blocks.append(
        f"Floors, peers and goals are for one {peers.HARDWARE}; the peers were measured on {peers.MEASURED}: "
        f"{peers.VLLM}; {peers.KERNEL_PEERS}. All of it is in [peers.py](../peers.py)."
    )
    return "\n\n".join(blocks)


def short_table(results: Path = RESULTS) -> str:
    """Decoding of the 8B in one table of three numbers a cell, for README.md."""
    found = find(DECODE_8B, results)
    if found is None:
        return "Nothing has been measured yet."
    _, result = found
    listed = {(row.streams, row.kind): row for row in peers.DECODE["llama3-8b"]}
    ours = {(row["streams"], row["adapters"]): row["ms_p50"] for row in result["decode"]}
    header = ["streams", "base model", "one adapter", "every stream its own adapter"]
    rows = []
    for streams in sorted({row["streams"] for row in result["decode"]}):
        cells = []
        for kind in peers.KINDS:
            row = listed.get((streams, kind))
            if row is None or (streams, kind) not in ours:
                cells.append("")
                continue
            mine = f"**{number(ours[streams, kind])}**"
            cells.append(f"{mine} / {number(row.vllm_ms)} / {number(row.floor_ms)}")
        rows.append([str(streams), *cells])
    table = Table("", header, rows).as_markdown()
    steps = "" if "through" in result else " Ours are the model's steps alone, without a scheduler."
    return (
        "Milliseconds between two tokens of a stream: **ours** / vLLM 0.26 / the time in which the card can read the"
        f" bytes. {peers.HARDWARE}, Llama-3-8B's shape with random weights, bfloat16, rank-16 adapters on all seven"
        f" projections, prompts of 128 tokens.{steps}\n\n{table}"
    )


def replaced(text: str, block: str) -> str:
    """The document with `block` between its markers.

    Raises:
        ValueError: the markers are missing.
    """
    return with_part(text, _BEGIN, _END, block)


def documents(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """Each document and what it should hold."""
    results = root / "perf" / "results"
    for path, block in (
        (root / "README.md", short_table(results)),
        (results / "README.md", long_tables(results)),
    ):
        yield path, replaced(path.read_text(), block)


def take(folder: Path, machine: str, results: Path = RESULTS) -> list[str]:
    """Copy results of a run, named after the machine. Those of tiny models, logs and stamps are left."""
    taken = []
    for path in sorted(folder.glob("*.json")):
        if path.stem in _NOT_TAKEN or path.stem.endswith("-tiny"):
            continue
        name = f"{_TAKEN.get(path.stem, path.stem)}-{machine}.json"
        shutil.copyfile(path, results / name)
        taken.append(name)
    return taken


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--take", type=Path, metavar="OUT", help="bring in the JSON of this folder first")
    parser.add_argument("--machine", default="h100", help="with --take: the end of the files' names [h100]")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    if args.take:
        print("taken:", ", ".join(take(args.take, args.machine)) or "nothing")
    stale = []
    for path, text in documents():
        if path.read_text() != text:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(text)
    print(f"{'not up to date' if args.check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
