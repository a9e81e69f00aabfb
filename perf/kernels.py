#!/usr/bin/env python3
"""Measures the LoRA and attention kernels on one GPU, and writes the tables of block sizes that they use.

    python perf/kernels.py                    # LoRA in situ against the byte floor, and attention
    python perf/kernels.py --tune             # search block sizes first, and write tables of them beside the results
    python perf/kernels.py --tune fused       # those of decode's expand in the nodes after the base layers alone
    python perf/kernels.py --expand both      # decode with expand as a launch of its own, and in the nodes
    python perf/kernels.py --smoke            # a few seconds, tiny shapes: does everything run?

In situ is what a layer pays: the time of its base products with LoRA minus the time without, both as replays of CUDA
graphs of eight different layers, L2 flushed in between, and both with the node that reads each product as the decoder
runs it (`kernels_nodes.py`). Nothing is reported if a kernel's result is wrong, or if the kernels' tests are red or did
not run (`kernel_gate.py`); --unchecked reports all the same, and says so. The byte floor is every distinct adapter's
weights once, the input once and the output read and written once, at the device's copy bandwidth; or the operations at
its matrix rate, where that is longer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "perf")]

import triton
from environment import environment
from kernel_gate import KernelTestsError, require_green
from kernels_attention import ATTENTION_CHOICES, ATTENTION_PREFILL_CHOICES, ATTENTION_SHAPES, AttentionBench
from kernels_lora import (
    EXPAND_CHOICES,
    MODE_CHOICES,
    ONE_ROW_CHOICES,
    PREFILL_EXPAND_CHOICES,
    PREFILL_SHRINK_CHOICES,
    ROWS,
    SHAPES,
    SHRINK_CHOICES,
    Bench,
    Case,
    Row,
    tune,
)
from kernels_nodes import (
    FUSE_CHOICES,
    FUSE_MODE_CHOICES,
    FUSE_ROPE_CHOICES,
    FUSE_WHERE_CHOICES,
    LONG_CHOICES,
    NODES,
)
from kernels_timing import measured_floors
from table_text import text_of
from tuned_tables import write_table

from lorax_kernels import lora_triton
from lorax_kernels.configs import DEFAULT, DEFAULT_ATTENTION, AttentionConfig, LoraConfig
from lorax_kernels.tuning import lora_config


def write_found(folder: Path, kind: str, configs: Mapping[int, LoraConfig | AttentionConfig]) -> None:
    """A table as `lorax_kernels.tuning` reads it."""
    entries = {str(size): asdict(config) for size, config in sorted(configs.items())}
    write_table(folder, kind, command_line(), {"configs": entries})


def command_line() -> str:
    return " ".join(["python", "perf/kernels.py", *sys.argv[1:]])


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


def warm(model: str, share: str, tuning: str) -> None:
    part, jobs = (int(v) for v in share.split("/"))
    work = []
    for name in SHAPES[model]:
        tables = [lora_config(t, True, 0) for t in (1, 32, 128)]
        decode, prefill = list(tables), [lora_config(8192, False, 0)]
        if tuning == "all":
            choices = SHRINK_CHOICES + EXPAND_CHOICES
            decode += [replace(DEFAULT, pdl=p, **c) for c in choices for p in (False, True)]
            prefill += [replace(DEFAULT, **c) for c in PREFILL_SHRINK_CHOICES + PREFILL_EXPAND_CHOICES]
        fuses = FUSE_CHOICES if tuning and NODES[name] == "silu" else [{}]
        more = LONG_CHOICES if tuning else []
        more = [*more, *FUSE_ROPE_CHOICES] if NODES[name] == "rope" else more
        for config in tables:
            decode += [replace(config, **f, **form) for f in fuses for form in FORMS.values()]
            decode += [replace(config, **c) for c in more]
        # Products are compiled by the number of rows that they are padded to, nodes by how these are split.
        work += [(name, Row(rows, 2, 16), c) for c in decode for rows in (1, 2, 32)]
        work += [(name, Row(300, 2, 16), c) for c in prefill]
    for name, row, config in work[part::jobs]:
        with suppress(Exception):  # the measurement itself says so
            case = Case(row, model, name, 1)
            site = SHAPES[model][name]
            case.call(0, case.x.new_zeros(site.out_features, site.in_features), config)
            lora_triton.add_lora(case.x, *case.weights[0], case.batch, case.x.new_zeros(row.tokens, site.out_features),
                                 site.out_slices, replace(config, pdl=False))  # fmt: skip
    if tuning == "all":
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
    parser.add_argument("--tune", nargs="?", const="all", default="", choices=["all", "fused"])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rep", type=int, default=12, help="milliseconds a measurement")
    parser.add_argument("--jobs", type=int, default=0, help="compile first in this many processes")
    parser.add_argument("--no-attention", action="store_true")
    parser.add_argument(
        "--expand",
        default="table",
        choices=["table", "separate", "fused", "both"],
        help="as the table of block sizes says, or one way whatever it says, or all these and more",
    )
    parser.add_argument(
        "--unchecked", action="store_true", help="measure although the kernels' tests did not pass"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.warm:
        warm(args.model, args.warm, args.tune)
        return
    tests = checked(args.unchecked)
    if args.jobs:
        compile_ahead(args.jobs, ["--model", args.model] + (["--tune", args.tune] if args.tune else []))
    args.out.mkdir(parents=True, exist_ok=True)
    floors = measured_floors()
    print({k: round(v) for k, v in floors.items()}, flush=True)
    log: list[dict[str, Any]] = []
    bench = Bench(args.model, args.rep)
    rows = [Row(1, 1), Row(4, 2), Row(300, 2)] if args.smoke else ROWS
    found = search_lora(bench, rows, log, args.tune == "all") if args.tune else {}
    if found:
        write_found(args.out, "lora", found)
    forms: dict[str, list[dict[str, Any]]] = {}
    report = {"environment": environment(), "command": command_line(),
              "model": args.model, "kernel_tests": tests, "unchecked": tests is None, "floors": floors, "lora": [],
              "attention": [], "tuning": log, "lora_forms": forms}  # fmt: skip
    for form in ["table", *FORMS] if args.expand == "both" else [args.expand]:
        # The forms differ for decode alone.
        listed = [row for row in rows if row.tokens <= 256] if forms else rows
        forms[form] = measure_lora(bench, listed, found, form, floors)
        report["lora"] = report["lora"] or forms[form]
        write_report(args, report)
        print(f"\nexpand: {form}")
        print_sites(forms[form])
    print_forms(forms)
    report["attention"] = [] if args.no_attention else measure_attention(args, log)
    write_report(args, report)
    print(f"\n{text_of(report)}", flush=True)
    if tests is None:
        print(_UNCHECKED, flush=True)


def write_report(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """What is known so far, so that a run that ends early leaves it behind."""
    (args.out / f"kernels-{args.model}.json").write_text(json.dumps(report, indent=1) + "\n")


_UNCHECKED = (
    "\n"
    + "!" * 100
    + "\n!! NOT CHECKED: the kernels' tests did not pass before these numbers were taken. They may be"
    " of kernels\n!! that compute something else. Do not publish them.\n" + "!" * 100
)


def checked(unchecked: bool) -> dict[str, Any] | None:
    """What the kernels' tests gave; None if they are not asked. Ends the program if they are red or did not run."""
    if unchecked:
        print(_UNCHECKED, flush=True)
        return None
    try:
        return asdict(require_green())
    except KernelTestsError as error:
        raise SystemExit(f"no numbers: {error}\n(--unchecked measures all the same, and says so)") from error


