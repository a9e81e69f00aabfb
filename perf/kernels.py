#!/usr/bin/env python3
"""Measures the LoRA and attention kernels on one GPU, and writes the tables of block sizes that they use.

    python perf/kernels.py                    # LoRA in situ against the byte floor, and attention
    python perf/kernels.py --tune             # search block sizes first and write kernels/lorax_kernels/tuned/
    python perf/kernels.py --smoke            # a few seconds, tiny shapes: does everything run?

In situ is what a layer pays: the time of its base products with LoRA minus the time without, both as replays of CUDA
graphs of eight different layers, L2 flushed in between. Nothing is reported if a kernel's result is wrong. The byte
floor is every distinct adapter's weights once, the input once and the output read and written once, at the device's
copy bandwidth; or the operations at its matrix rate, where that is longer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "perf")]

import numpy as np
import torch
import triton
from environment import environment

from lorax_kernels import (
    AttentionBatch,
    LoraBatch,
    LoraSite,
    PageLayout,
    WorkBuffer,
    attention_triton,
    lora_triton,
    pages_for_rank,
)
from lorax_kernels.tuning import DEFAULT, DEFAULT_ATTENTION, AttentionConfig, LoraConfig, lora_config

SHAPES = {
    "8b": {
        "o": LoraSite(4096, (4096,)),
        "qkv": LoraSite(4096, (4096, 1024, 1024)),
        "gate_up": LoraSite(4096, (14336, 14336)),
        "down": LoraSite(14336, (4096,)),
    },
    "1b": {
        "o": LoraSite(2048, (2048,)),
        "qkv": LoraSite(2048, (2048, 512, 512)),
        "gate_up": LoraSite(2048, (8192, 8192)),
        "down": LoraSite(8192, (2048,)),
    },
}
MIXED_RANKS = (8, 16, 16, 32, 64)
LAYERS = 8
TUNED = ROOT / "kernels" / "lorax_kernels" / "tuned"


@dataclass(frozen=True)
class Row:
    """A batch: its tokens, distinct adapters and their rank (0: 8 to 64 mixed). `goal_us` a layer on the H100."""

    tokens: int
    adapters: int
    rank: int = 16
    goal_us: float = 0.0

    @property
    def ranks(self) -> list[int]:
        return [self.rank or MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(self.adapters)]

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.adapters} adapters, rank {self.rank or 'mixed'}"


ROWS = [
    Row(1, 1, 16, 8), Row(32, 1, 16, 12), Row(32, 32, 16, 42), Row(128, 1, 16, 25), Row(128, 32, 16, 55),
    Row(128, 128, 16, 150), Row(32, 32, 0, 80), Row(128, 128, 64, 490), Row(8192, 32, 16, 650),
]  # fmt: skip
SHRINK_CHOICES = [
    {"block_k": k, "shrink_warps": w, "split_shift": s, "target_log2": t, "shrink_waves": v}
    for k, w, s, t, v in (
        (512, 4, 3, 9, 6), (512, 4, 3, 10, 7), (1024, 4, 2, 9, 5), (1024, 8, 2, 9, 3), (256, 4, 3, 10, 8),
        (512, 2, 3, 9, 8), (1024, 4, 2, 8, 5), (256, 4, 4, 10, 8), (512, 4, 2, 9, 6),
    )
]  # fmt: skip
EXPAND_CHOICES = [
    {"row_n": rn, "block_n": n, "expand_warps": w, "expand_registers": g, "expand_waves": v}
    for rn, n, w, g, v in (
        (512, 128, 2, 128, 8), (1024, 128, 4, 128, 4), (1024, 256, 4, 128, 4), (512, 128, 4, 0, 4), (256, 128, 2, 0, 8),
        (256, 64, 2, 0, 8), (512, 64, 2, 96, 10), (256, 64, 1, 0, 16),
    )
]  # fmt: skip
MODE_CHOICES = [
    {"pdl": p, "overlap": o}
    for p, o in (
        (False, "none"),
        (True, "none"),
        (False, "shrink_first"),
        (False, "product_first"),
        (True, "shrink_first"),
    )
]
PREFILL_SHRINK_CHOICES = [
    {"prefill_block_k": k, "prefill_splits": s, "prefill_stages": t, "prefill_shrink_warps": w}
    for k, s, t, w in (
        (128, 2, 3, 4),
        (64, 2, 4, 4),
        (128, 1, 3, 4),
        (64, 4, 4, 4),
        (128, 2, 4, 4),
        (256, 2, 2, 4),
    )
]
PREFILL_EXPAND_CHOICES = [
    {"prefill_block_n": n, "prefill_expand_warps": w}
    for n, w in ((256, 4), (128, 4), (64, 2), (128, 2), (256, 8))
]


class WrongResultError(Exception):
    """A kernel's result is not what float64 gives."""


