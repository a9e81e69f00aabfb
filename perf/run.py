"""`make perf`: every measurement that makes sense on this machine, one after the other.

Each prints as it goes and leaves a file with hardware, versions and its output in perf/results/local. Exits 1 if any
of them failed or missed its mark.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from environment import as_markdown, environment

_HERE = Path(__file__).resolve().parent
_LOCAL = _HERE / "results" / "local"
# Script, whether it needs a CUDA device, what it measures.
_MEASUREMENTS = (
    ("cpu_decode", False, "decoding of a batch on the CPU, side by side with transformers"),
    ("triton_load", False, "streams through tritonserver's gRPC, an adapter named in every request"),
    ("kernels", True, "LoRA and attention kernels alone"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="*", help=f"names of {', '.join(name for name, _, _ in _MEASUREMENTS)}")
    only = parser.parse_args().only
    unknown = set(only) - {name for name, _, _ in _MEASUREMENTS}
    if unknown:
        parser.error(f"no such measurement: {', '.join(sorted(unknown))}")
    failed = []
    for name, needs_cuda, what in _MEASUREMENTS:
        if only and name not in only:
            continue
        print(f"==> {name}: {what}", flush=True)
        if needs_cuda and not _has_cuda():
            print(f"    not run: {name} needs a CUDA device and this machine has none", flush=True)
            if only:
                failed.append(name)
            continue
        if not _measure(name):
            failed.append(name)
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _measure(name: str) -> bool:
    """Run one script, passing its output on and keeping it; True if it exited with 0."""
    facts = environment()
    command = [sys.executable, str(_HERE / f"{name}.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    _LOCAL.mkdir(parents=True, exist_ok=True)
    path = _LOCAL / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    path.write_text(
        f"# {name}\n\n{as_markdown(facts)}\n- command: python perf/{name}.py\n- exit status: {status}\n\n"
        + "".join(lines)
    )
    print(f"    kept in {path}", flush=True)
    return status == 0


if __name__ == "__main__":
    sys.exit(main())
