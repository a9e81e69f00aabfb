#!/usr/bin/env python3
"""Compares the engine alone with the same engine behind tritonserver's gRPC: same work, same machine, turn by turn.

    python perf/table_f.py                                              # Llama-3-8B's shape, 128 streams
    python perf/table_f.py --shape tiny --streams 4 --tokens 24 --probes 2      # a CPU will do

Both engines are loaded side by side and only one works at a time; the order changes from round to round. Steps are
recorded inside the engine's process, by the same lines on both sides. Tokens a second and steps are those of the time
in which every stream decodes, after the ramp-up. The first token is taken from single requests to an idle engine and
from newcomers among streams that decode. Exits with 3 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "perf")]

import numpy as np
from engine_alone import EngineAlone, EngineFailedError, first_error
from environment import environment
from gpu_models import SHAPES, host_bytes, write_adapters, write_model, write_tokenizer
from gpu_server import server
from grpc_streams import run_streams
from peers import GOAL_MISSED, SERVED, ServedGoals
from records import Record, Request, finished, steady_window, summarize, token_gaps_ms
from step_recorder import read_steps, step_times_ms
from stream_stats import percentile
from table_text import number, text_of

from lorax_backend.config import ServerConfig

SIDES = ("alone", "served")


@dataclass(frozen=True, slots=True)
class Side:
    """One way to the engine: what runs streams, and the file of its engine's steps."""

    run: Callable[[list[Request]], list[Record]]
    steps: Path

    def checked(self, requests: list[Request]) -> list[Record]:
        """Raises EngineFailedError if a stream failed."""
        records = self.run(requests)
        if len(finished(records)) != len(requests):
            raise EngineFailedError(f"a stream failed: {first_error(records) or 'no tokens'}")
        return records


