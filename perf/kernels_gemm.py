#!/usr/bin/env python3
"""Measures the base layers of decode steps with few rows on one GPU: cuBLAS against the Triton kernels.

    python perf/kernels_gemm.py                       # cuBLAS, and what the table says
    python perf/kernels_gemm.py --model 8b,1b --tune --jobs 14      # search, and write gemm_sm90.json to --out
    python perf/kernels_gemm.py --model 1b --rows 1,8

A measurement is the replay of one CUDA graph with eight layers of different weights, each a chain of norm, qkv, o,
norm, gate_up, SiLU and multiplication, and down, launched as a step launches them: attention and rope are left out.
The product with the vocabulary is searched by itself, on two weights in turn, and the table is by width and rows. Every
choice is first checked against float64 on every layer shape; one that is wrong or fails is left out, and why is
printed. GB/s counts the weights alone, the small kernels' time with them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "perf")]

import torch
import triton
from environment import environment
from kernels_timing import graph_us
from torch.nn.functional import linear

from lorax_kernels.fused_triton import rms_norm, silu_mul
from lorax_kernels.skinny_gemm import skinny_linear
from lorax_kernels.tuning import DEFAULT_GEMM, GemmConfig, forget_configs, gemm_config

MODELS = {"8b": (4096, 14336, 6144, 128256), "1b": (2048, 8192, 3072, 128256)}
"""Widths: hidden, inner of the MLP, queries with keys and values, vocabulary."""
LAYERS = 8
ROWS = (1, 2, 4, 8, 16, 24, 32)
_EPS = 1e-5
_TOLERANCE = 1e-2
_FIELDS = ("block_n", "block_k", "stages", "warps", "split_k", "ahead")
_ONE_ROW = (
    (4, 4096, 1, 4, 1, 0), (4, 2048, 1, 4, 1, 0), (4, 2048, 2, 4, 1, 0), (2, 4096, 1, 4, 1, 0), (8, 1024, 2, 4, 1, 0),
    (8, 2048, 1, 4, 1, 0), (8, 2048, 1, 8, 1, 0), (8, 1024, 1, 4, 1, 0), (16, 1024, 1, 4, 1, 0), (16, 1024, 1, 8, 1, 0),
    (16, 512, 2, 4, 1, 0), (4, 1024, 2, 2, 1, 0), (4, 1024, 1, 2, 1, 0), (2, 2048, 2, 2, 1, 0), (2, 2048, 1, 2, 1, 0),
    (4, 4096, 1, 8, 1, 0), (4, 2048, 1, 2, 1, 0),
)  # fmt: skip
_TO_16 = (
    (32, 256, 6, 4, 1, 6), (32, 256, 4, 4, 1, 4), (32, 256, 5, 4, 1, 6), (32, 256, 7, 4, 1, 6), (32, 256, 8, 4, 1, 8),
    (32, 256, 6, 4, 1, 4), (32, 256, 6, 4, 1, 8), (32, 256, 6, 8, 1, 6), (32, 256, 6, 2, 1, 6), (32, 256, 6, 4, 2, 6),
    (32, 128, 8, 4, 1, 8), (32, 128, 10, 4, 1, 8), (32, 128, 12, 4, 1, 8), (32, 512, 4, 4, 1, 4), (16, 512, 3, 4, 1, 2),
    (16, 512, 4, 2, 1, 4), (16, 512, 5, 2, 1, 4), (16, 512, 4, 1, 1, 4), (16, 512, 6, 4, 1, 4), (16, 256, 4, 2, 1, 4),
    (16, 256, 6, 2, 1, 6), (16, 256, 8, 2, 1, 8), (16, 256, 6, 1, 1, 6), (64, 128, 8, 4, 2, 8), (64, 256, 5, 8, 2, 4),
)  # fmt: skip
_TO_32 = (
    (128, 128, 4, 8, 4, 4), (128, 128, 5, 8, 4, 4), (128, 128, 4, 8, 2, 4), (128, 128, 4, 8, 8, 4),
    (128, 128, 4, 4, 4, 4), (128, 128, 4, 8, 4, 8), (128, 64, 8, 8, 4, 8), (64, 128, 6, 4, 4, 8), (64, 128, 6, 8, 4, 8),
    (64, 128, 6, 4, 2, 8), (64, 128, 6, 4, 8, 8), (64, 128, 8, 4, 4, 8), (64, 128, 5, 4, 4, 6), (64, 256, 4, 8, 2, 4),
    (64, 256, 4, 8, 4, 4), (64, 256, 4, 4, 4, 4), (32, 256, 6, 4, 1, 6), (32, 256, 6, 4, 2, 6), (32, 256, 5, 4, 1, 6),
    (32, 128, 8, 4, 1, 8), (32, 128, 10, 4, 1, 8), (16, 256, 6, 2, 1, 6), (16, 512, 4, 2, 1, 4),
)  # fmt: skip
_HEAD = {
    1: ((4, 4096, 1, 4, 1, 0), (8, 1024, 2, 4, 1, 0), (8, 2048, 1, 4, 1, 0), (4, 2048, 2, 4, 1, 0),
        (2, 4096, 1, 4, 1, 0), (16, 512, 2, 4, 1, 0), (16, 1024, 1, 4, 1, 0)),
    16: ((32, 256, 6, 4, 1, 6), (32, 256, 4, 4, 1, 4), (64, 128, 6, 4, 1, 8), (64, 256, 4, 8, 1, 4),
         (32, 128, 8, 4, 1, 8), (16, 512, 4, 2, 1, 4), (128, 64, 6, 4, 1, 8), (128, 128, 4, 8, 1, 4)),
    32: ((128, 128, 4, 8, 1, 4), (32, 256, 6, 4, 1, 6), (64, 128, 6, 4, 1, 8), (64, 128, 8, 8, 1, 8),
         (64, 256, 4, 8, 1, 4), (128, 64, 8, 8, 1, 8), (32, 128, 10, 4, 1, 8)),
}  # fmt: skip
"""For the product with the vocabulary, by the most rows that a kernel is compiled for."""


def choices(rows: int, head: bool = False) -> list[GemmConfig]:
    """What is tried for a number of rows; the first once more without starting early."""
    if head:
        listed = _HEAD[1 if rows == 1 else 16 if rows <= 16 else 32]
    else:
        listed = _ONE_ROW if rows == 1 else _TO_16 if rows <= 16 else _TO_32
    made = [
        GemmConfig(kernel="triton", pdl=True, **dict(zip(_FIELDS, values, strict=True))) for values in listed
    ]
    return [*made, GemmConfig(**{**asdict(made[0]), "pdl": False})]


class Model:
    """`layers` layers of a model's base weights, bfloat16."""

    def __init__(self, name: str, layers: int) -> None:
        hidden, inner, self.qkv, self.vocabulary = MODELS[name]
        self.hidden, self.inner = hidden, inner
        shapes = ((self.qkv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))
        torch.manual_seed(0)
        self.layers = [[_weight(*shape) for shape in shapes] for _ in range(layers)]
        self.norm = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")
        self.layer_bytes = sum(w.numel() * w.element_size() for w in self.layers[0])

    def chain(self, rows: int, config: GemmConfig) -> Callable[[], torch.Tensor]:
        """All layers, one after the other."""
        start = torch.randn(rows, self.hidden, device="cuda").bfloat16()

        def call() -> torch.Tensor:
            x, residual = start, start
            for qkv, o, gate_up, down in self.layers:
                y, residual = rms_norm(x, self.norm, _EPS, residual)
                x = product(product(y, qkv, config)[:, : self.hidden], o, config)
                y, residual = rms_norm(x, self.norm, _EPS, residual)
                x = product(silu_mul(product(y, gate_up, config)), down, config)
            return x

        return call

    def layer_us(self, rows: int, config: GemmConfig, rep: int) -> float:
        """Microseconds a layer."""
        return graph_us([self.chain(rows, config)], rep) / len(self.layers)


