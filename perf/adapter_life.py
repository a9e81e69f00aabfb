#!/usr/bin/env python3
"""The life of adapters, in the real engine: what their coming and going costs those who wait and those who stream.

    python perf/adapter_life.py all --model llama3-8b --out perf/results/adapter_life-llama3-8b-h100.json
    python perf/adapter_life.py churn stall --model tiny
    python perf/adapter_life.py soak --minutes 10 --adapters 2000

Random weights of a real model's shape, rank-16 adapters on all seven projections in folders of their own.

churn: 200 adapters, 32 on the device, 64 in host memory (or what --host-gib holds), Zipf(1.0), Poisson arrivals.
noisy: one adapter floods; what is felt by eight that send little, against the same requests without the flood.
tiers: the first token on an idle engine, by where the adapter is: device, host, RAM disk, disk, hub.
stall: 16 streams decode while newcomers with cold adapters arrive, against residents arriving, and nobody.
soak: thousands of adapters of mixed ranks; every request answered, memory of the processes and the GPU flat.

`all` is every one of them but the soak, which takes its own time. The result file is written after each. Exits 1
if a request went unanswered, accounting was off, memory grew, or a workload failed, and otherwise as the other programs
do if a goal was missed. Goals and vLLM's numbers are printed for llama3-8b on CUDA only, since they are of that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "perf")]

from adapter_life_engine import Driver, Load
from adapter_life_hub import local_hub
from adapter_life_report import JUDGED_MODEL, Row, as_dicts, table
from adapter_life_soak import SoakPlan, soak
from adapter_life_workloads import CPU_SIZES, PLACES, WORKLOADS, Fleet, Outcome, Sizes
from environment import environment
from gpu_models import SHAPES, write_adapters, write_model
from peers import GOAL_MISSED

from lorax_backend.config import ServerConfig
from lorax_backend.types import AdapterRef

RANK, ON_DEVICE, ON_HOST, ADAPTERS = 16, 32, 64, 200
CPU_BLOCKS = 4096
# On a CPU oneDNN and torch each keep 1,024 compiled shapes, which take minutes and half a GiB to fill: bounded, they
# cannot be mistaken for a leak.
CPU_SHAPE_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
SOAK_RANKS = (16, 8, 16, 32)
RAM_DISK = Path("/dev/shm")


class Bench:
    """Model, adapters and hub on disk, and an engine that is started again should it have died."""

    def __init__(self, args: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        self.args = args
        self.folder = folder
        self.shape = SHAPES[args.model]
        self.cuda = _on_cuda(args.device)
        if not self.cuda:
            os.environ |= CPU_SHAPE_CACHES | os.environ  # what is set already stays
        self.model = write_model(folder / f"random-{args.model}", args.model)
        adapters = write_adapters(folder / "adapters", self.shape, [RANK] * ADAPTERS, unique=16)
        self.hub_folders = {f"org/adapter-{n}": Path(adapters[n % 16]) for n in range(64)}
        os.environ["HF_ENDPOINT"] = stack.enter_context(local_hub(self.hub_folders, args.hub_delay_ms / 1e3))
        self.fleet = Fleet(
            [AdapterRef("local", path) for path in adapters],
            self._on_ram_disk(stack),
            (AdapterRef("hub", name) for name in itertools.cycle(self.hub_folders)),
        )
        self.config = self._config()
        self._driver: Driver | None = None

    def driver(self) -> Driver:
        """The engine, warm: kernels compiled, graphs captured."""
        if self._driver is not None and self._driver.alive:
            return self._driver
        self.close()
        self._driver = driver = Driver(self.config, self.model, self.shape["vocab_size"])
        started = time.perf_counter()
        adapters = self.fleet.adapters[-24:]
        lengths = (16, 40, 100, 128, 250, 500)
        for batch in (1, 4, 16, 24):
            loads = [Load(0.02 * n, adapters[n] if n % 4 else None, lengths[n % 6], 24) for n in range(batch)]
            driver.run(loads)
        print(
            f"engine started in {driver.start_s:.1f} s, warmed in {time.perf_counter() - started:.1f} s; "
            f"{self.config.adapter_host_bytes / 2**30:.2f} GiB of host memory for adapters",
            flush=True,
        )
        return driver

    def soak_adapters(self) -> list[AdapterRef]:
        ranks = [SOAK_RANKS[n % 4] for n in range(self.args.adapters)]
        folders = write_adapters(self.folder / "many", self.shape, ranks, unique=4)
        return [AdapterRef("local", path) for path in folders]

    def close(self) -> None:
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def _config(self) -> ServerConfig:
        from lorax_backend.model.config import ModelConfig
        from lorax_backend.model.lora import page_layout

        element = 2 if self.cuda else 4  # bfloat16 on CUDA, float32 on a CPU
        page = element * page_layout(ModelConfig.from_folder(self.model)).page_size
        pages = -(-RANK // 8)
        host = min(ON_HOST * pages * page, int(self.args.host_gib * 2**30))
        return ServerConfig(
            model_id=str(self.model),
            load_format="dummy",
            device=self.args.device,
            engine_process=self.args.engine_process,
            max_total_tokens=2048,
            max_batch_size=128,
            # On a CPU the cache's memory becomes the process's when it is first written; a small one soon is.
            num_blocks=self.args.num_blocks if self.cuda else CPU_BLOCKS,
            cuda_memory_fraction=self.args.memory_fraction,
            max_active_adapters=ON_DEVICE,
            adapter_pages=ON_DEVICE * pages,
            adapter_host_bytes=host,
            default_adapter_source="local",
            adapter_disk_cache=str(self.folder / "cache"),
            adapter_disk_bytes=4 << 30,
            log_level="warning",
        )

    def _on_ram_disk(self, stack: ExitStack) -> AdapterRef | None:
        if not RAM_DISK.is_dir() or shutil.disk_usage(RAM_DISK).free < 1 << 30:
            return None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=RAM_DISK)))
        (path,) = write_adapters(folder, self.shape, [RANK])
        return AdapterRef("local", path)


def _on_cuda(device: str) -> bool:
    if device != "auto":
        return device == "cuda"
    import torch

    return torch.cuda.is_available()


def run(bench: Bench, names: list[str], report: dict[str, Any]) -> Iterator[tuple[str, Outcome]]:
    """The workloads one after the other; one that fails costs the others nothing."""
    judged = bench.cuda and bench.args.model == JUDGED_MODEL
    sizes = replace(Sizes() if bench.cuda else CPU_SIZES, places=bench.args.places)
    if bench.args.rate:
        sizes = replace(sizes, churn_requests=tuple((r, 400 if r > 6 else 240) for r in bench.args.rate))
    for name in names:
        started = time.perf_counter()
        try:
            driver = bench.driver()
            report.setdefault(
                "engine", {"start_s": round(driver.start_s, 1), "info": str(driver.engine.info)}
            )
            if name == "soak":
                plan = SoakPlan(bench.args.minutes, bench.args.soak_rate)
                outcome = soak(driver, bench.soak_adapters(), plan)
            else:
                outcome = WORKLOADS[name](driver, bench.fleet, sizes, judged)
        except Exception as error:
            traceback.print_exc()
            outcome = Outcome(failures=[f"{name}: {type(error).__name__}: {error}"])
        seconds = time.perf_counter() - started
        outcome.details["seconds"] = round(seconds, 1)
        print(f"--- {name}: {seconds:.1f} s\n{table(outcome.rows)}", flush=True)
        for failure in outcome.failures:
            print(f"FAILED {failure}", flush=True)
        yield name, outcome


def main() -> int:
    args = arguments()
    names = list(WORKLOADS) if "all" in args.workloads else []
    names += [name for name in dict.fromkeys(args.workloads) if name != "all" and name not in names]
    report: dict[str, Any] = {
        "environment": environment(),
        "command": " ".join(["python", "perf/adapter_life.py", *sys.argv[1:]]),
        "model": args.model,
    }
    rows: list[Row] = []
    failures: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder)))
        started = time.perf_counter()
        bench = Bench(args, folder, stack)
        stack.callback(bench.close)
        print(f"adapters written in {time.perf_counter() - started:.1f} s", flush=True)
        for name, outcome in run(bench, names, report):
            rows += outcome.rows
            failures += outcome.failures
            report.setdefault("workloads", {})[name] = outcome.details
            report |= {"rows": as_dicts(rows), "failures": failures}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    missed = [f"{row.workload}, {row.name}" for row in rows if row.met is False]
    print(f"=== {args.out}\n{table(rows)}")
    print(f"{len(failures)} failures; {len(missed)} goals missed" + "".join(f"\n  {name}" for name in missed))
    return 1 if failures else GOAL_MISSED if missed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="+", choices=[*WORKLOADS, "soak", "all"])
    parser.add_argument("--model", choices=list(SHAPES), default="tiny")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--engine-process", choices=["auto", "true", "false"], default="auto")
    parser.add_argument(
        "--rate", type=float, action="append", help="of churn, requests a second; default 4 and 12"
    )
    parser.add_argument(
        "--host-gib", type=float, default=3.0, help="most host memory for adapters, page-locked on CUDA"
    )
    parser.add_argument(
        "--memory-fraction", type=float, default=0.9, help="of the GPU, for the engine; less beside others"
    )
    parser.add_argument(
        "--num-blocks", type=int, default=0, help="of the KV cache on CUDA; 0: what is left of that"
    )
    parser.add_argument(
        "--places", type=lambda text: tuple(text.split(",")), default=PLACES, help="of the tiers workload"
    )
    parser.add_argument(
        "--hub-delay-ms", type=float, default=50.0, help="before each answer of the local hub"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak")
    parser.add_argument("--adapters", type=int, default=2000, help="registered in the soak")
    parser.add_argument("--soak-rate", type=float, default=12.0, help="requests a second")
    parser.add_argument(
        "--folder", type=Path, help="where adapters are written; default: the system's for temporary files"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local" / "adapter_life.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
