#!/usr/bin/env python3
"""Measures the base layers of steps with many rows on one GPU: cuBLAS, as torch calls it, against the Triton kernels.

    python perf/kernels_prefill_gemm.py --jobs 14                    # all of it, and a table for lorax_kernels/tuned
    python perf/kernels_prefill_gemm.py --rows 512,1024,2048,4096,8192 --jobs 14
    python perf/kernels_prefill_gemm.py --sites gate_up --rows 8192

Every choice is first compiled and compared with float64 in a process of its own, and one that is wrong, fails, or does
not answer is left out and named. Then all that compute the same take turns: a turn is the replay of one CUDA graph with
a few products, of different weights where one would stay in L2, and what counts is the median of the turns. At each
number of rows the results of some of them are compared with float64 once more. `gate_up` with SiLU and multiplication
is measured as one kernel, as two, and as two on some rows at a time.

Written to --out: prefill_gemm-MODEL.json, and prefill_smXX.json with what was faster than the library.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "perf")]

import torch
from environment import environment
from kernels_timing import measured_floors
from peers import MATMUL_TFLOPS
from prefill_gemm_choices import Choice, compare, product, proven, reference, shown, site_choices, weight_of
from prefill_gemm_turns import Turns
from tuned_tables import write_table

from lorax_kernels.configs import PrefillConfig
from lorax_kernels.fused_triton import silu_mul

MODELS = {"8b": (4096, 14336, 6144), "1b": (2048, 8192, 3072)}
"""Widths: hidden, inner of the MLP, queries with keys and values."""
SITES = ("qkv", "o", "gate_up", "down", "gate_up+silu")
ROWS = (2048, 8192)
_WEIGHT_BYTES = 200 << 20  # so much goes by before a weight is used again
_LEAST_GAIN = 0.99
_TURN_US = 6000.0


def shape_of(model: str, site: str) -> tuple[int, int]:
    """Columns and width of a site's weight."""
    hidden, inner, qkv = MODELS[model]
    shapes = {
        "qkv": (qkv, hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    return shapes[site.removesuffix("+silu")]


@contextmanager
def blas_library(name: str):  # type: ignore[no-untyped-def]
    """Let torch call this library while the block runs."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Parts = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]


def _by_library(name: str) -> Product:
    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with blas_library(name):
            return torch.nn.functional.linear(x, weight)

    return call


def _with_silu_in_parts(rows: int) -> Parts:
    """The library's product and SiLU of `rows` rows at a time, whose gate and up may stay in L2."""

    def call(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        return [silu_mul(torch.nn.functional.linear(part, weight)) for part in x.split(rows)]

    return call


def library_ways(rows: int, silu: bool) -> dict[str, Product | Parts]:
    """What needs no kernel of ours but SiLU's."""
    if not silu:
        return {"cublas": _by_library("cublas"), "cublaslt": _by_library("cublaslt")}

    def then_silu(first: Product) -> Product:
        return lambda x, weight: silu_mul(first(x, weight))

    ways = {name: then_silu(_by_library(name)) for name in ("cublas", "cublaslt")}
    return ways | {f"cublas, {n} rows at a time": _with_silu_in_parts(n) for n in (1024, 2048) if n < rows}


def measure_site(
    model: str, site: str, rows: int, choices: list[Choice], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """All ways to compute one site for a number of rows, the fastest first; those that fail at the end."""
    columns, width = shape_of(model, site)
    silu = site.endswith("+silu")
    ways: dict[str, tuple[Product | Parts, PrefillConfig | None]] = {
        name: (way, None) for name, way in library_ways(rows, silu).items()
    }
    for choice in choices:
        ways[shown(choice.config, silu)] = (product(choice.config, silu), choice.config)
    generator = torch.Generator("cuda").manual_seed(rows)
    weights = [
        weight_of(columns, width, generator) for _ in range(max(2, _WEIGHT_BYTES // (2 * columns * width)))
    ]
    x = torch.randn(rows, width, device="cuda", generator=generator).bfloat16()
    sample, want = reference(x, weights[0], silu)
    flop = 2.0 * rows * columns * width
    calls = max(len(weights), min(48, int(_TURN_US / (flop / (0.8e6 * MATMUL_TFLOPS)))))
    turns, results = Turns(), []
    for name, (way, config) in ways.items():
        result: dict[str, Any] = {
            "site": site,
            "rows": rows,
            "way": name,
            "config": config and asdict(config),
        }
        results.append(result)
        try:
            made = way(x, weights[0])
            result["error"] = compare((torch.cat(made) if isinstance(made, list) else made)[sample], want)
            del made
            turns.add(name, [lambda w=w, way=way: way(x, w) for w in (weights * calls)[:calls]])  # type: ignore[misc]
        except Exception as error:  # costs only itself
            result["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    times = turns.run(args.turns)
    print(f"\n{site}, {rows} rows{turns.state and f' ({turns.state})'}", flush=True)
    for result in results:
        if "failed" not in result and (us := times.get(result["way"])) is not None:
            tflops = flop / us / 1e6
            result |= {"us": us, "tflops": tflops, "percent": 100 * tflops / MATMUL_TFLOPS}
    return sorted(results, key=lambda result: result.get("us", float("inf")))


def print_site(results: list[dict[str, Any]]) -> None:
    """A line a way."""
    for result in results:
        if "us" in result:
            print(f"  {result['way']:44s} {result['us']:8.1f} us {result['tflops']:6.1f} TFLOP/s"
                  f" {result['percent']:5.1f} %  error {result['error']:.1e}", flush=True)  # fmt: skip
        else:
            print(f"  {result['way']:44s} {result.get('failed', 'no time')}", flush=True)


def best(results: list[dict[str, Any]], ours: bool) -> dict[str, Any] | None:
    """The fastest way with a kernel of ours, or with the library alone."""
    timed = [result for result in results if "us" in result and (result["config"] is not None) == ours]
    return min(timed, key=lambda result: result["us"], default=None)


Found = dict[str, dict[str, dict[str, Any]]]


def keep(found: Found, columns: int, width: int, results: list[dict[str, Any]]) -> None:
    """Add our fastest way to the table, if it is faster than every way of the library."""
    ours, library = best(results, True), best(results, False)
    if ours is None or (library is not None and ours["us"] > _LEAST_GAIN * library["us"]):
        return
    part = "silu" if ours["site"].endswith("+silu") else "configs"
    found[part].setdefault(f"{columns}x{width}", {})[str(ours["rows"])] = ours["config"]


def write(args: argparse.Namespace, found: Found, report: dict[str, Any]) -> None:
    (args.out / f"prefill_gemm-{args.model}.json").write_text(json.dumps(report, indent=1) + "\n")
    write_table(args.out, "prefill", report["command"], found)


def layer_times(sites: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Microseconds of a layer's products and SiLU: as the library does them, and with what is fastest at each site."""

    def us(site: str, ours: bool | None) -> float:
        timed = [best(sites[site], each) for each in ((True, False) if ours is None else (ours,))]
        return min((result["us"] for result in timed if result), default=float("nan"))

    plain = ("qkv", "o", "down")
    cublas = {site: next((r["us"] for r in sites[site] if r["way"] == "cublas" and "us" in r), float("nan"))
              for site in (*plain, "gate_up+silu")}  # fmt: skip
    return {
        "cublas": sum(cublas.values()),
        "fastest": sum(us(site, None) for site in (*plain, "gate_up+silu")),
        "cublas, fused silu": sum(cublas[site] for site in plain) + us("gate_up+silu", True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="8b", choices=MODELS)
    parser.add_argument("--rows", type=lambda text: [int(v) for v in text.split(",")], default=list(ROWS))
    parser.add_argument("--sites", type=lambda text: text.split(","), default=list(SITES))
    parser.add_argument("--turns", type=int, default=11, help="turns of every way")
    parser.add_argument("--jobs", type=int, default=4, help="processes that compile and check")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    args = parser.parse_args()
    if not set(args.sites) <= set(SITES):
        parser.error(f"--sites: {args.sites} is not of {SITES}")
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    widths = {site: shape_of(args.model, site)[1] for site in args.sites}
    choices, refused = proven(site_choices(widths), args.jobs)
    print(f"compiled and checked in {args.jobs} processes: {time.time() - started:.0f} s", flush=True)
    for key, why in refused.items():
        print(f"left out: {key}: {why}", flush=True)
    floors = measured_floors()
    print(f"this device: {floors['tflops']:.0f} TFLOP/s, {floors['copy_gbs']:.0f} GB/s", flush=True)
    found: Found = {"configs": {}, "silu": {}}
    report: dict[str, Any] = {
        "environment": environment() | {"cuda": str(torch.version.cuda)},
        "command": " ".join(["python", "perf/kernels_prefill_gemm.py", *sys.argv[1:]]),
        "model": args.model, "floors": floors, "left out": refused, "layers": {}, "results": [],
    }  # fmt: skip
    for rows in args.rows:
        sites = {}
        for site in args.sites:
            columns, width = shape_of(args.model, site)
            fitting = [c for c in choices if c.width == width and c.silu == site.endswith("+silu")]
            sites[site] = measure_site(args.model, site, rows, fitting, args)
            print_site(sites[site])
            keep(found, columns, width, sites[site])
            report["results"] += sites[site]
            write(args, found, report)
            torch.cuda.empty_cache()
        if set(args.sites) == set(SITES):
            report["layers"][rows] = layer_times(sites)
            times = ", ".join(f"{name} {us:.0f} us" for name, us in report["layers"][rows].items())
            print(f"\na layer's products and SiLU, {rows} rows: {times}", flush=True)
            write(args, found, report)
    print(f"\nmeasured in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