class Head:
    """The weight of the product with the vocabulary, twice: one alone might stay in L2."""

    def __init__(self, model: Model) -> None:
        self.layers = [[_weight(model.vocabulary, model.hidden)] for _ in range(2)]
        self.layer_bytes = self.layers[0][0].numel() * self.layers[0][0].element_size()

    def layer_us(self, rows: int, config: GemmConfig, rep: int) -> float:
        """Microseconds a product."""
        x = torch.randn(rows, self.layers[0][0].shape[1], device="cuda").bfloat16()
        calls = [lambda weight=weight: product(x, weight, config) for (weight,) in self.layers]
        return graph_us(calls, rep)  # type: ignore[arg-type]


def _weight(columns: int, width: int) -> torch.Tensor:
    return torch.empty(columns, width, dtype=torch.bfloat16, device="cuda").normal_(0, width**-0.5)


def product(x: torch.Tensor, weight: torch.Tensor, config: GemmConfig) -> torch.Tensor:
    """x @ weight.T as `config` says."""
    return linear(x, weight) if config.kernel == "blas" else skinny_linear(x, weight, None, config)


class Reference:
    """Inputs of one number of rows for every layer shape, and their products in float64."""

    def __init__(self, model: Model | Head, rows: int) -> None:
        self.cases = []
        for weight in model.layers[0]:
            x = torch.randn(rows, weight.shape[1], device="cuda").bfloat16()
            self.cases.append((x, weight, x.double() @ weight.double().T))

    def error(self, config: GemmConfig) -> float:
        """The largest relative error of the products."""
        errors = [
            float((product(x, weight, config).double() - want).norm() / want.norm())
            for x, weight, want in self.cases
        ]
        return max(error if error == error else float("inf") for error in errors)


