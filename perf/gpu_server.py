#!/usr/bin/env python3
"""Drives a real tritonserver on one GPU, with a random model of a real model's shape and random adapters.

    python perf/gpu_server.py --shape llama3-8b

First with float32 weights: the greedy tokens of a mixed batch must equal those of the same requests one by one. (In
bfloat16 they part at near ties, as in any server, because a product's rounding depends on the number of rows.) Then in
the model's own dtype: time to first token, time between tokens and tokens a second at 1 to 128 streams, with no
adapter, one, and a different one for each stream; and a burst of long prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "perf")]

import numpy as np
import step_recorder
from environment import environment
from gpu_models import MIXED_RANKS, SHAPES, host_bytes, write_adapters, write_model, write_tokenizer
from grpc_streams import run_streams
from records import Request, summarize

from lorax_backend.server.launch import ServerOptions, TritonServer
from lorax_backend.server.repository import write_repository


@contextmanager
def server(model: Path, *, steps: Path | None = None, **options: object) -> Iterator[TritonServer]:
    """A running tritonserver with the model; prints why it did not start. With `steps`, the ends of its engine's steps
    are appended to that file (`step_recorder`)."""
    parameters = {"model_id": str(model), "load_format": "dummy", "default_adapter_source": "local",
                  "max_total_tokens": "4096", "max_batch_size": "128", "max_active_adapters": "160",
                  "prefix_caching": "false"}  # fmt: skip
    parameters |= {name: str(value) for name, value in options.items()}
    with TemporaryDirectory() as folder:
        started = time.monotonic()
        repository = write_repository(Path(folder), parameters)
        if steps is not None:
            (repository / "lorax" / "1" / "model.py").write_text(step_recorder.model_file(steps))
        running = TritonServer(repository, ServerOptions(models=("lorax",)))
        with running:
            try:
                running.wait_ready(240)
            except Exception:
                print(running.log_tail(80), flush=True)
                raise
            print(f"server ready after {time.monotonic() - started:.1f} s", flush=True)
            yield running


def check(model: Path, adapters: list[str], args: argparse.Namespace, vocab: int) -> dict[str, Any]:
    """Greedy tokens of all requests at once against the same requests one by one."""
    rng = np.random.default_rng(3)
    requests = [
        Request(rng.integers(10, vocab, int(rng.integers(5, 200))).tolist(), ["", *adapters][i % (len(adapters) + 1)],
                args.check_tokens)
        for i in range(args.check_streams)
    ]  # fmt: skip
    with server(
        model, dtype="float32", adapter_pages=80, adapter_host_bytes=host_bytes(adapters, args.host_gib, 2)
    ) as running:
        together = run_streams(running.grpc_address, requests)
        alone = [run_streams(running.grpc_address, [request])[0] for request in requests]
    errors = [record.error for record in together + alone if record.error]
    equal = sum(a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True))
    lengths = sorted({len(record.token_ids) for record in together + alone})
    result = {"check": "mixed batch equals single runs through tritonserver, float32", "requests": len(requests),
              "adapters": len(adapters), "tokens_each": lengths, "equal": equal, "errors": errors[:3],
              "different_answers": len({tuple(r.token_ids) for r in together})}  # fmt: skip
    print(result, flush=True)
    return result


def measure(model: Path, adapters: list[str], args: argparse.Namespace, vocab: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    results = []

    def burst(name: str, count: int, prompt: int, length: int, chosen: list[str]) -> None:
        requests = [
            Request(rng.integers(10, vocab, prompt).tolist(), chosen[i], length) for i in range(count)
        ]
        summary = summarize(run_streams(address, requests, processes=args.processes), prompt)
        results.append({"workload": name, "streams": count, **summary})
        print(
            f"{name:<28}{count:>4} streams  "
            + "  ".join(f"{k} {v:,.1f}" for k, v in summary.items() if v is not None),
            flush=True,
        )

    options = {
        "adapter_pages": 2 * len(adapters) + 8,
        "adapter_host_bytes": host_bytes(adapters, args.host_gib),
    }
    with server(model, **options) as running:
        address = running.grpc_address
        started = time.monotonic()
        burst("warm up, adapters loaded", len(adapters), 16, 4, adapters)
        print(f"{len(adapters)} adapters loaded and used in {time.monotonic() - started:.1f} s", flush=True)
        for count in args.streams:
            kinds = {"decode, base": [""] * count, "decode, one adapter": adapters[:1] * count}
            if count > 1:
                kinds["decode, all distinct"] = [adapters[i % len(adapters)] for i in range(count)]
            for name, chosen in kinds.items():
                burst(name, count, args.prompt, args.tokens, chosen)
        for name, chosen in (("prefill, base", [""] * 8), ("prefill, all distinct", adapters[:8])):
            burst(name, 8, args.long_prompt, 16, [chosen[i % len(chosen)] for i in range(8)])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument(
        "--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32, 64, 128]
    )
    parser.add_argument("--adapters", type=int, default=128)
    parser.add_argument(
        "--host-gib", type=float, default=4.0, help="most page-locked host memory for adapters"
    )
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--long-prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--processes", type=int, default=8, help="client processes")
    parser.add_argument("--check-streams", type=int, default=12)
    parser.add_argument("--check-tokens", type=int, default=24)
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[args.shape]
    report: dict[str, Any] = {"environment": environment(), "shape": args.shape,
                              "command": " ".join(["python", "perf/gpu_server.py", *sys.argv[1:]])}  # fmt: skip
    with TemporaryDirectory() as folder:
        model = write_model(Path(folder) / f"random-{args.shape}", args.shape)
        write_tokenizer(model, shape["vocab_size"])
        mixed = write_adapters(Path(folder) / "mixed", shape, list(MIXED_RANKS))
        adapters = write_adapters(Path(folder) / "adapters", shape, [16] * args.adapters)
        report["check"] = None if args.skip_check else check(model, mixed, args, shape["vocab_size"])
        report["workloads"] = measure(model, adapters, args, shape["vocab_size"])
    (args.out / f"server-{args.shape}.json").write_text(json.dumps(report, indent=1) + "\n")
    checked = report["check"]
    if checked is not None and (checked["errors"] or checked["equal"] != checked["requests"]):
        raise SystemExit("mixed batch and single runs differ")


if __name__ == "__main__":
    main()
