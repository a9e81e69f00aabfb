#!/usr/bin/env python3
"""Where a GPU's time goes while long prompts are computed in the whole engine: every kernel, and when none runs.

    python perf/prefill_profile.py                               # table C's loads, Llama-3-8B's shape
    python perf/prefill_profile.py --streams 32 --adapters base

Each load is run twice, plain and under torch's profiler, which the engine's process starts and stops when told by a
file. Kernels that are launched before the one before them is over count their waiting as theirs: what stands for the
small steps at the end is more than they take.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import threading
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "perf")]

import engine_alone
import engine_tables
import torch
from environment import environment
from records import summarize
from step_recorder import build_recorded
from torch.profiler import ProfilerActivity, profile

_PAUSE_S = 1.6  # after which the scheduler spares no neighbours of the load before
_SHOWN = 20


def build_profiled(folder: Path, *arguments: Any) -> Any:
    """`step_recorder.build_recorded` of an engine that is profiled from the time that `folder`/on is there until
    `folder`/off is; what was found is then in `folder`/found."""
    made = build_recorded(*arguments)
    threading.Thread(target=_profile, args=(folder,), daemon=True).start()
    return made


def _profile(folder: Path) -> None:
    while True:
        _await(folder / "on")
        profiler = profile(activities=[ProfilerActivity.CUDA])
        profiler.start()
        (folder / "on").unlink()
        _await(folder / "off")
        torch.cuda.synchronize()
        profiler.stop()
        (folder / "off").unlink()
        recorded = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        events = [
            (event.start_ns() / 1e3, event.duration_ns() / 1e3, event.name())
            for event in recorded
            if "CUDA" in str(event.device_type())
        ]
        (folder / "writing").write_text(shares(events))
        (folder / "writing").rename(folder / "found")


def _await(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


def shares(events: list[tuple[float, float, str]]) -> str:
    """A table of what ran: (start, duration, name) of every piece, in microseconds."""
    if not events:
        return "nothing ran on a GPU"
    events.sort()
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    end, busy = events[0][0], 0.0
    for start, duration, name in events:
        by_name[name][0] += 1
        by_name[name][1] += duration
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    span = end - events[0][0]
    lines = [f"{span / 1e3:.1f} ms, in {busy / 1e3:.1f} of which ({busy / span:.1%}) something ran"]
    for name, (count, total) in sorted(by_name.items(), key=lambda item: -item[1][1])[:_SHOWN]:
        lines.append(f"{total / 1e3:9.2f} ms {count:6.0f} x {total / count:8.1f} us  {name[:90]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama3-8b", choices=list(engine_tables.SHAPES))
    parser.add_argument("--streams", type=lambda text: [int(v) for v in text.split(",")], default=[8, 32])
    parser.add_argument(
        "--adapters", choices=engine_tables.KINDS, nargs="+", default=list(engine_tables.KINDS)
    )
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--num-blocks", type=int, default=5500)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to look at")
    engine = argparse.Namespace(
        shape=args.shape, rank=16, max_total_tokens=4096, host_gib=3.0, num_blocks=args.num_blocks, compile_processes=-1
    )  # fmt: skip
    print(environment(), flush=True)
    with TemporaryDirectory(prefix="lorax-profile-") as name:
        folder, most = Path(name), max(args.streams)
        # By the name under which the engine's process can import it.
        build = importlib.import_module(Path(__file__).stem).build_profiled
        engine_alone.build_recorded = partial(build, folder)
        with engine_tables.opened(engine, most, most, most) as bench:
            bench.warm_up()
            for count in args.streams:
                for kind in args.adapters:
                    bench.burst(count, args.prompt, 2, kind)
                    for profiled in (False, True):
                        time.sleep(_PAUSE_S)
                        told(bench, count, kind, args, folder if profiled else None)


def told(bench: Any, count: int, kind: str, args: argparse.Namespace, folder: Path | None) -> None:
    """Run a load and print its tokens a second; with a folder, what the profiler saw too."""
    if folder is not None:
        (folder / "on").touch()
        while (folder / "on").exists():
            time.sleep(0.005)
    summary = summarize(bench.burst(count, args.prompt, args.tokens, kind), args.prompt)
    way = "plain" if folder is None else "profiled"
    print(f"{count} streams, {kind}, {way}: {summary['total_tok_s']:,.0f} tokens/s", flush=True)
    if folder is not None:
        (folder / "off").touch()
        _await(folder / "found")
        print((folder / "found").read_text(), flush=True)
        (folder / "found").unlink()


if __name__ == "__main__":
    main()