class Case:
    """One site of one row on the device, with the weights of `layers` different layers."""

    def __init__(self, row: Row, site: LoraSite, layers: int, seed: int = 0) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.row, self.site = row, site
        counts = [pages_for_rank(r) for r in row.ranks]
        layout = PageLayout({str(i): site for i in range(layers)})
        pages = torch.empty(sum(counts), layout.page_size, dtype=torch.bfloat16, device="cuda")
        pages.normal_(generator=generator).mul_(4 * site.in_features**-0.5)
        self.weights = [(layout.a_view(pages, str(i)), layout.b_view(pages, str(i))) for i in range(layers)]
        order = np.random.default_rng(seed)
        ends = np.cumsum(counts)
        table = np.full((row.adapters, max(counts)), -1, np.int32)
        for i, (end, count) in enumerate(zip(ends, counts, strict=True)):
            table[i, :count] = np.arange(end - count, end)
        ids = (np.arange(row.tokens) % row.adapters).astype(np.int32)
        if row.tokens <= 256:
            order.shuffle(ids)
        else:
            ids.sort()
        self.ids, self.table = ids, table
        # Decode as the engine runs it: launches sized for the largest rank admitted, not for this batch.
        buffer = WorkBuffer(row.tokens, max(8, *counts, 0), "cuda") if row.tokens <= 256 else None
        batch = LoraBatch.build(ids, table, np.array(row.ranks, np.int32), "cuda", buffer)
        assert batch is not None
        self.batch = batch
        self.x = torch.randn(row.tokens, site.in_features, device="cuda", generator=generator).bfloat16()

    def check(self, config: LoraConfig) -> None:
        """Raise if the delta is wrong on any of up to 64 rows."""
        a, b = self.weights[0]
        base = torch.randn(self.row.tokens, self.site.out_features, device="cuda").bfloat16()
        got = base.clone()
        lora_triton.add_lora(self.x, a, b, self.batch, got, self.site.out_slices, config)
        rows = np.unique(np.linspace(0, self.row.tokens - 1, 64).astype(int))
        error = norm = 0.0
        for row in rows:
            pages = [int(p) for p in self.table[self.ids[row]] if p >= 0]
            h = torch.einsum("psui,i->psu", a[pages].double(), self.x[row].double())
            begin = 0
            for s, width in enumerate(self.site.out_slices):
                want = torch.einsum("pu,puo->o", h[:, s], b[pages][:, :, begin : begin + width].double())
                delta = got[row, begin : begin + width].double() - base[row, begin : begin + width].double()
                error += float((delta - want).square().sum())
                norm += float(
                    want.square().sum() + 1e-4 * base[row, begin : begin + width].double().square().sum()
                )
                begin += width
        if not error**0.5 <= 2e-2 * norm**0.5:
            raise WrongResultError(
                f"wrong result: {self.row}, {self.site}, {config}: error {error**0.5 / norm**0.5:.4f}"
            )

    def floor_us(self, copy_gbs: float, tflops: float) -> float:
        weights = sum(self.row.ranks) * (
            len(self.site.out_slices) * self.site.in_features + self.site.out_features
        )
        moved = 2 * weights + 2 * self.row.tokens * (self.site.in_features + 2 * self.site.out_features)
        operations = 2 * weights / self.row.adapters * self.row.tokens
        return max(moved / copy_gbs / 1e3, operations / tflops / 1e6)


