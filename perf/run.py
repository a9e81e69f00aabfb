"""`make perf`: every measurement that makes sense on this machine, one after the other.

Each prints as it goes and leaves a file with hardware, versions and its output in perf/results/local. Exits 1 if any
of them failed or missed its mark.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from environment import as_markdown, environment
from peers import GOAL_MISSED

_HERE = Path(__file__).resolve().parent
_LOCAL = _HERE / "results" / "local"


@dataclass(frozen=True, slots=True)
class Measurement:
    """A word of `make perf`: the program and its arguments, whether it needs a CUDA device, whether `make perf` without
    words runs it, and what it measures."""

    word: str
    command: tuple[str, ...]
    needs_cuda: bool
    by_default: bool
    what: str


MEASUREMENTS = (
    Measurement("cpu_decode", ("cpu_decode.py",), False, True,
                "decoding of a batch on the CPU, side by side with transformers"),
    Measurement("triton_load", ("triton_load.py",), False, True,
                "streams through tritonserver's gRPC, an adapter named in every request"),
    Measurement("table_e", ("kernels.py",), True, True, "LoRA and attention kernels alone, once their tests passed"),
    Measurement("table_b", ("engine_tables.py", "table_b"), True, True, "decoding at 1 to 128 streams, 8B"),
    Measurement("table_b_1b", ("engine_tables.py", "table_b_1b"), True, True, "the same, 1B"),
    Measurement("table_c", ("engine_tables.py", "table_c"), True, True, "long prompts, 8 and 32 streams"),
    Measurement("table_f", ("table_f.py",), True, True, "through tritonserver against the engine alone"),
    Measurement("sweep", ("engine_tables.py", "sweep"), True, True, "1 to 1,024 adapters registered, 128 streams"),
    Measurement("equality", ("gpu_equality.py",), True, True,
                "greedy tokens: graphs, overlap, Triton or torch"),
    Measurement("gpu_all", ("gpu_all.py",), True, False, "all of a GPU's in one unattended run"),
)  # fmt: skip
_STATUS = {0: "", GOAL_MISSED: "a goal was missed"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = {measurement.word: measurement for measurement in MEASUREMENTS}
    parser.add_argument("only", nargs="*", metavar="WORD", help=f"of {', '.join(words)}")
    only = parser.parse_args().only
    unknown = set(only) - words.keys()
    if unknown:
        parser.error(f"no such measurement: {', '.join(sorted(unknown))}")
    failed = []
    for measurement in MEASUREMENTS:
        if measurement.word not in only if only else not measurement.by_default:
            continue
        print(f"==> {measurement.word}: {measurement.what}", flush=True)
        if measurement.needs_cuda and not _has_cuda():
            print(
                f"    not run: {measurement.word} needs a CUDA device and this machine has none", flush=True
            )
            if only:
                failed.append(measurement.word)
            continue
        status = _measure(measurement)
        if status:
            failed.append(f"{measurement.word} ({_STATUS.get(status, f'exit status {status}')})")
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _measure(measurement: Measurement) -> int:
    """Run one program, passing its output on and keeping it; its exit status."""
    facts = environment()
    script, *arguments = measurement.command
    process = subprocess.Popen(
        [sys.executable, str(_HERE / script), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    _LOCAL.mkdir(parents=True, exist_ok=True)
    path = _LOCAL / f"{measurement.word}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    command = " ".join(["python", f"perf/{script}", *arguments])
    path.write_text(
        f"# {measurement.word}\n\n{as_markdown(facts)}\n- command: {command}\n- exit status: {status}\n\n"
        + "".join(lines)
    )
    print(f"    kept in {path}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