class Work:
    """The requests of each measurement, the same for both sides."""

    def __init__(self, args: argparse.Namespace, adapters: list[str], vocab: int) -> None:
        self._args, self._adapters, self._vocab = args, adapters, vocab

    def streams(self, kind: str, seed: int) -> list[Request]:
        args = self._args
        names = [""] if kind == "base" else self._adapters
        return [self._request(seed + i, names[i % len(names)], args.tokens) for i in range(args.streams)]

    def single(self, seed: int) -> list[Request]:
        return [self._request(seed, "", 4)]

    def newcomers(self, seed: int) -> list[Request]:
        """Three quarters of the streams decode; newcomers come one by one, `probe_gap_s` apart. Of the last eighth of
        rows the scheduler gives nothing to who has more than a share, so with more they would wait for room."""
        args = self._args
        residents = self.streams("base", seed)[: args.streams - max(args.probes, args.streams // 4)]
        probes = [self._request(seed + 5000 + i, "", 4) for i in range(args.probes)]
        for index, probe in enumerate(probes):
            probe.delay_s = args.probe_after_s + index * args.probe_gap_s
        return residents + probes

    def _request(self, seed: int, adapter: str, length: int) -> Request:
        prompt = np.random.default_rng(seed).integers(10, self._vocab, self._args.prompt).tolist()
        return Request(prompt, adapter, length)


def stream_row(side: Side, requests: list[Request], prompt: int) -> dict[str, Any]:
    """Numbers of one run; milliseconds, and tokens a second. Those of the steady phase are None if there was no time in
    which every stream decoded, because the streams were too short for their number."""
    records = side.checked(requests)
    window, summary = steady_window(records), summarize(records, prompt)
    steps = step_times_ms(side.steps, window) if window else []
    gaps = token_gaps_ms(records, window) if window else []
    return {
        "steady_tok_s": summary["steady_tok_s"],
        "total_tok_s": summary["total_tok_s"],
        "steady_s": window[1] - window[0] if window else None,
        "step_mean": statistics.fmean(steps) if steps else None,
        "step_p50": percentile(steps, 0.5) if steps else None,
        "step_p99": percentile(steps, 0.99) if steps else None,
        "itl_p50": percentile(gaps, 0.5) if gaps else None,
        "itl_p99": percentile(gaps, 0.99) if gaps else None,
        "ttft_p50": summary["ttft_p50"],
        "tokens_a_response": summary["tokens_a_response"],
        "steps": sum(when >= min(record.sent for record in records) for when, _ in read_steps(side.steps)),
    }


def measure(sides: dict[str, Side], work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, each in turns."""
    for name in SIDES:  # kernels compile, adapters come to the device
        for kind in ("base", "adapters"):
            sides[name].checked(work.streams(kind, 1))
    rounds: list[dict[str, Any]] = []
    first: dict[str, dict[str, list[float]]] = {name: {"idle": [], "newcomer": []} for name in SIDES}
    for turn in range(args.rounds):
        order = SIDES if turn % 2 == 0 else SIDES[::-1]
        for kind in ("base", "adapters"):
            for name in order:
                row = stream_row(sides[name], work.streams(kind, 100 * (turn + 1)), args.prompt)
                rounds.append({"side": name, "adapters": kind, "round": turn, **row})
                step = f"{number(row['step_mean'])} ms (p99 {number(row['step_p99'])})"
                rate = number(row["steady_tok_s"], 0)
                print(f"{name:<7}{kind:<9}{rate:>10} tok/s  step {step}", flush=True)
        for name in order:
            records = sides[name].checked(work.newcomers(9000 * (turn + 1)))
            first[name]["newcomer"] += [record.first_token_ms for record in records[-args.probes :]]
    for index in range(args.singles):
        for name in SIDES if index % 2 == 0 else SIDES[::-1]:
            (record,) = sides[name].checked(work.single(70_000 + index))
            first[name]["idle"].append(record.first_token_ms)
    return {"rounds": rounds, "first_token": first}


def verdicts(measured: dict[str, Any], goals: ServedGoals = SERVED) -> list[dict[str, Any]]:
    """One row a measure: both sides, their difference, the goal and whether it is reached. Medians of the rounds."""
    rows = []

    def middle(side: str, kind: str, field: str) -> float:
        found = [row for row in measured["rounds"] if (row["side"], row["adapters"]) == (side, kind)]
        values = [row[field] for row in found if row[field] is not None]
        return statistics.median(values) if values else float("nan")

    def ratio(kind: str, field: str, label: str, limit: float | None, at_least: bool = False) -> None:
        alone, served = middle("alone", kind, field), middle("served", kind, field)
        share = served / alone if alone else float("nan")
        known = limit is not None and share == share
        reached = (share >= limit if at_least else share <= limit) if known else None
        goal = "" if limit is None else f"{'at least' if at_least else 'at most'} {limit:.0%}"
        rows.append({
            "measure": f"{label}, {kind}", "alone": alone, "served": served,
            "difference": f"{share:.1%}" if share == share else "-", "goal": goal, "reached": reached,
        })  # fmt: skip

    for kind in sorted({row["adapters"] for row in measured["rounds"]}, reverse=True):
        ratio(kind, "steady_tok_s", "tokens/s", goals.tokens_share, at_least=True)
        ratio(kind, "step_mean", "step mean, ms", goals.step_mean_ratio)
        ratio(kind, "step_p99", "step p99, ms", goals.step_p99_ratio)
        ratio(kind, "itl_p99", "between tokens p99, ms", None)
        ratio(kind, "ttft_p50", "first token of all at once p50, ms", None)
    for case, label in (("idle", "first token, idle, ms"), ("newcomer", "first token among streams, ms")):
        alone, served = (statistics.median(measured["first_token"][side][case]) for side in SIDES)
        rows.append({"measure": label, "alone": alone, "served": served, "difference": f"{served - alone:+.1f} ms",
                     "goal": f"at most {goals.first_token_ms:+.0f} ms",
                     "reached": served - alone <= goals.first_token_ms})  # fmt: skip
    return rows


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Start both sides and measure."""
    shape = SHAPES[args.shape]
    with TemporaryDirectory(prefix="lorax-perf-") as name, ExitStack() as stack:
        folder = Path(name)
        model = write_model(folder / f"random-{args.shape}", args.shape)
        write_tokenizer(model, shape["vocab_size"])
        adapters = write_adapters(folder / "adapters", shape, [16] * args.adapters)
        options = {
            "max_total_tokens": args.max_total_tokens,
            "max_batch_size": max(args.streams, 8),
            "max_active_adapters": args.adapters + 32,
            "adapter_pages": max(8, 2 * args.adapters + 8),
            # Both engines hold theirs at the same time.
            "adapter_host_bytes": host_bytes(adapters, args.host_gib / 2),
            "num_blocks": (args.streams + 8) * (-(-(args.prompt + args.tokens) // 16) + 1),
            "engine_process": "true",
            "log_level": "warning",
            "cuda_memory_fraction": 0.95,  # both engines are on one GPU
        }
        config = ServerConfig(model_id=str(model), load_format="dummy", default_adapter_source="local",
                              prefix_caching=False, **options)  # fmt: skip
        engine = stack.enter_context(EngineAlone(config, model, folder / "steps-alone"))
        running = stack.enter_context(server(model, steps=folder / "steps-served", **options))
        served = partial(run_streams, running.grpc_address, processes=args.processes)
        sides = {
            "alone": Side(engine.run, folder / "steps-alone"),
            "served": Side(served, folder / "steps-served"),
        }
        measured = measure(sides, Work(args, adapters, shape["vocab_size"]), args)
    return {"streams": args.streams, "adapters": args.adapters, "prompt": args.prompt, "output": args.tokens,
            "verdicts": verdicts(measured), **measured}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama3-8b", choices=list(SHAPES))
    parser.add_argument("--streams", type=int, default=SERVED.streams)
    parser.add_argument("--adapters", type=int, default=64, help="in the runs with adapters [64]")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument(
        "--tokens", type=int, default=384, help="long enough that all streams decode at once [384]"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--singles", type=int, default=20, help="single requests to the idle engine [20]")
    parser.add_argument("--probes", type=int, default=8, help="newcomers among the streams of a round [8]")
    parser.add_argument("--probe-after-s", type=float, default=1.0)
    parser.add_argument("--probe-gap-s", type=float, default=0.15)
    parser.add_argument("--processes", type=int, default=8, help="client processes")
    parser.add_argument("--host-gib", type=float, default=3.0)
    parser.add_argument("--max-total-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    args = parser.parse_args(argv)
    if not 0 < args.probes < args.streams:
        parser.error("--probes: between 1 and one less than the streams")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    result = {
        "environment": environment(),
        "table": "table_f",
        "shape": args.shape,
        "command": " ".join(["python", "perf/table_f.py", *(sys.argv[1:] if argv is None else argv)]),
        **compare(args),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"table_f-{args.shape}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{text_of(result)}\n\nkept in {path}", flush=True)
    missed = [row["measure"] for row in result["verdicts"] if row["goal"] and not row["reached"]]
    if missed:
        print(f"missed or not measured: {', '.join(missed)}", file=sys.stderr)
    return GOAL_MISSED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
