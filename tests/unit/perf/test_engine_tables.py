"""The engine alone is measured by what comes out of it, against what is recorded of others."""

from __future__ import annotations

import json
import math
from pathlib import Path

import engine_tables
import peers
import pytest
from records import Record, steady_window, summarize, token_gaps_ms, tokens_in
from table_text import decode_table, prefill_table, verdict

TINY = ["--shape", "tiny", "--prompt", "8", "--max-total-tokens", "128"]


def record(sent: float, *arrivals: tuple[float, int]) -> Record:
    return Record(sent, list(arrivals), [7] * sum(count for _, count in arrivals))


def test_the_steady_phase_begins_when_the_last_stream_has_its_first_token() -> None:
    records = [record(0, (1, 1), (2, 1), (6, 1)), record(0, (3, 1), (4, 2), (5, 1))]
    assert steady_window(records) == (3, 5)
    assert tokens_in(records, (3, 5)) == 3
    assert summarize(records, 10)["steady_tok_s"] == 1.5
    assert token_gaps_ms(records, (3, 5)) == [500, 500, 1000]


def test_streams_that_never_all_decode_have_no_steady_phase() -> None:
    records = [record(0, (1, 1), (2, 1)), record(0, (3, 1), (4, 1))]
    assert steady_window(records) is None
    assert summarize(records, 10)["steady_tok_s"] is None


def test_a_failed_stream_counts_as_failed_and_for_nothing_else() -> None:
    broken = Record(0.0, [], [], "no such adapter")
    summary = summarize([record(0, (1, 1), (2, 1)), broken], 0)
    assert (summary["failed"], summary["total_tok_s"]) == (1, 1.0)


@pytest.mark.parametrize(
    ("ours", "goal", "more", "said"),
    [
        (6.0, 6.0, False, "reached"),
        (6.6, 6.0, False, "missed by 10.0 %"),
        (30_000, 36_000, True, "missed by 20.0 %"),
        (40_000, 36_000, True, "reached"),
        (None, 6.0, False, "not measured"),
        (math.nan, 6.0, False, "not measured"),
        (6.0, None, False, ""),
    ],
)
def test_a_verdict_says_by_how_much_a_goal_is_missed(
    ours: float | None, goal: float | None, more: bool, said: str
) -> None:
    assert verdict(ours, goal, more) == said


def test_floors_peers_and_goals_stand_in_order_in_every_row() -> None:
    for rows in peers.DECODE.values():
        assert len({(row.streams, row.kind) for row in rows}) == len(rows)
        for row in rows:
            assert row.floor_ms < row.goal_ms
            assert row.vllm_ms is None or row.vllm_ms > row.goal_ms
    for kernels in peers.KERNELS["8b"]:
        assert kernels.floor_us <= kernels.goal_us < kernels.vllm_us


def test_a_table_sets_each_row_beside_its_own_peer() -> None:
    rows = [{"streams": 128, "adapters": "all distinct", "ms_p50": 28.0, "ms_p99": 30.0, "tokens_s": 4571.0}]
    table = decode_table({"shape": "llama3-8b", "through": "engine", "decode": rows})
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert (cells["byte floor, ms"], cells["vLLM, ms"], cells["goal, ms"]) == ("9.70", "51.1", "14.0")
    assert cells["goal reached"] == "missed by 100.0 %"


def test_a_prompts_steps_alone_are_not_held_against_the_goal_for_whole_answers() -> None:
    rows = [{"streams": 8, "adapters": "base", "tokens_s": 50_000.0}]
    alone = prefill_table({"shape": "llama3-8b", "prefill": rows})
    whole = prefill_table({"shape": "llama3-8b", "through": "engine", "prefill": rows})
    assert (alone.rows[0][-1], whole.rows[0][-1]) == ("not comparable", "reached")


def test_a_cliff_is_a_step_that_loses_more_than_half() -> None:
    rows = [{"registered": n, "tokens_s": rate} for n, rate in ((1, 100.0), (8, 60.0), (32, 20.0))]
    assert engine_tables.cliffs(rows) == ["8 to 32 adapters: 33% of the tokens/s"]
    assert engine_tables.cliffs([rows[0], {"registered": 8, "tokens_s": math.nan}])


def test_decoding_is_measured_for_every_number_of_streams_and_kind(tmp_path: Path) -> None:
    arguments = ["table_b", *TINY, "--streams", "1,3", "--tokens", "12", "--rounds", "1"]
    assert engine_tables.main([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "table_b-tiny.json").read_text())
    measured = [(row["streams"], row["adapters"]) for row in result["decode"]]
    assert measured == [(1, "base"), (1, "one adapter"), *((3, kind) for kind in peers.KINDS)]
    assert all(row["ms_p50"] > 0 and row["tokens_s"] > 0 for row in result["decode"])
    assert "gpu" in result["environment"]
    assert result["command"].startswith("python perf/engine_tables.py table_b")


def test_a_sweep_goes_on_when_more_adapters_are_registered_than_fit(tmp_path: Path) -> None:
    arguments = ["sweep", *TINY, "--streams", "4", "--registered", "1,3,24", "--arena", "4", "--tokens", "6"]
    status = engine_tables.main([*arguments, "--host-gib", "0.001", "--rounds", "4", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "sweep-tiny.json").read_text())
    rows = {row["registered"]: row for row in result["sweep"]}
    assert list(rows) == [1, 3, 24]
    assert all(row["failed"] == 0 and row["tokens_s"] > 0 for row in rows.values())
    assert rows[24]["adapter_evictions"] > 0
    assert status == (peers.GOAL_MISSED if engine_tables.cliffs(result["sweep"]) else 0)


def test_a_sweep_without_a_middle_is_refused() -> None:
    with pytest.raises(SystemExit):
        engine_tables.parse(["sweep", "--rounds", "2"])
