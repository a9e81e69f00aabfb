#!/usr/bin/env python3
"""Measures the engine alone and prints it against the byte floor, the recorded peers and our goals.

    python perf/engine_tables.py table_b              # decoding at 1 to 128 streams, Llama-3-8B's shape
    python perf/engine_tables.py table_b_1b           # the same with Llama-3.2-1B's shape
    python perf/engine_tables.py table_c              # long prompts, 8 and 32 streams
    python perf/engine_tables.py sweep                # 1 to 1,024 adapters registered, 128 streams
    python perf/engine_tables.py table_b --shape tiny --streams 1,4 --tokens 8     # a CPU will do

The engine is a process of its own with scheduler, adapters and model runner, fed over pipes, as the server runs it.
Tokens are stamped when they reach this process. The sweep sends requests for adapters drawn evenly from all that are
registered, always 128 at once, with an arena that holds about 128 and a host tier that holds fewer than the most: the
worst traffic for a cache. It exits with 3 if a step down in tokens/s is a cliff, below half of the one before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "perf")]

import numpy as np
from engine_alone import EngineAlone, EngineFailedError, first_error
from environment import environment
from gpu_models import SHAPES, host_bytes, write_adapters, write_model
from peers import GOAL_MISSED, KINDS, SWEEP_CLIFF, SWEEP_REGISTERED, SWEEP_STREAMS
from records import Record, Request, finished, steady_window, summarize, token_gaps_ms
from step_recorder import step_times_ms
from stream_stats import percentile
from table_text import text_of

from lorax_backend.config import ServerConfig

# Steps are kept short while other adapters have just been there, such as those of the kind before.
_OTHERS_GONE_S = 1.5
TABLES = ("table_b", "table_b_1b", "table_c", "sweep")


@dataclass(frozen=True, slots=True)
class Bench:
    """An engine that runs, the adapters on disk, and a source of prompts."""

    engine: EngineAlone
    adapters: list[str]
    vocab: int
    rng: np.random.Generator

    def requests(self, count: int, prompt: int, length: int, kind: str) -> list[Request]:
        """`count` streams with prompts of their own; `kind` is one of `peers.KINDS`."""
        chosen = {
            "base": [""] * count,
            "one adapter": self.adapters[:1] * count,
            "all distinct": [self.adapters[i % len(self.adapters)] for i in range(count)],
        }[kind]
        return [Request(self.rng.integers(10, self.vocab, prompt).tolist(), name, length) for name in chosen]

    def burst(self, count: int, prompt: int, length: int, kind: str) -> list[Record]:
        """All streams at once.

        Raises:
            EngineFailedError: a stream failed; a number from the others would be of another workload.
        """
        records = self.engine.run(self.requests(count, prompt, length, kind))
        if len(finished(records)) != count:
            raise EngineFailedError(f"{count} streams, {kind}: {first_error(records)}")
        return records

    def warm_up(self) -> None:
        """Bring every adapter to the device, and let kernels compile."""
        for begin in range(0, len(self.adapters), 32):
            some = self.adapters[begin : begin + 32]
            self.engine.run([Request([10 + i] * 16, name, 2) for i, name in enumerate(some)])


@contextmanager
def opened(args: argparse.Namespace, adapters: int, arena: int, streams: int) -> Iterator[Bench]:
    """An engine with `adapters` of rank 16 on disk, of which `arena` fit the device."""
    shape = SHAPES[args.shape]
    with TemporaryDirectory(prefix="lorax-perf-") as folder:
        model = write_model(Path(folder) / f"random-{args.shape}", args.shape)
        names = write_adapters(Path(folder) / "adapters", shape, [args.rank] * adapters)
        config = ServerConfig(
            model_id=str(model),
            load_format="dummy",
            default_adapter_source="local",
            max_total_tokens=args.max_total_tokens,
            max_batch_size=streams,
            max_active_adapters=arena + 32,
            adapter_pages=max(8, -(-args.rank // 8) * arena + 8),
            adapter_host_bytes=host_bytes(names, args.host_gib),
            prefix_caching=False,
            num_blocks=args.num_blocks,
            compile_processes=args.compile_processes,
        )
        with EngineAlone(config, model, Path(folder) / "steps") as engine:
            print(
                f"engine ready after {engine.start_seconds:.1f} s, {engine.info.num_blocks} blocks; "
                f"{engine.info.start_times}",
                flush=True,
            )
            yield Bench(engine, names, shape["vocab_size"], np.random.default_rng(1))


def decode_row(bench: Bench, count: int, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds between tokens as the peers were measured, over all streams and rounds; p99 and the engine's own
    steps only while every stream decodes."""
    gaps, steady_gaps, steps, rates, first = [], [], [], [], []
    for _ in range(args.rounds):
        records = bench.burst(count, args.prompt, args.tokens, kind)
        gaps += token_gaps_ms(records)
        first += [record.first_token_ms for record in records]
        window = steady_window(records)
        if window is not None:
            steady_gaps += token_gaps_ms(records, window)
            steps += step_times_ms(bench.engine.steps, window)
            rates.append(summarize(records, args.prompt)["steady_tok_s"])
    p50 = percentile(gaps, 0.5)
    return {
        "streams": count,
        "adapters": kind,
        "ms_p50": p50,
        "ms_p99": percentile(steady_gaps or gaps, 0.99),
        "tokens_s": float(np.median(rates)) if rates else 1e3 * count / p50,
        "step_ms_p50": percentile(steps, 0.5) if steps else None,
        "step_ms_p99": percentile(steps, 0.99) if steps else None,
        "ttft_ms_p50": percentile(first, 0.5),
    }