def measure(
    model: Model | Head, rows: int, config: GemmConfig, reference: Reference, rep: int
) -> dict[str, Any]:
    """One choice: its time, or why there is none."""
    found: dict[str, Any] = {"rows": rows, **asdict(config)}
    try:
        found["error"] = reference.error(config)
        if found["error"] > _TOLERANCE:
            return found | {"failed": "wrong"}
        found["layer_us"] = model.layer_us(rows, config, rep)
        found["gbs"] = model.layer_bytes / found["layer_us"] / 1e3
    except Exception as error:  # a choice that does not fit the device costs only itself
        return found | {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    return found


def shown(result: dict[str, Any]) -> str:
    """One line."""
    what = result["kernel"]
    if what != "blas":
        what = ",".join(str(result[name]) for name in _FIELDS) + (" early" if result["pdl"] else "")
    if "failed" in result:
        return f"rows {result['rows']:3d}  {what:28s} {result['failed']}"
    return (
        f"rows {result['rows']:3d}  {what:28s} {result['layer_us']:7.1f} us/layer {result['gbs']:6.0f} GB/s"
        f"  error {result['error']:.1e}"
    )


def search(
    model: Model | Head, rows: int, rep: int, log: list[dict[str, Any]], tune: bool
) -> tuple[GemmConfig, dict[str, Any]]:
    """The best configuration for a number of rows, and what was measured of it and of cuBLAS."""
    reference = Reference(model, rows)
    head = isinstance(model, Head)
    table = gemm_config(rows, model.layers[0][0].shape[1], torch.cuda.current_device(), head)
    others = choices(rows, head) if tune else [table] if table.kernel != "blas" else []
    results = []
    for config in [DEFAULT_GEMM, *others]:
        results.append(measure(model, rows, config, reference, rep) | {"head": head})
        print(shown(results[-1]), flush=True)
    log += results
    timed = [result for result in results if "layer_us" in result]
    best = min(timed, key=lambda result: result["layer_us"])
    print(f"best {shown(best)}", flush=True)
    config = GemmConfig(**{name: best[name] for name in asdict(DEFAULT_GEMM)})
    return config, {"rows": rows, "head": head, "blas_us": results[0].get("layer_us"), "best": best}


def warm(models: list[str], share: str) -> None:
    """Compile one process's share of the choices by running them."""
    part, jobs = (int(v) for v in share.split("/"))
    for name in models:
        model = Model(name, 1)
        head = Head(model).layers[0][0]
        todo = [
            (rows, config, h) for h in (False, True) for rows in (1, 2, 32) for config in choices(rows, h)
        ]
        for rows, config, of_head in todo[part::jobs]:
            try:
                if of_head:
                    product(head.new_zeros(rows, model.hidden), head, config)
                else:
                    model.chain(rows, config)()
            except Exception as error:  # shown again where it is measured
                print(type(error).__name__, config, flush=True)
        torch.cuda.synchronize()


def compile_ahead(jobs: int, models: list[str]) -> None:
    """Compile in `jobs` processes, into Triton's cache on disk."""
    started = time.time()
    command = [sys.executable, __file__, "--model", ",".join(models), "--warm"]
    workers = [subprocess.Popen([*command, f"{i}/{jobs}"], stdout=subprocess.DEVNULL) for i in range(jobs)]
    for worker in workers:
        worker.wait()
    print(f"compiled ahead in {jobs} processes: {time.time() - started:.0f} s", flush=True)


Found = dict[int, dict[int, GemmConfig]]


def write_table(folder: Path, layers: Found, heads: Found) -> None:
    """A table as `lorax_kernels.tuning` reads it: by width and rows."""
    major, minor = torch.cuda.get_device_capability()

    def entries(found: Found) -> dict[str, Any]:
        return {str(width): {str(rows): asdict(c) for rows, c in sorted(sizes.items())}
                for width, sizes in sorted(found.items())}  # fmt: skip

    table = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(["python", "perf/kernels_gemm.py", *sys.argv[1:]]),
        "configs": entries(layers),
        "head": entries(heads),
    }
    (folder / f"gemm_sm{major}{minor}.json").write_text(json.dumps(table, indent=1) + "\n")


