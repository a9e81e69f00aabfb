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
import statistics
import struct
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
from environment import environment
from grpc_streams import Record, Request, run_streams
from stream_stats import percentile

from lorax_backend.server.launch import ServerOptions, TritonServer
from lorax_backend.server.repository import write_repository

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
               "mlp.up_proj", "mlp.down_proj")  # fmt: skip
MIXED_RANKS = (8, 16, 64, 12, 32)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One word a token: enough to decode whatever a random model says."""
    vocab = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<s>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )


def write_adapters(root: Path, shape: dict[str, Any], ranks: list[int], unique: int = 8) -> list[str]:
    """PEFT folders of random bfloat16 weights on all seven projections. Adapters of one rank share at most `unique`
    files, by hard links."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    q = shape["num_attention_heads"] * shape["head_dim"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    widths = dict(zip(PROJECTIONS, [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner),
                                    (hidden, inner), (inner, hidden)], strict=True))  # fmt: skip
    made: dict[tuple[int, int], Path] = {}
    folders = []
    for index, rank in enumerate(ranks):
        folder = root / f"adapter-{index:03d}-r{rank}"
        folder.mkdir(parents=True)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
                  "target_modules": [name.split(".")[1] for name in PROJECTIONS]}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))
        weights, key = folder / "adapter_model.safetensors", (rank, index % unique)
        if key in made:
            weights.hardlink_to(made[key])
        else:
            _write_weights(weights, widths, shape["num_hidden_layers"], rank, index)
            made[key] = weights
        folders.append(str(folder))
    return folders


def _write_weights(path: Path, widths: dict[str, tuple[int, int]], layers: int, rank: int, seed: int) -> None:
    header: dict[str, Any] = {}
    end = 0
    for layer in range(layers):
        for name, (inputs, outputs) in widths.items():
            for leaf, shape in (("lora_A", [rank, inputs]), ("lora_B", [outputs, rank])):
                size = 2 * shape[0] * shape[1]
                header[f"base_model.model.model.layers.{layer}.{name}.{leaf}.weight"] = {
                    "dtype": "BF16", "shape": shape, "data_offsets": [end, end + size],
                }  # fmt: skip
                end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(seed).standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)
    half = (block.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16 by truncation
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        left = end
        while left:
            file.write(half[: min(left, len(half))])
            left -= min(left, len(half))


@contextmanager
def server(model: Path, **options: object) -> Iterator[TritonServer]:
    """A running tritonserver with the model; prints why it did not start."""
    parameters = {"model_id": str(model), "load_format": "dummy", "default_adapter_source": "local",
                  "max_total_tokens": "4096", "max_batch_size": "128", "max_active_adapters": "160",
                  "prefix_caching": "false"}  # fmt: skip
    parameters |= {name: str(value) for name, value in options.items()}
    with TemporaryDirectory() as folder:
        started = time.monotonic()
        running = TritonServer(write_repository(Path(folder), parameters), ServerOptions(models=("lorax",)))
        with running:
            try:
                running.wait_ready(240)
            except Exception:
                print(running.log_tail(80), flush=True)
                raise
            print(f"server ready after {time.monotonic() - started:.1f} s", flush=True)
            yield running


def _host_bytes(adapters: list[str], factor: int, limit_gib: float) -> int:
    """Host memory for all of them, with room to spare, or the limit; `factor` is the element size over the files'."""
    size = sum(Path(folder, "adapter_model.safetensors").stat().st_size for folder in adapters)
    return min(factor * 5 * size // 4 + (64 << 20), int(limit_gib * 2**30))


def check(model: Path, adapters: list[str], args: argparse.Namespace, vocab: int) -> dict[str, Any]:
    """Greedy tokens of all requests at once against the same requests one by one."""
    rng = np.random.default_rng(3)
    requests = [
        Request(rng.integers(10, vocab, int(rng.integers(5, 200))).tolist(), ["", *adapters][i % (len(adapters) + 1)],
                args.check_tokens)
        for i in range(args.check_streams)
    ]  # fmt: skip
    with server(
        model, dtype="float32", adapter_pages=80, adapter_host_bytes=_host_bytes(adapters, 2, args.host_gib)
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


def summarize(records: list[Record], prompt_tokens: int) -> dict[str, float]:
    """Milliseconds and tokens a second. Steady: while every stream decodes, from the last first token to the first
    last one."""
    good = [r for r in records if not r.error and r.arrivals]
    if not good:
        return {"failed": len(records)}
    gaps = []
    for record in good:
        for (before, _), (now, count) in zip(record.arrivals, record.arrivals[1:], strict=False):
            gaps += [1e3 * (now - before) / count] * count
    begin, end = max(r.arrivals[0][0] for r in good), min(r.arrivals[-1][0] for r in good)
    steady = sum(count for r in good for when, count in r.arrivals if begin < when <= end)
    first, last = min(r.sent for r in good), max(r.arrivals[-1][0] for r in good)
    tokens = sum(len(r.token_ids) for r in good)
    return {
        "failed": len(records) - len(good),
        "ttft_p50": 1e3 * statistics.median(r.arrivals[0][0] - r.sent for r in good),
        "itl_p50": percentile(gaps, 0.5),
        "itl_p99": percentile(gaps, 0.99),
        "steady_tok_s": steady / (end - begin) if end > begin else float("nan"),
        "total_tok_s": (tokens + prompt_tokens * len(good)) / (last - first),
        "tokens_a_response": tokens / sum(len(r.arrivals) for r in good),
    }


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
            f"{name:<28}{count:>4} streams  " + "  ".join(f"{k} {v:,.1f}" for k, v in summary.items()),
            flush=True,
        )

    options = {
        "adapter_pages": 2 * len(adapters) + 8,
        "adapter_host_bytes": _host_bytes(adapters, 1, args.host_gib),
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
    from gpu_smoke import SHAPES, write_model

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
