"""Runs the Triton kernels on a CPU, in Triton's interpreter.

TRITON_INTERPRET has to be set before triton is imported and changes every kernel of the process, so these tests run in
a process of their own. bfloat16 is left to the GPU tests: the interpreter adds it wrongly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_equal_float64_in_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
    ]
    command += ["-o", "python_files=interpreted_*.py", "-o", "addopts=", str(FOLDER)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=570
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
