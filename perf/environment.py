"""What a result must say about where it was measured: hardware, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

_PACKAGES = ("torch", "triton", "transformers", "numpy", "tritonclient", "nvidia-pytriton")
_ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """Facts about this machine and installation, by name."""
    facts = {
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "gpu": _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]) or "none",
        "system": f"{platform.system()} {platform.release()}, glibc {platform.libc_ver()[1]}",
        "python": platform.python_version(),
        "commit": _commit(),
        "load": f"{os.getloadavg()[0]:.1f} (one-minute average before the run)",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }
    facts |= kernel_settings()
    for name in _PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def kernel_settings() -> dict[str, str]:
    """Fields of the kernels' configurations that the environment sets (`lorax_kernels.tuning`)."""
    return {
        name: value for name, value in sorted(os.environ.items()) if re.fullmatch(r"LORAX_\w+_CONFIG", name)
    }


def _commit() -> str:
    """Of the repository, or of the archive that this is a copy of."""
    described = _output(["git", "-C", str(_ROOT), "describe", "--always", "--dirty"])
    archival = _ROOT / ".git_archival.txt"
    archived = archival.read_text().partition("commit: ")[2].strip() if archival.is_file() else ""
    return described or ("unknown" if not archived or archived.startswith("$") else archived)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(done.stdout.split("\n")).strip("; ") if done.returncode == 0 else ""


def as_markdown(facts: dict[str, str]) -> str:
    """The facts as a list."""
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