def graph_us(calls: list[Callable[[], object]], rep: int) -> float:
    """Median time of a graph that holds all calls, divided by their number."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for call in calls:
            call()
        graph.capture_end()
    torch.cuda.synchronize()
    return triton.testing.do_bench(graph.replay, warmup=3, rep=rep, return_mode="median") * 1e3 / len(calls)


class Bench:
    """Times configurations on the sites of a model shape; keeps what it has measured."""

    def __init__(self, model: str, rep: int) -> None:
        self.shapes, self.rep = SHAPES[model], rep
        self._cases: dict[tuple[Row, str], Case] = {}
        self._base: dict[tuple[int, str], float] = {}
        self._known: dict[tuple[Row, str, LoraConfig], float] = {}
        self._products: dict[str, list[torch.Tensor]] = {}

    def in_situ_us(self, row: Row, config: LoraConfig) -> float:
        """A layer's four sites."""
        return sum(self.site_us(row, name, config) for name in self.shapes)

    def site_us(self, row: Row, name: str, config: LoraConfig) -> float:
        key = (row, name, config)
        if key not in self._known:
            case, products = self.case(row, name), self.products(name)
            case.check(config)
            reps = LAYERS if row.tokens <= 256 else 2

            def call(i: int) -> None:
                lora_triton.linear(
                    case.x,
                    (products[i % len(products)], None),
                    case.weights[i % len(case.weights)],
                    case.batch,
                    case.site.out_slices,
                    config,
                )

            total = graph_us([lambda i=i: call(i) for i in range(reps)], self.rep)
            self._known[key] = total - self.base_us(row, name)
            if row.tokens > 256:
                # A warm device is slower: products that take milliseconds are timed again beside each other.
                again = (
                    self._base_again_us(row, name),
                    graph_us([lambda i=i: call(i) for i in range(reps)], self.rep),
                )
                self._known[key] = (total + again[1]) / 2 - again[0]
        return self._known[key]

    def _base_again_us(self, row: Row, name: str) -> float:
        del self._base[row.tokens, name]
        return self.base_us(row, name)

    def alone_us(self, row: Row, name: str, config: LoraConfig) -> tuple[float, float]:
        """Shrink and expand by themselves."""
        case = self.case(row, name)
        out = torch.randn(row.tokens, case.site.out_features, device="cuda").bfloat16()
        work = case.batch.work
        assert work is not None
        plain = replace(config, pdl=False)
        made = [lora_triton.shrink(case.x, a, work, plain) for a, _ in case.weights]
        shrinks = [lambda a=a: lora_triton.shrink(case.x, a, work, plain) for a, _ in case.weights]
        expands = [
            lambda h=h, b=b: lora_triton.expand(h, b, work, out, case.site.out_slices)
            for h, (_, b) in zip(made, case.weights, strict=True)
        ]
        return graph_us(shrinks, self.rep), graph_us(expands, self.rep)

    def base_us(self, row: Row, name: str) -> float:
        key = (row.tokens, name)
        if key not in self._base:
            x, products = self.case(row, name).x, self.products(name)
            reps = LAYERS if row.tokens <= 256 else 2
            calls = [
                lambda i=i: torch.nn.functional.linear(x, products[i % len(products)]) for i in range(reps)
            ]
            self._base[key] = graph_us(calls, 2 * self.rep)
        return self._base[key]

    def case(self, row: Row, name: str) -> Case:
        key = (row, name)
        if key not in self._cases:
            self._cases[key] = Case(row, self.shapes[name], LAYERS if row.tokens <= 256 else 2)
        return self._cases[key]

    def forget(self, row: Row) -> None:
        for key in [k for k in self._cases if k[0] == row]:
            del self._cases[key]
        torch.cuda.empty_cache()

    def products(self, name: str) -> list[torch.Tensor]:
        """Base weights, enough different ones to exceed L2."""
        if name not in self._products:
            site = self.shapes[name]
            count = max(1, min(4, -(-100_000_000 // (2 * site.in_features * site.out_features))))
            self._products[name] = [
                torch.randn(site.out_features, site.in_features, device="cuda").bfloat16()
                for _ in range(count)
            ]
        return self._products[name]


def tune(
    bench: Bench, rows: list[Row], start: LoraConfig, stages: list[list[dict[str, object]]], log: list
) -> LoraConfig:
    """Coordinate descent: the best of each stage, by the sum over `rows` of time over goal, is kept for the next."""
    best = start
    for choices in stages:
        scores = []
        for choice in choices:
            config = replace(best, **choice)
            try:
                times = {str(row): bench.in_situ_us(row, config) for row in rows}
            except (WrongResultError, triton.runtime.errors.OutOfResources) as error:
                print(f"  left out {choice}: {error}", flush=True)
                log.append({"choice": choice, "error": str(error)})
                continue
            score = sum(times[str(row)] / (row.goal_us or 1.0) for row in rows)
            scores.append((score, config))
            log.append({"choice": choice, "us": times, "score": score})
            print(f"  {score:7.3f} {choice} " + " ".join(f"{t:.1f}" for t in times.values()), flush=True)
        best = min(scores, key=lambda item: item[0])[1]
    return best


def measured_floors() -> dict[str, float]:
    n = 1 << 30
    a = torch.randint(-100, 100, (n,), dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    copy = triton.testing.do_bench(lambda: b.copy_(a), warmup=20, rep=60, return_mode="median")
    m, k = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = triton.testing.do_bench(lambda: m @ k, warmup=20, rep=100, return_mode="median")
    return {"copy_gbs": 2 * n / copy / 1e6, "tflops": 2 * 8192**3 / product / 1e9}


ATTENTION_SHAPES = [
    (1, 1, 256), (1, 1, 2048), (1, 1, 32768), (8, 1, 256), (8, 1, 4096), (32, 1, 256), (32, 1, 2048), (128, 1, 256),
    (128, 1, 2048), (256, 1, 1024), (4, 2048, 2048), (1, 2048, 8192),
]  # fmt: skip
ATTENTION_CHOICES = [
    {"block_n": n, "stages": t, "warps": w, "min_split": m, "waves": v}
    for n, t, w, m, v in (
        (64, 3, 4, 128, 4), (32, 3, 4, 128, 8), (32, 3, 2, 128, 8), (32, 4, 2, 256, 8), (64, 3, 4, 256, 4),
        (64, 2, 4, 512, 6), (64, 3, 8, 128, 4), (32, 3, 4, 64, 8),
    )
]  # fmt: skip
ATTENTION_PREFILL_CHOICES = [
    {"prefill_block_m": m, "prefill_block_n": n, "prefill_stages": t, "prefill_warps": w}
    for m, n, t, w in ((128, 64, 2, 8), (128, 64, 3, 8), (128, 128, 2, 8), (64, 64, 3, 4), (128, 32, 4, 8))
]


class AttentionBench:
    """Times attention of 32 query heads on 8 key heads of 128, in blocks of 16 at random places."""

    def __init__(self, rep: int) -> None:
        self.rep = rep

    def call(
        self, shape: tuple[int, int, int], config: AttentionConfig | None = None
    ) -> list[Callable[[], torch.Tensor]]:
        """Calls on two different caches, in turn."""
        count, queries, context = shape
        blocks = -(-context // 16)
        tables = np.random.default_rng(0).permutation(count * blocks).astype(np.int32).reshape(count, blocks)
        caches = [
            torch.randn(2, count * blocks, 16, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        ]
        batch = AttentionBatch.build(
            np.arange(count + 1, dtype=np.int32) * queries, np.full(count, context, np.int32), tables,
            np.zeros(count * queries, np.int64), "cuda",
        )  # fmt: skip
        q = torch.randn(count * queries, 32, 128, device="cuda").bfloat16()
        return [
            lambda c=c: attention_triton.paged_attention(q, c[0], c[1], batch, 128**-0.5, None, config)
            for c in caches * 2
        ]

    def us(self, shape: tuple[int, int, int], config: AttentionConfig | None = None) -> float:
        return graph_us(self.call(shape, config), self.rep)

    def row(self, shape: tuple[int, int, int], config: AttentionConfig | None) -> dict[str, float]:
        """Decode in GB/s of keys and values, prefill in TFLOP/s."""
        (count, queries, context), us = shape, self.us(shape, config)
        entry: dict[str, float] = {"sequences": count, "queries": queries, "context": context, "us": us}
        if queries == 1:
            entry["gbs"] = count * context * 8 * 128 * 4 / us / 1e3
        else:
            seen = queries * (context - queries) + queries * (queries + 1) / 2
            entry["tflops"] = count * seen * 32 * 128 * 4 / us / 1e6
        return entry

    def tune(self, log: list[dict[str, Any]]) -> dict[int, AttentionConfig]:
        """The best decode choice for up to 8, 32 and more sequences, each with the best prefill choice."""
        prefill = [s for s in ATTENTION_SHAPES if s[1] > 1]
        best_prefill = self._best(prefill, DEFAULT_ATTENTION, ATTENTION_PREFILL_CHOICES, log)
        found = {}
        for low, high in ((1, 8), (9, 32), (33, 512)):
            shapes = [s for s in ATTENTION_SHAPES if s[1] == 1 and low <= s[0] <= high]
            found[high] = self._best(shapes, best_prefill, ATTENTION_CHOICES, log)
        return found

    def _best(
        self, shapes: list[tuple[int, int, int]], start: AttentionConfig, choices: list[dict[str, Any]],
        log: list[dict[str, Any]],
    ) -> AttentionConfig:  # fmt: skip
        scored = []
        for choice in choices:
            config = replace(start, **choice)
            try:
                times = [self.us(shape, config) for shape in shapes]
            except triton.runtime.errors.OutOfResources as error:
                print(f"  left out {choice}: {error}", flush=True)
                continue
            scored.append((float(np.exp(np.mean(np.log(times)))), config))
            log.append({"choice": choice, "shapes": shapes, "us": times})
            print(f"  {scored[-1][0]:8.2f} {choice} " + " ".join(f"{t:.1f}" for t in times), flush=True)
        return min(scored, key=lambda item: item[0])[1]


def write_table(folder: Path, kind: str, configs: Mapping[int, LoraConfig | AttentionConfig]) -> None:
    """A table as `lorax_kernels.tuning` reads it."""
    major, minor = torch.cuda.get_device_capability()
    table = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": "python perf/kernels.py --tune",
        "configs": {str(size): asdict(config) for size, config in sorted(configs.items())},
    }
    (folder / f"{kind}_sm{major}{minor}.json").write_text(json.dumps(table, indent=1) + "\n")


def compile_ahead(jobs: int, arguments: list[str]) -> None:
    """Compile every first-stage choice in `jobs` processes, into Triton's cache on disk."""
    started = time.time()
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments, "--warm", f"{i}/{jobs}"], stdout=subprocess.DEVNULL
        )
        for i in range(jobs)
    ]
    for worker in workers:
        worker.wait()
    print(f"compiled ahead in {jobs} processes: {time.time() - started:.0f} s", flush=True)


def warm(model: str, share: str, tuning: bool) -> None:
    part, jobs = (int(v) for v in share.split("/"))
    work = []
    for name, site in SHAPES[model].items():
        decode = [lora_config(t, True, 0) for t in (1, 32, 128)]
        prefill = [lora_config(8192, False, 0)]
        if tuning:
            decode += [
                replace(DEFAULT, pdl=p, **c) for c in SHRINK_CHOICES + EXPAND_CHOICES for p in (False, True)
            ]
            prefill += [replace(DEFAULT, **c) for c in PREFILL_SHRINK_CHOICES + PREFILL_EXPAND_CHOICES]
        work += [(name, site, Row(2, 2, 16), c) for c in decode] + [
            (name, site, Row(300, 2, 16), c) for c in prefill
        ]
    for _, site, row, config in work[part::jobs]:
        Case(row, site, 1).check(config)
    if tuning:
        bench = AttentionBench(1)
        choices = [(ATTENTION_PREFILL_CHOICES, (1, 64, 128))]
        choices += [(ATTENTION_CHOICES, (count, 1, 40)) for count in (1, 8, 32, 128)]
        pairs = [(shape, choice) for listed, shape in choices for choice in listed]
        for shape, choice in pairs[part::jobs]:
            with suppress(triton.runtime.errors.OutOfResources):
                bench.call(shape, replace(DEFAULT_ATTENTION, **choice))[0]()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="8b", choices=list(SHAPES))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rep", type=int, default=12, help="milliseconds a measurement")
    parser.add_argument("--jobs", type=int, default=0, help="compile first in this many processes")
    parser.add_argument("--no-attention", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.warm:
        warm(args.model, args.warm, args.tune)
        return
    if args.jobs:
        compile_ahead(args.jobs, ["--model", args.model] + (["--tune"] if args.tune else []))
    args.out.mkdir(parents=True, exist_ok=True)
    floors = measured_floors()
    print({k: round(v) for k, v in floors.items()}, flush=True)
    bench, log, configs = Bench(args.model, args.rep), [], {}
    rows = [Row(1, 1), Row(4, 2), Row(300, 2)] if args.smoke else ROWS
    if args.tune:
        for bucket in (1, 32, 128):
            print("tuning", bucket, "tokens", flush=True)
            chosen = tune(bench, [r for r in rows if r.tokens == bucket], replace(DEFAULT, pdl=True),
                          [SHRINK_CHOICES, EXPAND_CHOICES, MODE_CHOICES], log)  # fmt: skip
            configs[bucket] = chosen
        print("tuning prefill", flush=True)
        stages = [PREFILL_SHRINK_CHOICES, PREFILL_EXPAND_CHOICES, MODE_CHOICES[::3] + MODE_CHOICES[2:3]]
        chosen = tune(bench, [r for r in rows if r.tokens == 8192], configs[128], stages, log)
        configs[16384] = chosen
        write_table(args.out, "lora", {k if k in (1, 32, 16384) else 256: c for k, c in configs.items()})
    results = []
    for row in rows:
        config = configs.get(row.tokens if row.tokens <= 128 else 16384) or lora_config(
            row.tokens, row.tokens <= 256, 0
        )
        sites = {name: bench.site_us(row, name, config) for name in bench.shapes}
        alone = {name: bench.alone_us(row, name, config) for name in bench.shapes}
        results.append(
            {
                **asdict(row),
                "in_situ_us": sum(sites.values()),
                "sites": sites,
                "shrink_us": {name: pair[0] for name, pair in alone.items()},
                "expand_us": {name: pair[1] for name, pair in alone.items()},
                "base_us": sum(bench.base_us(row, name) for name in bench.shapes),
                "floor_us": sum(
                    bench.case(row, name).floor_us(floors["copy_gbs"], floors["tflops"])
                    for name in bench.shapes
                ),
            }
        )
        bench.forget(row)
    attention = []
    if not args.no_attention:
        attention_bench = AttentionBench(args.rep)
        chosen_attention: dict[int, AttentionConfig] = {}
        if args.tune:
            print("tuning attention", flush=True)
            chosen_attention = attention_bench.tune(log)
            write_table(args.out, "attention", chosen_attention)
        for shape in ATTENTION_SHAPES[:2] if args.smoke else ATTENTION_SHAPES:
            fitting = [size for size in chosen_attention if size >= shape[0]]
            attention.append(attention_bench.row(shape, chosen_attention[min(fitting)] if fitting else None))
            print("attention", {k: round(v, 1) for k, v in attention[-1].items()}, flush=True)
    report = {"environment": environment(), "command": " ".join(["python", "perf/kernels.py", *sys.argv[1:]]),
              "floors": floors, "lora": results, "attention": attention, "tuning": log}  # fmt: skip
    (args.out / f"kernels-{args.model}.json").write_text(json.dumps(report, indent=1) + "\n")
    print_table(results)


def print_table(results: list[dict[str, Any]]) -> None:
    print(
        f"{'batch':<42}{'floor us':>9}{'in situ':>9}{'goal':>6}{'base':>7}   site: in situ (shrink, expand alone)"
    )
    for r in results:
        name = str(Row(r["tokens"], r["adapters"], r["rank"]))
        sites = " ".join(
            f"{k} {v:.1f} ({r['shrink_us'][k]:.1f}, {r['expand_us'][k]:.1f})" for k, v in r["sites"].items()
        )
        print(
            f"{name:<42}{r['floor_us']:>9.1f}{r['in_situ_us']:>9.1f}{r['goal_us']:>6.0f}{r['base_us']:>7.0f}   {sites}"
        )


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", "/tmp/triton-cache")
    main()
