"""One unattended run: the budget holds, a broken part costs the others nothing, and what was measured is kept."""

from __future__ import annotations

import json
import os
import select
import sys
from pathlib import Path

import gpu_all
import pytest
from gpu_all import Part, commands, parse, run_all
from peers import GOAL_MISSED


def part(name: str, code: str, limit_s: float = 60.0) -> Part:
    return Part(name, limit_s, ("-c", code), ("-c", code), name)


def command_of(chosen: Part) -> list[str] | str:
    return [sys.executable, *chosen.command]


def statuses(parts: list[Part], out: Path, budget_s: float = 600.0) -> dict[str, str]:
    return {outcome.name: outcome.status for outcome in run_all(parts, out, budget_s, command_of)}


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    parts = [part("broken", "raise SystemExit('no kernel')"), part("fine", "print('41 us')")]
    assert statuses(parts, tmp_path) == {"broken": "failed", "fine": "passed"}
    assert (tmp_path / "fine.log").read_text() == "41 us\n"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"][0]["note"] == "no kernel"
    assert summary["waiting"] == []


def test_a_missed_goal_is_told_from_a_failure(tmp_path: Path) -> None:
    assert statuses([part("slow", f"raise SystemExit({GOAL_MISSED})")], tmp_path) == {"slow": "goal missed"}


def test_a_part_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    code = f"""
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
time.sleep(600)
"""
    assert statuses([part("hung", code, limit_s=6.0), part("next", "")], tmp_path) == {
        "hung": "out of time",
        "next": "passed",
    }
    if (tmp_path / "pid").exists():  # else this machine was too busy to start it
        assert_gone(int((tmp_path / "pid").read_text()))


def assert_gone(pid: int) -> None:
    """A process that was killed ends soon, though not at once."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(descriptor) as alive:
        assert select.select([alive], [], [], 60)[0], "it lives"


def test_nothing_is_started_once_the_budget_is_spent(tmp_path: Path) -> None:
    now = iter(range(0, 10_000, 50))
    outcomes = run_all(
        [part(name, "") for name in "abc"], tmp_path, 120.0, command_of, lambda: float(next(now))
    )
    assert [outcome.status for outcome in outcomes] == ["passed", "not run", "not run"]
    assert outcomes[2].note == "the budget is spent"


def test_the_summary_after_each_part_names_what_is_still_to_come(tmp_path: Path) -> None:
    code = f"import json; print(json.load(open({str(tmp_path / 'summary.json')!r}))['waiting'])"
    statuses([part("first", ""), part("second", code), part("third", "")], tmp_path)
    assert (tmp_path / "second.log").read_text() == "['second', 'third']\n"


def test_parts_are_chosen_and_skipped_by_name_but_not_by_a_wrong_one() -> None:
    assert parse(["table_e", "--skip", "table_b"]).parts == ["table_e"]
    for words in (["table_x"], ["--skip", "table_x"]):
        with pytest.raises(SystemExit):
            parse(words)


def test_every_program_is_there_and_a_dry_run_gives_each_a_tiny_model(tmp_path: Path) -> None:
    for name in [part.name for part in gpu_all.PARTS]:
        (chosen,) = [part for part in gpu_all.PARTS if part.name == name]
        real = commands(parse(["--out", str(tmp_path)]))(chosen)
        dry = commands(parse(["--dry-run", "--out", str(tmp_path)]))(chosen)
        assert isinstance(real, list), real
        assert real[0] == sys.executable
        assert not any("{out}" in word for word in real)
        assert dry == "needs a GPU" or "tiny" in dry


def test_what_needs_a_gpu_is_not_run_and_no_failure(tmp_path: Path) -> None:
    assert gpu_all.main(["kernel_tests", "table_e", "--dry-run", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [entry["note"] for entry in summary["parts"]] == ["needs a GPU"] * 2


@pytest.mark.timeout(600)
def test_a_dry_run_leaves_results_a_log_and_a_summary(tmp_path: Path) -> None:
    assert gpu_all.main(["table_c", "--dry-run", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(entry["name"], entry["status"]) for entry in summary["parts"]] == [("table_c", "passed")]
    assert summary["files"] == ["table_c-tiny.json"]
    assert "tokens/s" in (tmp_path / "table_c.log").read_text()
