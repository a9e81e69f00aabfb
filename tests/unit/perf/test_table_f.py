"""The way through the server is judged against the engine alone, measure by measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import table_f
from engine_alone import EngineFailedError
from records import Record, Request
from step_recorder import model_file, read_steps, step_times_ms, watch
from table_f import Side, stream_row, verdicts

from lorax_backend.types import TokenOutput


def row(side: str, **changed: float | None) -> dict[str, Any]:
    plain = {"steady_tok_s": 1000.0, "step_mean": 10.0, "step_p99": 12.0, "itl_p99": 13.0, "ttft_p50": 50.0}
    return {"side": side, "adapters": "base", **plain, **changed}


def measured(first_ms: float = 12.0, **served: float | None) -> dict[str, Any]:
    first = {"alone": {"idle": [10.0], "newcomer": [20.0]},
             "served": {"idle": [first_ms], "newcomer": [20.0 + first_ms - 10.0]}}  # fmt: skip
    return {"rounds": [row("alone"), row("served", **served)], "first_token": first}


def judged(result: dict[str, Any]) -> dict[str, bool | None]:
    return {entry["measure"]: entry["reached"] for entry in verdicts(result)}


def test_the_same_speed_reaches_every_goal() -> None:
    assert set(judged(measured()).values()) == {True, None}


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"steady_tok_s": 949.0}, "tokens/s, base"),
        ({"step_mean": 10.6}, "step mean, ms, base"),
        ({"step_p99": 18.1}, "step p99, ms, base"),
    ],
)
def test_each_goal_can_be_missed_alone(changed: dict[str, float], missed: str) -> None:
    assert [name for name, reached in judged(measured(**changed)).items() if reached is False] == [missed]


def test_a_first_token_more_than_three_milliseconds_later_is_too_late() -> None:
    late = judged(measured(first_ms=13.1))
    assert late["first token, idle, ms"] is False
    assert late["first token among streams, ms"] is False


def test_a_phase_that_was_not_seen_is_neither_reached_nor_missed() -> None:
    assert judged(measured(steady_tok_s=None))["tokens/s, base"] is None


def test_a_failed_stream_ends_the_comparison(tmp_path: Path) -> None:
    side = Side(lambda requests: [Record(error="refused") for _ in requests], tmp_path / "steps")
    with pytest.raises(EngineFailedError, match="refused"):
        stream_row(side, [Request([1])], 1)


class Core:
    """Gives the outputs it was told, one list a step."""

    def __init__(self, *steps: list[TokenOutput]) -> None:
        self._steps = list(steps)

    def step(self) -> list[TokenOutput]:
        return self._steps.pop(0)


def test_steps_are_recorded_when_they_give_tokens_and_read_by_their_window(tmp_path: Path) -> None:
    token = TokenOutput(1, 5)
    core = Core([token], [], [token, token], [token])
    watch(core, tmp_path / "steps")  # type: ignore[arg-type]
    assert [len(core.step()) for _ in range(4)] == [1, 0, 2, 1]
    steps = read_steps(tmp_path / "steps")
    assert [count for _, count in steps] == [1, 2, 1]
    begin, end = steps[0][0], steps[1][0]
    assert step_times_ms(tmp_path / "steps", (begin, end)) == [pytest.approx(1e3 * (end - begin))]


def test_a_step_that_is_half_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "steps").write_bytes(bytes(12) + b"half")
    assert len(read_steps(tmp_path / "steps")) == 1
    assert read_steps(tmp_path / "none") == []


def test_the_servers_model_file_is_python_that_names_the_record(tmp_path: Path) -> None:
    text = model_file(tmp_path / "it's here")
    compile(text, "model.py", "exec")
    assert "step_recorder.install" in text


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.timeout(600)
def test_both_sides_are_measured_by_the_same_work_through_a_real_server(tmp_path: Path) -> None:
    arguments = [
        *("--shape", "tiny", "--streams", "3", "--adapters", "2", "--prompt", "8", "--tokens", "24"),
        *("--rounds", "1", "--singles", "1", "--probes", "1", "--probe-after-s", "0", "--processes", "1"),
    ]
    table_f.main([*arguments, "--max-total-tokens", "128", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "table_f-tiny.json").read_text())
    sides = [(entry["side"], entry["adapters"]) for entry in result["rounds"]]
    assert sides == [("alone", "base"), ("served", "base"), ("alone", "adapters"), ("served", "adapters")]
    assert all(entry["total_tok_s"] > 0 and entry["ttft_p50"] > 0 for entry in result["rounds"])
    assert {name: len(times["idle"]) for name, times in result["first_token"].items()} == {
        "alone": 1,
        "served": 1,
    }
    # How long each is depends on how busy this machine is, and whether all streams ever ran at once too.
    assert all(entry["steps"] >= 24 for entry in result["rounds"])