def run_model(name: str, args: argparse.Namespace, layers: Found, heads: Found) -> None:
    """Measure one model, add what was best to the tables, and write all of it after every number of rows."""
    model = Model(name, LAYERS)
    head = Head(model)
    log: list[dict[str, Any]] = []
    best = []
    for rows in args.rows:
        for part, found in ((model, layers), (head, heads)):
            print(f"{name}: {'head' if part is head else 'layers'}", flush=True)
            config, summary = search(part, rows, args.rep, log, args.tune)
            found.setdefault(model.hidden, {})[rows] = config
            best.append(summary)
        report = {"environment": environment(), "command": " ".join(["python", "perf/kernels_gemm.py", *sys.argv[1:]]),
                  "model": name, "layer_bytes": model.layer_bytes, "head_bytes": head.layer_bytes, "rows": best,
                  "tuning": log}  # fmt: skip
        (args.out / f"gemm-{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        if args.tune:
            write_table(args.out, layers, heads)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="8b", help=f"of {', '.join(MODELS)}; several with commas between")
    parser.add_argument("--rows", type=lambda text: [int(v) for v in text.split(",")], default=list(ROWS))
    parser.add_argument("--tune", action="store_true", help="search, and write the table")
    parser.add_argument("--rep", type=int, default=30, help="milliseconds a measurement")
    parser.add_argument("--jobs", type=int, default=0, help="compile first in this many processes")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    models = args.model.split(",")
    if not set(models) <= set(MODELS):
        parser.error(f"--model: {args.model!r} is not of {', '.join(MODELS)}")
    # The small kernels start early too, as in a step where the products do.
    os.environ.setdefault("LORAX_NODE_CONFIG", '{"pdl": true}')
    forget_configs()
    if args.warm:
        warm(models, args.warm)
        return
    if args.jobs and args.tune:
        compile_ahead(args.jobs, models)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    layers: Found = {}
    heads: Found = {}
    for name in models:
        run_model(name, args, layers, heads)
        torch.cuda.empty_cache()
    print(f"measured in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