_SEPARATE = {
    "fuse_norm": False,
    "fuse_silu": False,
    "fuse_rope": False,
    "one_row_in_product": False,
}
FORMS: dict[str, dict[str, Any]] = {
    "separate": _SEPARATE,
    "fused": _SEPARATE | {"fuse_norm": True, "fuse_silu": True, "fuse_rope": True, "fuse_pdl": False},
    "fused, early": _SEPARATE | {"fuse_norm": True, "fuse_silu": True, "fuse_rope": True, "fuse_pdl": True},
    "one row in the product": _SEPARATE | {"one_row_in_product": True},
}
"""Fields of the configuration that stand for each form of decode's expand."""


def measure_lora(
    bench: Bench, rows: list[Row], found: dict[int, LoraConfig], form: str, floors: dict[str, float]
) -> list[dict[str, Any]]:
    """Every row in situ, with the tables of the package or, after a search, with what it found, in one form of expand.
    A row that fails is told and left out."""
    results = []
    for row in rows:
        fitting = [size for size in found if size >= row.tokens]
        config = found[min(fitting)] if fitting else lora_config(row.tokens, row.tokens <= 256, 0)
        try:
            results.append(measured(bench, row, replace(config, **FORMS.get(form, {})), floors))
        except Exception as error:  # whatever it is, the other rows and forms are worth having
            print(f"left out {row}, {form}: {error}", flush=True)
        bench.forget(row)
    return results