def measure_decode(args: argparse.Namespace) -> dict[str, Any]:
    """Table B."""
    most = max(args.streams)
    rows = []
    with opened(args, most, most, most) as bench:
        bench.warm_up()
        for count in args.streams:
            for kind in KINDS:
                if kind == "all distinct" and count == 1:
                    continue
                rows.append(decode_row(bench, count, kind, args))
                print(f"decode {count:>4} {kind:<13} {rows[-1]['ms_p50']:8.2f} ms", flush=True)
        start = bench.engine.start_seconds
    return {
        "through": "engine",
        "prompt": args.prompt,
        "output": args.tokens,
        "start_s": start,
        "decode": rows,
    }


def measure_prefill(args: argparse.Namespace) -> dict[str, Any]:
    """Table C: prompt and answer tokens over the time from the first sent to the last received."""
    rows = []
    most = max(args.streams)
    with opened(args, most, most, most) as bench:
        bench.warm_up()
        for count in args.streams:
            for kind in KINDS:
                bench.burst(count, args.prompt, 2, kind)  # buffers of this size, and a warm device
                time.sleep(_OTHERS_GONE_S)
                runs = [
                    summarize(bench.burst(count, args.prompt, args.tokens, kind), args.prompt)
                    for _ in range(args.rounds)
                ]
                middle = sorted(runs, key=lambda run: run["total_tok_s"] or 0.0)[len(runs) // 2]
                rows.append({"streams": count, "adapters": kind, "tokens_s": middle["total_tok_s"],
                             "ttft_ms_p50": middle["ttft_p50"], "itl_ms_p99": middle["itl_p99"]})  # fmt: skip
                print(f"prefill {count:>4} {kind:<13} {rows[-1]['tokens_s']:10,.0f} tokens/s", flush=True)
    return {"through": "engine", "prompt": args.prompt, "output": args.tokens, "prefill": rows}


def sweep_row(bench: Bench, registered: int, streams: int, args: argparse.Namespace) -> dict[str, Any]:
    """Closed loop: `streams` at once, `--rounds` times as many in all, over evenly drawn adapters. Counted while all
    run: from the end of the first `streams` to the end of all but the last."""
    total = streams * args.rounds
    drawn = bench.rng.integers(0, registered, total)
    lengths = bench.rng.integers(max(1, args.tokens // 2), args.tokens * 3 // 2 + 1, total)
    requests = [
        Request(bench.rng.integers(10, bench.vocab, args.prompt).tolist(), bench.adapters[i], int(length))
        for i, length in zip(drawn, lengths, strict=True)
    ]
    before = bench.engine.stats()
    records = bench.engine.run(requests, at_once=streams)
    after = bench.engine.stats()
    good = finished(records)
    ends = sorted(record.arrivals[-1][0] for record in good)
    if len(ends) <= streams:
        raise EngineFailedError(f"{registered} adapters: {first_error(records) or 'too few requests'}")
    begin, end = ends[streams - 1], ends[-streams - 1] if len(ends) > 2 * streams else ends[-1]
    tokens = sum(count for record in good for when, count in record.arrivals if begin < when <= end)
    return {
        "registered": registered,
        "tokens_s": tokens / (end - begin) if end > begin else float("nan"),
        "requests": total,
        "failed": total - len(good),
        "ttft_ms_p50": percentile([record.first_token_ms for record in good], 0.5),
        "ttft_ms_p99": percentile([record.first_token_ms for record in good], 0.99),
        "itl_ms_p50": percentile(token_gaps_ms(good), 0.5),
        "adapter_loads": after["adapter_loads"] - before["adapter_loads"],
        "adapter_evictions": after["adapter_evictions"] - before["adapter_evictions"],
    }


def cliffs(rows: list[dict[str, Any]]) -> list[str]:
    """The steps down, from one number of registered adapters to the next, that lose more than they may."""
    found = []
    for before, after in pairwise(rows):
        share = after["tokens_s"] / before["tokens_s"]
        if not share >= SWEEP_CLIFF:
            found.append(
                f"{before['registered']} to {after['registered']} adapters: {share:.0%} of the tokens/s"
            )
    return found


def measure_sweep(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    streams = max(args.streams)
    with opened(args, max(args.registered), args.arena, streams) as bench:
        for registered in args.registered:
            started = time.monotonic()
            rows.append(sweep_row(bench, registered, streams, args))
            print(
                f"{registered:>5} adapters {rows[-1]['tokens_s']:10,.0f} tokens/s, first token"
                f" {rows[-1]['ttft_ms_p50']:.0f} ms ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
    failed = cliffs(rows) + [f"{row['failed']} requests failed" for row in rows if row["failed"]]
    return {"through": "engine", "streams": streams, "arena_adapters": args.arena, "prompt": args.prompt,
            "output": args.tokens, "sweep": rows, "failures": failed}  # fmt: skip


_MEASURE = {
    "table_b": measure_decode,
    "table_b_1b": measure_decode,
    "table_c": measure_prefill,
    "sweep": measure_sweep,
}
_STREAMS = {
    "table_b": [1, 8, 32, 64, 128],
    "table_b_1b": [1, 32, 128],
    "table_c": [8, 32],
    "sweep": [SWEEP_STREAMS],
}
_LENGTHS = {"table_b": (128, 128), "table_b_1b": (128, 128), "table_c": (2048, 16), "sweep": (128, 128)}
_ROUNDS = {"table_b": 2, "table_b_1b": 3, "table_c": 3, "sweep": 5}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ints = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--shape", choices=list(SHAPES), help="default: llama3-8b, for table_b_1b llama3-1b")
    parser.add_argument("--streams", type=ints)
    parser.add_argument("--prompt", type=int)
    parser.add_argument(
        "--tokens", type=int, help="of an answer; in the sweep the middle of half to one and a half"
    )
    parser.add_argument(
        "--rounds", type=int, help="how often; in the sweep requests over streams, at least 3"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--registered", type=ints, default=list(SWEEP_REGISTERED))
    parser.add_argument("--arena", type=int, default=128, help="adapters the device holds in the sweep [128]")
    parser.add_argument("--host-gib", type=float, default=3.0, help="most host memory for adapters [3]")
    parser.add_argument("--num-blocks", type=int, default=0, help="of the KV cache; 0: what is left [0]")
    parser.add_argument(
        "--compile-processes", type=int, default=ServerConfig().compile_processes, help="the server's option"
    )
    parser.add_argument("--max-total-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    args = parser.parse_args(argv)
    args.shape = args.shape or ("llama3-1b" if args.table == "table_b_1b" else "llama3-8b")
    args.streams = args.streams or _STREAMS[args.table]
    args.prompt = args.prompt or _LENGTHS[args.table][0]
    args.tokens = args.tokens or _LENGTHS[args.table][1]
    args.rounds = args.rounds or _ROUNDS[args.table]
    if args.table == "sweep" and args.rounds < 3:
        parser.error("--rounds: a sweep needs 3 at least, one to begin, one to measure and one to end")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    facts = environment()
    result = {
        "environment": facts,
        "table": args.table,
        "shape": args.shape,
        "command": " ".join(["python", "perf/engine_tables.py", *(sys.argv[1:] if argv is None else argv)]),
        **_MEASURE[args.table](args),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = "table_b" if args.table == "table_b_1b" else args.table
    path = args.out / f"{name}-{args.shape}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{text_of(result)}\n\nkept in {path}", flush=True)
    for failure in result.get("failures", []):
        print(f"FAILED: {failure}", file=sys.stderr)
    return GOAL_MISSED if result.get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
