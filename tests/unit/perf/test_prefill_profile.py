"""What the profile of long prompts makes of a GPU's events."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "perf"))

from prefill_profile import shares


def test_time_in_which_kernels_overlap_counts_once() -> None:
    told = shares([(3000.0, 1000.0, "late"), (0.0, 1000.0, "early"), (500.0, 1000.0, "late")]).splitlines()
    assert told[0] == "4.0 ms, in 2.5 of which (62.5%) something ran"
    assert [line.split() for line in told[1:]] == [
        ["2.00", "ms", "2", "x", "1000.0", "us", "late"],
        ["1.00", "ms", "1", "x", "1000.0", "us", "early"],
    ]


def test_a_kernel_within_another_leaves_no_gap() -> None:
    told = shares([(0.0, 1000.0, "long"), (100.0, 10.0, "short"), (1000.0, 1000.0, "next")])
    assert told.startswith("2.0 ms, in 2.0 of which (100.0%)")


def test_nothing_is_said_as_such() -> None:
    assert shares([]) == "nothing ran on a GPU"