def measured(bench: Bench, row: Row, config: LoraConfig, floors: dict[str, float]) -> dict[str, Any]:
    """One row in situ, and where its time goes."""
    sites = {name: bench.site_us(row, name, config) for name in bench.shapes}
    alone = {name: bench.alone_us(row, name, config) for name in bench.shapes}
    cases = [bench.case(row, name) for name in bench.shapes]
    return {
        **asdict(row),
        "in_situ_us": sum(sites.values()),
        "sites": sites,
        "shrink_us": {name: pair[0] for name, pair in alone.items()},
        "expand_us": {name: pair[1] for name, pair in alone.items()},
        "base_us": sum(bench.base_us(row, name) for name in bench.shapes),
        "floor_us": sum(case.floor_us(floors["copy_gbs"], floors["tflops"]) for case in cases),
    }


def search_lora(
    bench: Bench, rows: list[Row], log: list[dict[str, Any]], everything: bool
) -> dict[int, LoraConfig]:
    """The best configuration by the largest token count it is for. Unless `everything` is searched, shrink, expand as
    a launch of its own and prefill stay as the tables have them."""
    found: dict[int, LoraConfig] = {}
    for tokens, size in ((1, 1), (32, 32), (128, 256)):
        print("tuning", tokens, "tokens", flush=True)
        listed = [row for row in rows if row.tokens == tokens]
        if everything:
            stages = [SHRINK_CHOICES, EXPAND_CHOICES, MODE_CHOICES]
            separate = tune(bench, listed, replace(DEFAULT, pdl=True), stages, log)
        else:
            kept = replace(lora_config(size, True, 0), **_SEPARATE)
            separate = tune(bench, listed, kept, [[{}]], log)
        start = replace(separate[1], fuse_norm=True, fuse_silu=True)
        stages = [FUSE_MODE_CHOICES, FUSE_ROPE_CHOICES, FUSE_CHOICES, FUSE_WHERE_CHOICES, LONG_CHOICES]
        fused = tune(bench, listed, start, stages, log)
        ways = [separate, fused]
        if tokens == 1:
            kept = replace(separate[1], one_row_in_product=True)
            ways.append(tune(bench, listed, kept, [ONE_ROW_CHOICES, LONG_CHOICES], log))
        print("  best each way: " + ", ".join(f"{score:.3f}" for score, _ in ways), flush=True)
        found[size] = min(ways, key=lambda pair: pair[0])[1]
    if not everything:
        found[16384] = lora_config(16384, False, 0)
        return found
    print("tuning prefill", flush=True)
    stages = [PREFILL_SHRINK_CHOICES, PREFILL_EXPAND_CHOICES, MODE_CHOICES[::3] + MODE_CHOICES[2:3]]
    prefill_rows = [row for row in rows if row.tokens > 256]
    found[16384] = tune(bench, prefill_rows, found[256], stages, log)[1]
    return found


def measure_attention(args: argparse.Namespace, log: list[dict[str, Any]]) -> list[dict[str, float]]:
    bench = AttentionBench(args.rep)
    found: dict[int, AttentionConfig] = {}
    if args.tune == "all":
        print("tuning attention", flush=True)
        found = bench.tune(log)
        write_found(args.out, "attention", found)
    results = []
    for shape in ATTENTION_SHAPES[:2] if args.smoke else ATTENTION_SHAPES:
        fitting = [size for size in found if size >= shape[0]]
        results.append(bench.row(shape, found[min(fitting)] if fitting else None))
        print("attention", {k: round(v, 1) for k, v in results[-1].items()}, flush=True)
    return results


def print_forms(forms: dict[str, list[dict[str, Any]]]) -> None:
    """All forms of expand side by side, microseconds in situ."""
    rows = {row: [forms[form] for form in forms] for row in (name_of(r) for r in next(iter(forms.values())))}
    print(f"\n{'batch':<42}{'goal':>7}" + "".join(f"{form:>{max(9, len(form) + 2)}}" for form in forms))
    for name, results in rows.items():
        goal, times = 0.0, ""
        for form, listed in zip(forms, results, strict=True):
            here = [r for r in listed if name_of(r) == name]
            goal = here[0]["goal_us"] if here else goal
            times += f"{here[0]['in_situ_us'] if here else float('nan'):>{max(9, len(form) + 2)}.1f}"
        print(f"{name:<42}{goal:>7.0f}{times}")


def name_of(result: dict[str, Any]) -> str:
    """The batch a result is of."""
    return str(Row(result["tokens"], result["adapters"], result["rank"]))


def print_sites(results: list[dict[str, Any]]) -> None:
    """Where the time of every row goes, microseconds."""
    print(f"{'batch':<42}{'base':>7}   site: in situ (shrink, expand alone)")
    for r in results:
        sites = " ".join(
            f"{k} {v:.1f} ({r['shrink_us'][k]:.1f}, {r['expand_us'][k]:.1f})" for k, v in r["sites"].items()
        )
        print(f"{name_of(r):<42}{r['base_us']:>7.0f}   {sites}")


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", "/tmp/triton-cache")
    main()
