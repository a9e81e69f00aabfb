"""The demo program, as a newcomer runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
NAMES = ["base", "pirate", "shout", "json-extract", "tag-falcon", "tag-otter"]


@pytest.mark.slow
def test_the_demo_streams_from_the_base_and_five_adapters_and_ends_well(smollm2_path: Path) -> None:
    command = [sys.executable, str(DEMO), "--model-id", str(smollm2_path), "--max-new-tokens", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NAMES:
        lines = [line for line in done.stdout.splitlines() if line.strip().startswith(f"{name} |")]
        assert lines, name
    assert "[falcon] " in done.stdout
    assert "[otter] " in done.stdout
    assert "tokens/s" in done.stdout


def test_the_demo_fails_readably_without_a_model() -> None:
    command = [sys.executable, str(DEMO), "--model-id", "/no/such/model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "/no/such/model" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_says_so_if_the_server_it_is_pointed_at_is_not_there() -> None:
    done = subprocess.run(
        [sys.executable, str(DEMO), "--url", "localhost:9"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "No connection to localhost:9" in done.stderr
    assert "Traceback" not in done.stderr
