#!/usr/bin/env python3
"""Runs the engine alone on one GPU with a random model of a real model's shape: is it right, and how fast?

    python perf/gpu_smoke.py --shape llama3-8b

Right: greedy tokens of a mixed batch equal those of single runs, and those with CUDA graphs equal those without, with
float32 weights and with the model's own. Each run is compared up to its first difference, which may only be a near
tie: a step at which the two best logits differ by less than 0.1% of the logits' standard deviation (float32), or by at
most 4 steps of the number format (bfloat16, whose logits are rounded that coarsely). Fast: milliseconds a decode
step at 1 to 128 streams with no adapter, one, and a different one for each stream; prefill in tokens a second; time to
the first token of a prompt of 128, alone and beside 16 streams that decode.

    python perf/gpu_smoke.py --prefill-graph-tokens 512 --streams 1

decides whether steps with prompt tokens should be graphs: the checks run with them, and first tokens are timed in one
process with and without.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import math
import os
import pstats
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "perf")]

import numpy as np
import torch
from environment import environment
from gpu_models import MIXED_RANKS, SHAPES, write_model

from lorax_backend.config import ServerConfig
from lorax_backend.model.runner import TorchModelRunner
from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence, Sequence
from lorax_backend.types import SamplingParams
from lorax_kernels.tuning import OVERRIDE


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Engine:
    """A runner without scheduler: sequences in fixed block runs, adapters of random weights."""

    def __init__(self, path: Path, **options: Any) -> None:
        settings = {"load_format": "dummy", "max_total_tokens": 4096, "max_batch_size": 128,
                    "max_active_adapters": 160, "adapter_pages": 264, "prefix_caching": False} | options  # fmt: skip
        started = time.monotonic()
        self.runner = TorchModelRunner(ServerConfig(model_id=str(path), **settings), path)
        self.start_seconds = time.monotonic() - started
        self._handle = 0
        self._next_block = 0
        self._slots = list(range(self.runner.limits.max_num_seqs))
        self.margins: dict[int, list[float]] = {}

    def add_adapters(self, ranks: list[int], seed: int = 0) -> list[int]:
        """Slots of adapters whose delta is of the size that training gives."""
        arena, slots = self.runner.arena, []
        generator = torch.Generator(device=arena.pages.device).manual_seed(seed)
        scale = 2.0 * self.runner.model_config.hidden_size**-0.5
        for rank in ranks:
            slot = arena.allocate(rank)
            assert slot is not None
            pages = arena.slot_pages[slot][: -(-rank // 8)]
            for index, page in enumerate(pages.tolist()):
                arena.pages[page].normal_(generator=generator).mul_(scale)
                if rank < 8 * (index + 1):  # rows beyond the true rank are zero
                    for key in self.runner.layout.sites:
                        self.runner.layout.a_view(arena.pages, key)[page, :, rank - 8 * index :] = 0
            slots.append(slot)
        for key in [key for key in self.runner.layout.sites if key == "lm_head"]:
            self.runner.layout.a_view(arena.pages, key).zero_()  # the seven projections only
        for kind in arena.site_kinds:
            arena.slot_kinds[slots, arena.site_kinds.index(kind)] = kind != "lm_head"
        return slots

    def start(self, prompts: list[list[int]], adapters: list[int], length: int) -> list[Sequence]:
        """Sequences with room for `length` tokens each."""
        self._next_block, made = 0, []
        block_size = self.runner.info(0.0).block_size
        for row, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
            seq = Sequence(
                self._handle, len(prompt), SamplingParams(max_new_tokens=length), None, 0, 0.0, list(prompt)
            )
            self._handle += 1
            blocks = -(-(len(prompt) + length) // block_size)
            if self._next_block + blocks > self.runner.num_blocks:
                raise SystemExit(f"{self.runner.num_blocks} KV blocks are too few")
            seq.block_table = list(range(self._next_block, self._next_block + blocks))
            self._next_block += blocks
            seq.slot, seq.adapter_slot = self._slots[row], adapter
            made.append(seq)
        return made

    def prefill(self, sequences: list[Sequence]) -> None:
        """All prompts, in steps of at most `max_batch_tokens`."""
        budget, waiting = self.runner.limits.max_batch_tokens, list(sequences)
        while waiting:
            items, left = [], budget
            while waiting and left:
                seq = waiting[0]
                count = min(left, len(seq.token_ids) - seq.num_computed)
                last = seq.num_computed + count == len(seq.token_ids)
                items.append(ScheduledSequence(seq, seq.num_computed, count, last))
                seq.num_computed += count
                left -= count
                if last:
                    waiting.pop(0)
            items.sort(key=lambda item: item.count > 1)
            result = self.runner.launch(ScheduledBatch(items, budget - left)).result()
            for item, token in zip([i for i in items if i.sample], result.token_ids, strict=True):
                item.seq.token_ids.append(token)

    def decode(self, sequences: list[Sequence], steps: int) -> list[float]:
        """Decode with one step ahead of the one that is read, as the engine does; milliseconds between reads."""
        times: list[float] = []
        handle = None
        for step in range(steps + 1):
            following = None
            if step < steps:
                items = [ScheduledSequence(seq, seq.num_computed, 1, True, step + 1) for seq in sequences]
                for seq in sequences:
                    seq.num_computed += 1
                following = self.runner.launch(ScheduledBatch(items, len(items)))
            if handle is not None:
                for seq, token in zip(sequences, handle.result().token_ids, strict=True):
                    seq.token_ids.append(token)
                times.append(time.perf_counter())
            handle = following
        return [1e3 * (b - a) for a, b in pairwise(times)]

    def generate(self, prompts: list[list[int]], adapters: list[int], length: int) -> list[list[int]]:
        sequences = self.start(prompts, adapters, length)
        self.prefill(sequences)
        self.decode(sequences, length - 1)
        return [seq.token_ids[seq.prompt_len :] for seq in sequences]

    def margin(self, prompt: list[int], tokens: list[int], adapter: int, step: int) -> tuple[float, float]:
        """Gap between the two best logits of the `step`-th new token: over the standard deviation of all, and over the
        step of the number format at the best."""
        sequences = self.start([prompt + tokens[:step]], [adapter], 1)
        seen: list[torch.Tensor] = []
        original = self.runner.decoder.logits
        self.runner.decoder.logits = lambda hidden, lora: (
            seen.append(original(hidden, lora)) or seen[-1].clone()
        )
        try:
            self.prefill(sequences)
        finally:
            del self.runner.decoder.logits
        logits = seen[-1][-1].float()
        best, second = logits.topk(2).values.tolist()
        spacing = 2.0 ** math.floor(math.log2(abs(best))) * torch.finfo(self.runner.dtype).eps
        return (best - second) / float(logits.std()), (best - second) / spacing


def compare(
    engine: Engine, name: str, runs: tuple[Any, Any], prompts: list[list[int]], adapters: list[int]
) -> dict[str, Any]:
    """Count equal runs, and those whose first difference is a near tie."""
    equal, ties, wrong = 0, [], []
    exact = engine.runner.dtype == torch.float32
    for row, (one, other) in enumerate(zip(*runs, strict=True)):
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if at is None:
            equal += 1
            continue
        relative, steps = engine.margin(prompts[row], one, adapters[row], at)
        entry = {"row": row, "token": at, "margin": round(relative, 5), "steps": round(steps, 2)}
        (ties if (relative < 1e-3 if exact else steps <= 4) else wrong).append(entry)
    report = {
        "check": name,
        "dtype": str(engine.runner.dtype),
        "equal": equal,
        "near ties": ties,
        "wrong": wrong,
    }
    print(report, flush=True)
    return report


def check(path: Path, args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    vocab = SHAPES[args.shape]["vocab_size"]
    count, length = args.check_streams, args.check_tokens
    prompts = [rng.integers(10, vocab, int(rng.integers(5, 300))).tolist() for _ in range(count)]
    results = []
    runs: dict[bool, Any] = {}
    for graphs in (False, True):
        engine = Engine(path, cuda_graphs=graphs, dtype=dtype, adapter_pages=80,
                        prefill_graph_tokens=args.prefill_graph_tokens if graphs else 0)  # fmt: skip
        slots = engine.add_adapters([MIXED_RANKS[i % 5] for i in range(count // 2)])
        adapters = [slots[i // 2] if i % 2 else -1 for i in range(count)]
        mixed = engine.generate(prompts, adapters, length)
        singles = [engine.generate([p], [a], length)[0] for p, a in zip(prompts, adapters, strict=True)]
        runs[graphs] = mixed
        name = f"mixed batch equals single runs, graphs {'on' if graphs else 'off'}"
        results.append(compare(engine, name, (mixed, singles), prompts, adapters))
        if graphs:
            both = (runs[True], runs[False])
            results.append(compare(engine, "graphs on equals graphs off", both, prompts, adapters))
            distinct = len({tuple(tokens) for tokens in mixed})
            print(
                f"{distinct} different answers of {count}; start with graphs {engine.start_seconds:.1f} s",
                flush=True,
            )
        engine.runner.close()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def measure(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    engine = Engine(path, prefill_graph_tokens=args.prefill_graph_tokens)
    info = engine.runner.info(engine.start_seconds)
    print(
        f"start {engine.start_seconds:.1f} s, {info.num_blocks} blocks, graphs {info.cuda_graph_batch_sizes}, "
        f"of prefills {info.prefill_graph_tokens}; attention of fresh prompts: {info.prefill_attention}",
        flush=True,
    )
    slots = engine.add_adapters([16] * max(8, *args.streams))
    vocab, rng = SHAPES[args.shape]["vocab_size"], np.random.default_rng(1)
    decode, prefill = [], []
    for count in args.streams:
        for kind in ("base", "one adapter", "all distinct"):
            if kind == "all distinct" and count == 1:
                continue
            adapters = {
                "base": [-1] * count,
                "one adapter": [slots[0]] * count,
                "all distinct": slots[:count],
            }[kind]
            prompts = rng.integers(10, vocab, (count, 128)).tolist()
            sequences = engine.start(prompts, adapters, args.steps + 1)
            engine.prefill(sequences)
            times = engine.decode(sequences, args.steps)
            p50 = float(np.median(times))
            decode.append({"streams": count, "adapters": kind, "ms_p50": p50, "ms_p99": float(np.percentile(times, 99)),
                           "tokens_s": 1e3 * count / p50})  # fmt: skip
            print(
                f"decode {count:>4} {kind:<13} {p50:7.2f} ms (p99 {np.percentile(times, 99):.2f})", flush=True
            )
    for count in (8,):
        for kind in ("base", "all distinct"):
            adapters = [-1] * count if kind == "base" else slots[:count]
            prompts = rng.integers(10, vocab, (count, args.long_prompt)).tolist()
            engine.prefill(engine.start(prompts, adapters, 2))
            sequences = engine.start(prompts, adapters, 2)
            synchronize()
            started = time.perf_counter()
            engine.prefill(sequences)
            synchronize()
            rate = count * args.long_prompt / (time.perf_counter() - started)
            prefill.append({"streams": count, "adapters": kind, "tokens_s": rate})
            print(f"prefill {count} x {args.long_prompt} {kind:<13} {rate:,.0f} tokens/s", flush=True)
    first = first_tokens(engine, slots[0], vocab, args.profile)
    result = {"start_s": engine.start_seconds, "prefill_attention": info.prefill_attention, "decode": decode,
              "prefill": prefill, "first_token": first}  # fmt: skip
    if args.profile:
        profile(engine, slots)
    engine.runner.close()
    return result


def first_tokens(engine: Engine, adapter: int, vocab: int, profiled: bool) -> list[dict[str, Any]]:
    """Prompts of 128 tokens, the base model's and an adapter's, alone and beside 16 streams: with graphs of such steps,
    if there are any, and without."""
    runner, entries = engine.runner, []
    recorded = runner._prefill_graphs
    for graphs in (None,) if recorded is None else (recorded, None):
        runner._prefill_graphs = graphs
        for kind, slot in (("base", -1), ("adapter", adapter)):
            for beside in (0, 16):
                entry = first_token(engine, slot, vocab, beside, profiled and not beside)
                entries.append({"adapters": kind, "beside": beside, "graph": graphs is not None} | entry)
                print(
                    f"first token of 128, {kind}, beside {beside} streams, {'graph' if graphs else 'launches'}: "
                    f"{entry['ms']:.2f} ms, {entry['host_ms']:.2f} of them the host's",
                    flush=True,
                )
    runner._prefill_graphs = recorded
    return entries


def first_token(engine: Engine, slot: int, vocab: int, beside: int, profiled: bool) -> dict[str, float]:
    """Milliseconds of a step with a prompt of 128 tokens and `beside` decodes, and of those the host's until the step
    is launched."""
    rng = np.random.default_rng(2)
    whole, host = [], []

    def once() -> None:
        prompts = rng.integers(10, vocab, (beside + 1, 128)).tolist()
        *others, seq = engine.start(prompts, [slot] * (beside + 1), 2)
        if others:
            engine.prefill(others)
        items = [ScheduledSequence(other, other.num_computed, 1, True, 1) for other in others]
        synchronize()
        started = time.perf_counter()
        batch = ScheduledBatch([*items, ScheduledSequence(seq, 0, 128, True)], beside + 128)
        handle = engine.runner.launch(batch)
        host.append(1e3 * (time.perf_counter() - started))
        handle.result()
        whole.append(1e3 * (time.perf_counter() - started))

    for _ in range(12):
        once()
    if profiled:
        recorder = cProfile.Profile()
        recorder.runcall(lambda: [once() for _ in range(5)])
        pstats.Stats(recorder).sort_stats("tottime").print_stats(14)
    return {"ms": float(np.median(whole[2:12])), "host_ms": float(np.median(host[2:12]))}


def profile(engine: Engine, slots: list[int]) -> None:
    """Where a decode step's time goes: kernels of 64 streams, all distinct and base."""
    for adapters in ([-1] * 64, slots[:64]):
        sequences = engine.start([[5] * 128] * 64, adapters, 30)
        engine.prefill(sequences)
        engine.decode(sequences, 5)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            engine.decode(sequences, 10)
            synchronize()
        print(
            recorded.key_averages().table(sort_by="cuda_time_total", row_limit=16, max_name_column_width=60),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ints = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--shape", default="llama3-8b", choices=list(SHAPES))
    parser.add_argument("--streams", type=ints, default=[1, 8, 32, 64, 128])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--long-prompt", type=int, default=2048)
    parser.add_argument("--check-streams", type=int, default=12)
    parser.add_argument("--check-tokens", type=int, default=24)
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument(
        "--prefill-graph-tokens",
        type=int,
        default=-1,
        help="the server's option; times first tokens with and without",
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--lora",
        help='fields of the LoRA kernels\' configuration as JSON, such as {"overlap": "none"}',
    )
    parser.add_argument("--node", help='the same of the small kernels, such as {"pdl": true}')
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    args = parser.parse_args()
    for kind in ("lora", "node"):
        if getattr(args, kind):
            os.environ[OVERRIDE.format(kind=kind.upper())] = getattr(args, kind)
    args.out.mkdir(parents=True, exist_ok=True)
    path = write_model(Path("/tmp") / f"random-{args.shape}", args.shape)
    report: dict[str, Any] = {"environment": environment(), "shape": args.shape,
                              "command": " ".join(["python", "perf/gpu_smoke.py", *sys.argv[1:]])}  # fmt: skip
    report["checks"] = [] if args.skip_check else check(path, args, "float32") + check(path, args, "bfloat16")
    report |= measure(path, args)
    (args.out / f"engine-{args.shape}.json").write_text(json.dumps(report, indent=1) + "\n")
    if any(entry["wrong"] for entry in report["checks"]):
        raise SystemExit("greedy tokens differ beyond near ties")


if __name__ == "__main__":
    main()
