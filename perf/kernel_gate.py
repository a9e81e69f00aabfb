"""No number of a kernel that computes something else: the kernels' tests run before their benchmarks.

A run that passed is kept as a stamp: the digest of the kernels, of their tests, and what they ran on. As long as
nothing of that changes, the tests need not run again.

    python perf/kernel_gate.py               # run them now; benchmarks that follow find the stamp
    python perf/kernel_gate.py --others      # the other tests of a device instead: runner, sampler, copies
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from environment import kernel_settings

ROOT = Path(__file__).resolve().parent.parent
# All of the device's kernels, however many files their tests are in.
TESTS = (
    "test_gpu_lora*.py",
    "test_gpu_expand*.py",
    "test_gpu_*attention*.py",
    "test_gpu_fused*.py",
    "test_gpu_skinny*.py",
    "test_gpu_prefill*.py",
    "test_gpu_row*.py",
    "test_gpu_greedy*.py",
)
SOURCES = ("kernels/lorax_kernels", "tests/kernels", "tests/gpu")
STAMP = ROOT / "perf" / "results" / "local" / "kernel_tests.json"
MOST_PROCESSES = 14  # each has a context of half a GiB on the device
_SUFFIXES = {".py", ".json"}


class KernelTestsError(RuntimeError):
    """The kernels' tests failed, or did not run; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class KernelTestRun:
    """Counts of one run of the tests, and what it was a run of."""

    passed: int
    failed: int
    skipped: int
    seconds: float
    digest: str
    names: tuple[str, ...]


def digest_of(paths: Iterable[Path], device: str) -> str:
    """SHA-256 over the contents of files, and of the sources below folders, and over what they run on."""
    found = hashlib.sha256(device.encode())
    for path in paths:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
        for file in files:
            found.update(f"\0{file.relative_to(path.parent)}\0".encode())
            found.update(file.read_bytes())
    return found.hexdigest()


def device_name() -> str:
    """The GPU, the versions that compile for it, and what the environment sets of the kernels."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    try:
        compiler = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        compiler = "none"
    return f"{gpu}, torch {torch.__version__}, triton {compiler}, {kernel_settings()}"


def kernel_tests() -> list[Path]:
    """The files of the kernels' tests."""
    return sorted({path for pattern in TESTS for path in (ROOT / "tests" / "gpu").glob(pattern)})


def require_green(
    tests: Iterable[Path] | None = None,
    sources: Iterable[Path] | None = None,
    stamp: Path = STAMP,
    device: str | None = None,
) -> KernelTestRun:
    """Run the tests, unless a stamp says that these very files passed on this device.

    Raises:
        KernelTestsError: a test failed, none ran, or they cannot be run here.
    """
    tests = kernel_tests() if tests is None else list(tests)
    sources = [ROOT / name for name in SOURCES] if sources is None else list(sources)
    names = tuple(path.name for path in tests)
    digest = digest_of(sources, device if device is not None else device_name())
    known = _read(stamp)
    if known is not None and known.digest == digest and known.names == names and not known.failed:
        print(
            f"the kernels' tests passed before on these files and this device: {known.passed} of them",
            flush=True,
        )
        return known
    run = _run(tests, digest)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(asdict(run), indent=1) + "\n")
    return run


def _read(stamp: Path) -> KernelTestRun | None:
    try:
        fields = json.loads(stamp.read_text())
        return KernelTestRun(**{**fields, "names": tuple(fields["names"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _run(tests: list[Path], digest: str) -> KernelTestRun:
    if importlib.util.find_spec("pytest") is None:
        raise KernelTestsError("the tests did not run: this Python has no pytest")
    print(f"running tests: {', '.join(path.name for path in tests)}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            f"--junitxml={report}",
            *_settings(),
            *_jobs(),
        ]
        done = subprocess.run(
            [*command, *map(str, tests)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        counts = _count(report)
    tail = "\n".join(done.stdout.strip().splitlines()[-15:])
    passed, failed, skipped = counts
    run = KernelTestRun(
        passed, failed, skipped, time.monotonic() - started, digest, tuple(path.name for path in tests)
    )
    if failed:
        raise KernelTestsError(f"the tests are red, {failed} failed:\n{tail}")
    if done.returncode != 0:
        raise KernelTestsError(f"the tests did not run to their end:\n{tail}")
    if not passed:
        raise KernelTestsError(f"the tests did not run: {skipped} skipped, none passed")
    print(f"{passed} tests passed in {run.seconds:.0f} s", flush=True)
    return run


def _settings() -> list[str]:
    """The project's settings of pytest, or the needed ones of them where its plugins are not installed."""
    if importlib.util.find_spec("pytest_timeout") is not None:
        return []
    paths = f"{ROOT / 'tests'} {ROOT / 'perf'}"
    return ["-c", os.devnull, f"--rootdir={ROOT}", "--import-mode=importlib", "-p", "no:cacheprovider",
            "-o", f"pythonpath={paths}"]  # fmt: skip


def _jobs() -> list[str]:
    """Several processes where pytest-xdist is installed: compiling the kernels takes longer than running them."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(MOST_PROCESSES, len(os.sched_getaffinity(0)))), "--dist", "worksteal"]


def _count(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of a JUnit report; zeros if there is none."""
    if not report.is_file():
        return 0, 0, 0
    total = failed = skipped = 0
    for suite in ET.parse(report).getroot().iter("testsuite"):
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return total - failed - skipped, failed, skipped


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--others", action="store_true", help="the tests of a device that are not of kernels")
    args = parser.parse_args(argv)
    try:
        if args.others:
            chosen = set((ROOT / "tests" / "gpu").glob("test_*.py")) - set(kernel_tests())
            _run(sorted(chosen), "")
        else:
            require_green()
    except KernelTestsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
