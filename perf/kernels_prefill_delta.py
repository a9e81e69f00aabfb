#!/usr/bin/env python3
"""Measures what adapters cost a layer's products in prefill on one GPU: expand as a launch of its own, against a
product that adds the deltas to its tiles.

    python perf/kernels_prefill_delta.py --jobs 14
    python perf/kernels_prefill_delta.py --rows 512,1024,2048,4096,8192 --adapters 32 --jobs 14

Every choice is first compiled and compared with float64 in a process of its own, and one that is wrong, fails, or
does not answer is left out and named. Then all ways to compute a site take turns (`prefill_gemm_turns`), `gate_up`
with SiLU and multiplication after it: the product alone, as the tables choose it; shrink alone; product, shrink and
expand; shrink and a product that adds the deltas, by choice.

Written to --out: prefill_delta-MODEL.json, and prefill_smXX.json: the table of that name in lorax_kernels/tuned with
new sections "delta" and "silu+delta", of what was faster than an expand at the most adapters. It takes effect there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "perf")]

import numpy as np
import torch
from environment import environment
from kernels_lora import SHAPES, exact_deltas
from prefill_gemm_choices import compare, shown, weight_of
from prefill_gemm_turns import Turns
from tuned_tables import write_table

import lorax_kernels
from lorax_kernels import LoraBatch, PageLayout, lora_triton, pages_for_rank
from lorax_kernels.configs import DEFAULT_PREFILL_DELTA, DEFAULT_PREFILL_SILU_DELTA, PrefillConfig
from lorax_kernels.fused_reference import silu_mul as silu_mul_reference
from lorax_kernels.fused_triton import silu_mul
from lorax_kernels.prefill_delta import TileDelta
from lorax_kernels.prefill_gemm import prefill_linear, prefill_linear_silu
from lorax_kernels.tuning import lora_config

ANSWER_S = 180.0  # for a process that compiles and checks one choice
_CALLS = 3
_LEAST_GAIN = 0.99
_PLAIN, _SILU = (replace(each, delta=True) for each in (DEFAULT_PREFILL_DELTA, DEFAULT_PREFILL_SILU_DELTA))
CHOICES = {
    False: [
        _PLAIN,
        replace(_PLAIN, group=16),
        replace(_PLAIN, stages=3, parts=2),
        replace(_PLAIN, block_n=128, stages=3, warps=4, parts=2, programs=2),
    ],
    True: [_SILU, replace(_SILU, group=8), replace(_SILU, flatten=False)],
}


@dataclass(frozen=True, slots=True)
class Site:
    """A site of a layer with `rows` token rows of `adapters` adapters, one after the other."""

    x: torch.Tensor
    weight: torch.Tensor
    lora: tuple[torch.Tensor, torch.Tensor]
    batch: LoraBatch
    slices: tuple[int, ...]
    slots: np.ndarray
    pages: np.ndarray

    @property
    def silu(self) -> bool:
        return len(self.slices) == 2


def make_site(model: str, name: str, rows: int, adapters: int, rank: int) -> Site:
    site = SHAPES[model][name]
    generator = torch.Generator("cuda").manual_seed(rows + adapters)
    count = pages_for_rank(rank)
    layout = PageLayout({name: site})
    arena = torch.empty(adapters * count, layout.page_size, dtype=torch.bfloat16, device="cuda")
    arena.normal_(0, site.in_features**-0.5, generator=generator)
    pages = np.arange(adapters * count, dtype=np.int32).reshape(adapters, count)
    slots = np.sort(np.arange(rows, dtype=np.int32) % adapters)
    batch = LoraBatch.build(slots, pages, np.full(adapters, rank, np.int32), "cuda")
    assert batch is not None
    x = torch.randn(rows, site.in_features, device="cuda", generator=generator).bfloat16()
    weight = weight_of(site.out_features, site.in_features, generator)
    lora = layout.a_view(arena, name), layout.b_view(arena, name)
    return Site(x, weight, lora, batch, site.out_slices, slots, pages)


def by_expand(site: Site) -> torch.Tensor:
    """As it is done without a choice."""
    work = lora_triton.work_of(site.batch)
    config = lora_config(work.num_tokens, work.shape.decode, site.x.device.index)
    out, h = lora_triton.linear_and_shrink(site.x, (site.weight, None), site.lora[0], work, config)
    lora_triton.expand(h, site.lora[1], work, out, site.slices)
    return silu_mul(out) if site.silu else out


def by_product(site: Site, config: PrefillConfig) -> torch.Tensor:
    work = lora_triton.work_of(site.batch)
    delta = TileDelta(shrunk(site).planes, site.lora[1], work, site.slices)
    if site.silu:
        return prefill_linear_silu(site.x, site.weight, config, delta)
    return prefill_linear(site.x, site.weight, None, config, delta)


def shrunk(site: Site) -> lora_triton.Shrunk:
    return lora_triton.shrink(site.x, site.lora[0], lora_triton.work_of(site.batch))


def bare(site: Site) -> torch.Tensor:
    if site.silu:
        return lorax_kernels.linear_silu_mul(site.x, site.weight)
    return lorax_kernels.linear(site.x, site.weight)


def check(site: Site, got: torch.Tensor) -> None:
    """
    Raises:
        ValueError: `got` is wrong in one of some rows.
    """
    chosen = np.unique(np.linspace(0, len(site.slots) - 1, 32).astype(int))
    x = site.x[chosen]
    pages = site.pages[site.slots[chosen]].tolist()
    want = x.double() @ site.weight.double().T + exact_deltas(x, site.lora, pages, site.slices)
    compare(got[torch.from_numpy(chosen).to(got.device)], silu_mul_reference(want) if site.silu else want)


def prove(args: argparse.Namespace, name: str, config: PrefillConfig) -> str:
    """ "ok", or what became of a process that computes a site so."""
    given = json.dumps({"model": args.model, "name": name, "config": asdict(config)})
    try:
        done = subprocess.run([sys.executable, __file__, "--prove", given], capture_output=True, text=True,
                              timeout=ANSWER_S, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {ANSWER_S:.0f} s"
    return "ok" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["the process ended"])[-1]


def prove_here(given: dict[str, Any]) -> None:
    site = make_site(given["model"], given["name"], 1000, 5, 16)
    for _ in range(2):
        check(site, by_product(site, PrefillConfig(**given["config"])))
    torch.cuda.synchronize()


Result = dict[str, Any]


def measure(
    args: argparse.Namespace, name: str, rows: int, adapters: int, choices: list[PrefillConfig]
) -> list[Result]:
    """All ways to compute a site, in microseconds."""
    site = make_site(args.model, name, rows, adapters, args.rank)
    check(site, by_expand(site))
    ways: dict[str, tuple[Callable[[Site], object], PrefillConfig | None]] = {
        "product": (bare, None), "shrink": (shrunk, None), "product, shrink, expand": (by_expand, None),
    }  # fmt: skip
    for config in choices:
        way = f"in product: {shown(config, site.silu)}"
        ways[way] = (lambda site, config=config: by_product(site, config)), config  # type: ignore[misc]
    turns = Turns()
    for way, (call, _) in ways.items():
        turns.add(way, [lambda call=call: call(site)] * _CALLS)  # type: ignore[misc]
    times = turns.run(args.turns)
    print(f"\n{name}, {rows} rows, {adapters} adapters{turns.state and f' ({turns.state})'}", flush=True)
    results = []
    for way, (_, config) in ways.items():
        more = times[way] - times["product"]
        print(f"  {way:44s} {times[way]:8.1f} us" + (f" {more:+8.1f}" if way != "shrink" else ""), flush=True)
        results.append({"site": name, "rows": rows, "adapters": adapters, "way": way, "us": times[way],
                        "config": config and asdict(config)})  # fmt: skip
    return results


def best(results: list[Result]) -> tuple[float, Result | None]:
    """Microseconds with an expand, and the fastest way without one, if any."""
    expand = next(result["us"] for result in results if result["way"] == "product, shrink, expand")
    return expand, min((r for r in results if r["config"]), key=lambda r: r["us"], default=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(value) for value in text.split(",")]  # noqa: E731
    parser.add_argument("--model", default="8b", choices=SHAPES)
    parser.add_argument("--rows", type=numbers, default=[2048, 8192])
    parser.add_argument("--adapters", type=numbers, default=[1, 4, 32])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--jobs", type=int, default=4, help="processes that compile and check")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    parser.add_argument("--prove", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prove:
        prove_here(json.loads(args.prove))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    todo = [(name, config) for name in SHAPES[args.model] for config in CHOICES[name == "gate_up"]]
    with ThreadPoolExecutor(args.jobs) as pool:
        verdicts = list(pool.map(lambda one: prove(args, *one), todo))
    left_out = {f"{name} {shown(config, name == 'gate_up')}": why
                for (name, config), why in zip(todo, verdicts, strict=True) if why != "ok"}  # fmt: skip
    for key, why in left_out.items():
        print(f"left out: {key}: {why}", flush=True)
    good = [one for one, why in zip(todo, verdicts, strict=True) if why == "ok"]
    report: dict[str, Any] = {
        "environment": environment() | {"cuda": str(torch.version.cuda)},
        "command": " ".join(["python", "perf/kernels_prefill_delta.py", *sys.argv[1:]]),
        "model": args.model, "rank": args.rank, "left out": left_out, "layers": [], "results": [],
    }  # fmt: skip
    table: dict[str, dict[str, dict[str, Any]]] = {"delta": {}, "silu+delta": {}}
    for rows in args.rows:
        for adapters in args.adapters:
            bare_us = expand_us = product_us = 0.0
            for name, shape in SHAPES[args.model].items():
                results = measure(args, name, rows, adapters, [c for site, c in good if site == name])
                report["results"] += results
                expand, ours = best(results)
                bare_us, expand_us = bare_us + results[0]["us"], expand_us + expand
                product_us += min(expand, ours["us"]) if ours else expand
                if ours and ours["us"] <= _LEAST_GAIN * expand and adapters == max(args.adapters):
                    section = table["silu+delta" if name == "gate_up" else "delta"]
                    key = f"{shape.out_features}x{shape.in_features}"
                    section.setdefault(key, {})[str(rows)] = ours["config"]
                torch.cuda.empty_cache()
            layer = {
                "rows": rows,
                "adapters": adapters,
                "bare": bare_us,
                "expand": expand_us,
                "fastest": product_us,
            }
            report["layers"].append(layer)
            print(f"\na layer, {rows} rows, {adapters} adapters: {bare_us:.0f} us; with an expand"
                  f" {expand_us - bare_us:+.0f}, the fastest {product_us - bare_us:+.0f}", flush=True)  # fmt: skip
    (args.out / f"prefill_delta-{args.model}.json").write_text(json.dumps(report, indent=1) + "\n")
    write_table(args.out, "prefill", report["command"], table)


if __name__ == "__main__":
    main()
