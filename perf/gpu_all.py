#!/usr/bin/env python3
"""Everything that is worth measuring on one GPU, unattended, within a budget of time.

    python perf/gpu_all.py --budget-s 1700 --out results
    python perf/gpu_all.py table_e table_b --budget-s 600       # some parts, in the order of importance
    python perf/gpu_all.py --dry-run                            # the whole chain with a tiny model; a CPU will do

Parts run one after the other, the most important first, each with a limit of its own and none beyond the budget; one
that fails or takes too long does not stop the others. Each part's output is kept in OUT/NAME.log and its results as
JSON beside it as soon as it ends; OUT/summary.json and the table at the end say how each part went. The exit status is
1 if a part failed; a missed goal is told, and no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "perf")]

from environment import environment
from peers import GOAL_MISSED

_SUMMARY = "summary.json"
_SHORTEST_S = 5.0  # what is left of the budget below this is not worth a start
_LAST_WORDS_S = 10.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True, slots=True)
class Part:
    """One program: its limit in seconds, its arguments on a GPU, and those for a tiny model, None where only a GPU
    will do. `{out}` stands for the folder of results."""

    name: str
    limit_s: float
    command: tuple[str, ...]
    tiny: tuple[str, ...] | None
    what: str


_TINY = ("--shape", "tiny")
_TINY_TABLE = (*_TINY, "--prompt", "16", "--tokens", "16", "--max-total-tokens", "256", "--out", "{out}")
# The most important first: what proves the kernels, what decides about speed, then what takes longest.
PARTS = (
    Part("kernel_tests", 420, ("perf/kernel_gate.py",), None, "tests of the kernels"),
    Part("table_e", 300, ("perf/kernels.py", "--jobs", "8", "--expand", "both", "--out", "{out}"), None,
         "LoRA kernels in situ, in every form"),
    Part("equality", 300, ("perf/gpu_equality.py", "--out", "{out}"),
         ("perf/gpu_equality.py", *_TINY, "--dtypes", "float32", "--streams", "4", "--tokens", "6", "--out", "{out}"),
         "greedy tokens: graphs, overlap, Triton or torch"),
    Part("other_tests", 240, ("perf/kernel_gate.py", "--others"), None, "tests of runner, sampler and copies"),
    Part("table_b", 240, ("perf/engine_tables.py", "table_b", "--out", "{out}"),
         ("perf/engine_tables.py", "table_b", *_TINY_TABLE, "--streams", "1,4"), "decoding, 8B"),
    Part("table_b_1b", 150, ("perf/engine_tables.py", "table_b_1b", "--out", "{out}"),
         ("perf/engine_tables.py", "table_b_1b", *_TINY_TABLE, "--streams", "2"), "decoding, 1B"),
    Part("table_c", 200, ("perf/engine_tables.py", "table_c", "--out", "{out}"),
         ("perf/engine_tables.py", "table_c", *_TINY_TABLE, "--streams", "2"), "long prompts"),
    Part("table_f", 300, ("perf/table_f.py", "--out", "{out}"),
         ("perf/table_f.py", *_TINY_TABLE, "--streams", "4", "--adapters", "2", "--rounds", "1", "--singles", "2",
          "--probes", "2", "--probe-after-s", "0", "--probe-gap-s", "0", "--processes", "2"),
         "through tritonserver against the engine alone"),
    Part("sweep", 300, ("perf/engine_tables.py", "sweep", "--out", "{out}"),
         ("perf/engine_tables.py", "sweep", *_TINY_TABLE, "--streams", "4", "--registered", "1,4,12", "--arena", "4",
          "--rounds", "3"),
         "1 to 1,024 adapters"),
    Part("adapter_life", 600, ("perf/adapter_life.py", "all", "--model", "llama3-8b", "--out",
                               "{out}/adapter_life-llama3-8b.json"),
         ("perf/adapter_life.py", "tiers", "--model", "tiny", "--out", "{out}/adapter_life-tiny.json"),
         "adapters coming and going"),
    Part("checks", 300, ("perf/gpu_smoke.py", "--out", "{out}"),
         ("perf/gpu_smoke.py", *_TINY, "--streams", "1,2", "--steps", "4", "--check-streams", "4", "--check-tokens",
          "4", "--long-prompt", "16", "--out", "{out}"),
         "steps alone: graphs on and off, mixed and single runs, speed"),
    Part("prefill_graphs", 200, ("perf/gpu_smoke.py", "--prefill-graph-tokens", "512", "--streams", "1", "--out",
                                 "{out}/prefill_graphs"),
         ("perf/gpu_smoke.py", *_TINY, "--prefill-graph-tokens", "64", "--streams", "1", "--steps", "2", "--skip-check",
          "--long-prompt", "16", "--out", "{out}/prefill_graphs"),
         "steps with prompt tokens as graphs or as launches: the same tokens, and which is sooner"),
    Part("server", 400, ("perf/gpu_server.py", "--adapters", "64", "--host-gib", "3", "--out", "{out}"),
         ("perf/gpu_server.py", *_TINY, "--adapters", "2", "--streams", "2", "--prompt", "8", "--long-prompt", "16",
          "--tokens", "6", "--check-streams", "3", "--check-tokens", "4", "--processes", "2", "--out", "{out}"),
         "through tritonserver: tokens of mixed and single runs, speed"),
    Part("variants", 200, ("perf/gpu_smoke.py", "--skip-check", "--prefill-graph-tokens", "512", "--lora",
                           '{"fuse_norm": true, "fuse_silu": true}', "--node", '{"pdl": true}', "--out",
                           "{out}/variants"),
         ("perf/gpu_smoke.py", *_TINY, "--skip-check", "--streams", "1", "--steps", "2", "--long-prompt", "8", "--out",
          "{out}/variants"),
         "steps alone with expand in the nodes after the base layers, early launches and graphs of prefill"),
    Part("perf_analyzer", 240, ("perf/triton_load.py", "--shape", "llama3-8b", "--concurrency", "1,32,128",
                                "--requests", "256", "--prompt-words", "128", "--max-tokens", "128", "--output",
                                "{out}/perf_analyzer-llama3-8b.md"),
         ("perf/triton_load.py", *_TINY, "--random-adapters", "2", "--concurrency", "2", "--requests", "6",
          "--max-tokens", "6", "--prompt-words", "6", "--output", "{out}/perf_analyzer-tiny.md"),
         "NVIDIA's perf_analyzer against the server"),
    Part("adapter_soak", 600, ("perf/adapter_life.py", "soak", "--model", "llama3-8b", "--minutes", "6", "--out",
                               "{out}/adapter_soak-llama3-8b.json"), None, "2,000 adapters: memory flat, all answered"),
)  # fmt: skip
_NEEDS_ANALYZER = "perf_analyzer"


@dataclass(slots=True)
class Outcome:
    """How a part went: `passed`, `goal missed`, `failed`, `out of time`, or `not run`, and why."""

    name: str
    status: str
    seconds: float = 0.0
    returncode: int | None = None
    note: str = ""


def run_part(name: str, command: list[str], limit_s: float, log: Path) -> Outcome:
    """Run one program with its output in `log` and on this one's. After `limit_s` seconds it and every process it
    started are ended."""
    started = time.monotonic()
    with log.open("w") as kept:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        tail: list[str] = []
        reader = threading.Thread(target=_pass_on, args=(process, kept, tail), daemon=True)
        reader.start()
        late = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = True
            _signal(process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_WORDS_S)
        finally:
            _signal(process, signal.SIGKILL)  # also what it left behind
            process.wait()
            reader.join(_LAST_WORDS_S)
            assert process.stdout is not None
            process.stdout.close()
    seconds = time.monotonic() - started
    ended = {0: "passed", GOAL_MISSED: "goal missed"}.get(process.returncode, "failed")
    status = "out of time" if late else ended
    note = "" if status == "passed" else tail[-1].strip() if tail else ""
    return Outcome(name, status, round(seconds, 1), process.returncode, note)


def _pass_on(process: subprocess.Popen[str], kept: IO[str], tail: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"    {line}", end="", flush=True)
        kept.write(line)
        kept.flush()
        if line.strip():
            tail[:] = [line]


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run_all(
    parts: list[Part],
    out: Path,
    budget_s: float,
    command_of: Callable[[Part], list[str] | str],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the parts in order. `command_of` gives a command, or the reason why the part cannot run. The summary is
    written after each."""
    begun = clock()
    outcomes: list[Outcome] = []
    for part in parts:
        left = budget_s - (clock() - begun)
        command = command_of(part)
        if isinstance(command, str):
            outcome = Outcome(part.name, "not run", note=command)
        elif left < _SHORTEST_S:
            outcome = Outcome(part.name, "not run", note="the budget is spent")
        else:
            limit = min(part.limit_s, left)
            print(f"==> {part.name}: {part.what} (at most {limit:.0f} s)", flush=True)
            outcome = run_part(part.name, command, limit, out / f"{part.name}.log")
        outcomes.append(outcome)
        write_summary(out, outcomes, parts, budget_s, clock() - begun)
    return outcomes


