#!/usr/bin/env python3
"""Measures the base layers of decode steps with few rows on one GPU: cuBLAS against the Triton kernels.

    python perf/kernels_gemm.py                       # cuBLAS, and what the table says
    python perf/kernels_gemm.py --model 8b,1b --tune --rep 8 --jobs 14     # search, and write gemm_sm90.json to --out
    python perf/kernels_gemm.py --model 1b --tune --parts sites --rows 24,32 --sites qkv,o --rep 8 --jobs 14

A measurement is the replay of one CUDA graph with eight layers of different weights, launched as the decoder launches
them, without attention (`gemm_chain.py`). The search has three parts. `layers` looks for the configuration that is best
for all four weights of a layer, and `head` for that of the product with the vocabulary, on two weights in turn: these
are entries by hidden size and rows. `sites` then goes from weight to weight, and looks for what is best for it while
the other three stay as they are; it begins with what was best for all, or, without the first part, with what the
table says. Its entries are by shape and rows, and go before the others. The table that is written is the one that
comes with the kernels, with what was found in its place.

Every choice is first checked against float64 on every weight that it is for; one that is wrong or fails is left out,
and why is printed. GB/s counts the weights alone, the small kernels' time with them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "perf")]

import torch
from environment import environment
from gemm_chain import MODELS, Configs, Head, Model, Reference, shapes_of
from gemm_choices import SITES, choices, shown, site_choices
from gemm_table import Table

from lorax_kernels.configs import DEFAULT_GEMM, GemmConfig
from lorax_kernels.tuning import forget_configs, gemm_config

LAYERS = 8
ROWS = (1, 2, 4, 8, 16, 24, 32)
PARTS = ("layers", "head", "sites")
_TOLERANCE = 1e-2
_KEPT = 8  # of the configurations for all weights, so many are tried for each
_LEAST_GAIN = 0.997
_FIXED_MS = 25.0  # of a measurement, besides its repetitions


class Search:
    """What is measured of one model."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.rep, self.sites = name, args.rep, args.sites
        self.model = Model(name, LAYERS)
        self.head = Head(self.model)
        self.log: list[dict[str, Any]] = []

    def measure(
        self, model: Model | Head, rows: int, tried: Configs, others: Configs, reference: Reference
    ) -> dict[str, Any]:
        """One choice for some weights: its time, or why there is none."""
        config = next(iter(tried.values()))
        site = next(iter(tried)) if len(tried) == 1 else "all"
        found: dict[str, Any] = {"rows": rows, "site": site, **asdict(config)}
        try:
            found["error"] = reference.error(tried)
            if found["error"] > _TOLERANCE:
                found["failed"] = "wrong"
            else:
                found["layer_us"] = model.layer_us(rows, {**others, **tried}, self.rep)
                found["gbs"] = model.layer_bytes / found["layer_us"] / 1e3
        except Exception as error:  # a choice that does not fit the device costs only itself
            found["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
        self.log.append(found)
        print(line(found), flush=True)
        return found

    def ranked(
        self, model: Model | Head, rows: int, configs: list[GemmConfig]
    ) -> list[tuple[float, GemmConfig]]:
        """Each configuration for all weights alike, the best first."""
        reference = Reference(model, rows)
        timed = []
        for config in configs:
            found = self.measure(model, rows, dict.fromkeys(model.shapes, config), {}, reference)
            if "layer_us" in found:
                timed.append((found["layer_us"], config))
        return sorted(timed, key=lambda each: each[0])

    def by_site(self, rows: int, start: Configs, best: list[GemmConfig]) -> dict[str, GemmConfig]:
        """From `start`, the best for one weight after the other while the others stay."""
        reference = Reference(self.model, rows)
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        chosen = dict(start)
        for site in self.sites:
            tried = site_choices(rows, site, self.model.shapes[site], sms, [chosen[site], *best])
            us = {}
            for config in tried:
                found = self.measure(self.model, rows, {site: config}, chosen, reference)
                us[config] = found.get("layer_us", float("inf"))
            winner = min(us, key=us.__getitem__)
            if winner.kernel == "triton" and site != "gate_up" and rows > 1:
                apart = replace(winner, fuse_sum=False)
                found = self.measure(self.model, rows, {site: apart}, chosen, reference)
                us[apart] = found.get("layer_us", float("inf"))
                winner = min(winner, apart, key=us.__getitem__)
            if us[winner] < us[chosen[site]] * _LEAST_GAIN:
                chosen[site] = winner
        return chosen

    def compared(self, rows: int, start: Configs, chosen: Configs) -> tuple[float, float]:
        """Microseconds a layer of both, measured in turns and longer than in the search."""
        turns = [
            [self.model.layer_us(rows, configs, 2 * self.rep) for configs in (start, chosen)]
            for _ in range(3)
        ]
        before, after = (sorted(times)[1] for times in zip(*turns, strict=True))
        return before, after


def line(result: dict[str, Any]) -> str:
    """One line."""
    config = GemmConfig(**{name: result[name] for name in asdict(DEFAULT_GEMM)})
    start = f"rows {result['rows']:3d}  {result['site']:8s} {shown(config):36s}"
    if "failed" in result:
        return f"{start} {result['failed']}"
    return (
        f"{start} {result['layer_us']:7.1f} us/layer {result['gbs']:6.0f} GB/s  error {result['error']:.1e}"
    )


def table_configs(model: Model | Head, rows: int) -> dict[str, GemmConfig]:
    """What the table says of every weight."""
    device = torch.cuda.current_device()
    return {site: gemm_config(rows, *shape, device) for site, shape in model.shapes.items()}


def look(search: Search, rows: int) -> dict[str, Any]:
    """cuBLAS, and what the table says."""
    found: dict[str, Any] = {"rows": rows}
    for part, model in (("layers", search.model), ("head", search.head)):
        print(f"{search.name}: {part}", flush=True)
        blas = dict.fromkeys(model.shapes, DEFAULT_GEMM)
        table = table_configs(model, rows)
        found[part] = {}
        for name, configs in (("blas", blas), ("table", table)):
            us = model.layer_us(rows, configs, search.rep)
            wrong = Reference(model, rows).error(configs)
            found[part][name] = {
                "us": us,
                "error": wrong,
                "configs": {s: asdict(c) for s, c in configs.items()},
            }
            print(
                f"rows {rows:3d}  {name:6s} {us:7.1f} us {model.layer_bytes / us / 1e3:6.0f} GB/s", flush=True
            )
    return found


def tune(search: Search, rows: int, parts: list[str], table: Table) -> dict[str, Any]:
    """Search for a number of rows, and put what was best into the table."""
    found: dict[str, Any] = {"rows": rows}
    start = table_configs(search.model, rows)
    best = list(dict.fromkeys(start.values()))
    for part, model in (("layers", search.model), ("head", search.head)):
        if part not in parts:
            continue
        print(f"{search.name}: {part}", flush=True)
        ranked = search.ranked(model, rows, [DEFAULT_GEMM, *choices(rows, part == "head")])
        us, config = ranked[0]
        found[part] = {"us": us, **asdict(config)}
        print(f"best {shown(config)}: {us:.1f} us", flush=True)
        table.put("head" if part == "head" else "configs", str(search.model.hidden), rows, config)
        if part == "layers":
            start = dict.fromkeys(search.model.shapes, config)
            best = [config for _, config in ranked[:_KEPT]]
    if "sites" in parts:
        print(f"{search.name}: sites", flush=True)
        if "layers" not in parts:
            best += choices(rows)[:_KEPT]
        chosen = search.by_site(rows, start, best)
        before, after = search.compared(rows, start, chosen)
        gained = after < before * _LEAST_GAIN
        found["sites"] = {"before_us": before, "after_us": after, **{s: asdict(c) for s, c in chosen.items()}}
        named = "; ".join(f"{site} {shown(config)}" for site, config in chosen.items())
        kept = "" if gained else ", not kept"
        print(
            f"rows {rows}: {before:.1f} us a layer before, {after:.1f} by weights{kept}: {named}", flush=True
        )
        for site, (columns, width) in search.model.shapes.items():
            if gained:
                table.put("shapes", f"{columns}x{width}", rows, chosen[site])
            elif "layers" in parts:  # what is known by shape began from something else
                table.drop("shapes", f"{columns}x{width}", rows)
    return found


def command_line() -> str:
    return " ".join(["python", "perf/kernels_gemm.py", *sys.argv[1:]])


def planned(args: argparse.Namespace) -> int:
    """About how many choices are measured."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    count = 0
    for name in args.model:
        shapes = shapes_of(name)
        for rows in args.rows:
            listed = choices(rows)
            count += (len(listed) + 1) * ("layers" in args.parts)
            count += (len(choices(rows, head=True)) + 1) * ("head" in args.parts)
            for site in args.sites if "sites" in args.parts else []:
                count += len(site_choices(rows, site, shapes[site], sms, listed[:_KEPT])) + 2
    return count


def warm(args: argparse.Namespace) -> None:
    """Compile one process's share of the choices by running them."""
    part, jobs = (int(v) for v in args.warm.split("/"))
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    # A kernel is compiled for one row, for up to 16, or for up to 32.
    sizes = dict.fromkeys(1 if rows == 1 else 2 if rows <= 16 else 32 for rows in args.rows)
    for name in args.model:
        model = Model(name, 1)
        head = Head(model) if "head" in args.parts else None
        todo: list[tuple[Model | Head, int, str, GemmConfig]] = []
        for rows in sizes:
            if head is not None:
                todo += [(head, rows, "head", config) for config in choices(rows, head=True)]
            for site, shape in model.shapes.items():
                listed = choices(rows) if "layers" in args.parts else []
                if "sites" in args.parts and site in args.sites:
                    listed = site_choices(rows, site, shape, sms, listed or choices(rows)[:_KEPT])
                todo += [(model, rows, site, config) for config in listed]
        for of, rows, site, config in todo[part::jobs]:
            try:
                weight = of.layers[0][site]
                made = of.product(site, weight.new_zeros(rows, weight.shape[1]), weight, config)
                if isinstance(of, Model) and site != "gate_up":
                    of.consume(site, made)
            except Exception as error:  # shown again where it is measured
                print(type(error).__name__, config, flush=True)
        torch.cuda.synchronize()


def compile_ahead(jobs: int) -> None:
    """Compile in `jobs` processes, into Triton's cache on disk."""
    started = time.time()
    command = [sys.executable, __file__, *sys.argv[1:], "--warm"]
    workers = [subprocess.Popen([*command, f"{i}/{jobs}"], stdout=subprocess.DEVNULL) for i in range(jobs)]
    for worker in workers:
        worker.wait()
    print(f"compiled ahead in {jobs} processes: {time.time() - started:.0f} s", flush=True)


def run_model(name: str, args: argparse.Namespace, table: Table) -> int:
    """Measure one model, and write everything after every number of rows; how many choices were measured."""
    search = Search(name, args)
    best = []
    for rows in args.rows:
        best.append(tune(search, rows, args.parts, table) if args.tune else look(search, rows))
        report = {"environment": environment(), "command": command_line(), "model": name,
                  "layer_bytes": search.model.layer_bytes, "head_bytes": search.head.layer_bytes, "rows": best,
                  "tuning": search.log}  # fmt: skip
        (args.out / f"gemm-{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        if args.tune:
            table.write(args.out, command_line())
    return len(search.log)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def some_of(known: tuple[str, ...]) -> dict[str, Any]:
        def read(text: str) -> list[str]:
            given = text.split(",")
            if not set(given) <= set(known):
                raise argparse.ArgumentTypeError(f"{text!r} is not of {', '.join(known)}")
            return given

        return {"type": read, "help": f"of {', '.join(known)}; several with commas between"}

    parser.add_argument("--model", default=["8b"], **some_of(tuple(MODELS)))
    parser.add_argument("--rows", type=lambda text: [int(v) for v in text.split(",")], default=list(ROWS))
    parser.add_argument("--tune", action="store_true", help="search, and write the table")
    parser.add_argument("--parts", default=list(PARTS), **some_of(PARTS))
    parser.add_argument("--sites", default=list(SITES), **some_of(SITES))
    parser.add_argument("--rep", type=int, default=30, help="milliseconds a measurement")
    parser.add_argument("--jobs", type=int, default=0, help="compile first in this many processes")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    # The small kernels start early too, as in a step where the products do.
    os.environ.setdefault("LORAX_NODE_CONFIG", '{"pdl": true}')
    forget_configs()
    if args.warm:
        warm(args)
        return
    if args.tune:
        count = planned(args)
        print(f"about {count} choices, {count * (_FIXED_MS + args.rep) / 1e3:.0f} s of measuring", flush=True)
        if args.jobs:
            compile_ahead(args.jobs)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    table = Table()
    count = 0
    for name in args.model:
        count += run_model(name, args, table)
        torch.cuda.empty_cache()
    print(f"measured {count} choices in {time.time() - started:.0f} s; written to {args.out}")


if __name__ == "__main__":
    main()