def write_summary(
    out: Path, outcomes: list[Outcome], parts: list[Part], budget_s: float, seconds: float
) -> None:
    """OUT/summary.json: written to a new file first, so that whatever stops this program leaves a whole one."""
    results = [path.name for path in out.iterdir() if path.suffix in (".json", ".md")]
    summary: dict[str, Any] = {
        "environment": environment(),
        "budget_s": budget_s,
        "seconds": round(seconds, 1),
        "parts": [asdict(outcome) for outcome in outcomes],
        "waiting": [part.name for part in parts[len(outcomes) :]],
        "files": sorted(set(results) - {_SUMMARY}),
    }
    partial = out / f"{_SUMMARY}.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    partial.rename(out / _SUMMARY)


def summary_text(outcomes: list[Outcome]) -> str:
    """One line a part."""
    return "\n".join(
        f"{outcome.name:<16}{outcome.status:<12}{outcome.seconds:>7.1f} s  {outcome.note[:90]}"
        for outcome in outcomes
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)} [all]")
    parser.add_argument("--skip", default="", help="parts to leave out, with commas")
    parser.add_argument(
        "--budget-s", type=float, default=1700.0, help="seconds for all parts together [1700]"
    )
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, on whatever is here")
    parser.add_argument("--perf-analyzer", type=Path, help="binary or wheel, for machines without a network")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    args = parser.parse_args(argv)
    args.skip = [name for name in args.skip.split(",") if name]
    unknown = {*args.parts, *args.skip} - set(names)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return args


def commands(args: argparse.Namespace) -> Callable[[Part], list[str] | str]:
    """What to run for a part, or why not."""

    def command_of(part: Part) -> list[str] | str:
        chosen = part.tiny if args.dry_run else part.command
        if chosen is None:
            return "needs a GPU"
        if chosen[0].startswith("perf/") and not (ROOT / chosen[0]).is_file():
            return f"there is no {chosen[0]}"
        made = [sys.executable, *(word.replace("{out}", str(args.out.resolve())) for word in chosen)]
        if part.name == _NEEDS_ANALYZER and args.perf_analyzer is not None:
            made += ["--perf-analyzer", str(args.perf_analyzer.resolve())]
        return made

    return command_of


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [p for p in PARTS if (not args.parts or p.name in args.parts) and p.name not in args.skip]
    outcomes = run_all(parts, args.out, args.budget_s, commands(args))
    print(f"\n{summary_text(outcomes)}\n\nkept in {args.out}", flush=True)
    return 1 if any(outcome.status in ("failed", "out of time") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
