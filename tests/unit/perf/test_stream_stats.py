"""The numbers that the load driver derives from perf_analyzer's export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stream_stats import Stream, markdown_table, percentile, read_streams, summarize
from triton_load import Load, request_rows

MS = 1_000_000


def exported(requests: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "profile.json"
    path.write_text(json.dumps({"experiments": [{"requests": requests}]}))
    return path


def request(
    sent_ms: int, arrivals_ms: list[int], ids: list[Any], adapter: str | None = None
) -> dict[str, Any]:
    return {
        "timestamp": sent_ms * MS,
        "request_inputs": {"text_input": "hi"} | ({"adapter_id": adapter} if adapter else {}),
        "response_timestamps": [stamp * MS for stamp in arrivals_ms],
        "response_outputs": [{"text_output": "x", "token_ids": value} for value in ids],
    }


def test_tokens_are_counted_by_ids_and_an_empty_last_response_counts_for_nothing(tmp_path: Path) -> None:
    path = exported([request(100, [110, 130, 140], [[5], [6, 7], ""], "org/a")], tmp_path)
    ((stream,),) = read_streams(path)
    assert stream == Stream("org/a", 100.0, (10.0, 30.0), (1, 2))
    assert stream.token_gaps_ms == [10.0, 10.0]


def test_throughput_is_all_tokens_over_first_sent_to_last_received(tmp_path: Path) -> None:
    requests = [request(0, [10, 20], [[1], [2]]), request(0, [10, 2000], [[1], [2, 3]])]
    summary = summarize(read_streams(exported(requests, tmp_path))[0])
    assert (summary.requests, summary.tokens, summary.responses) == (2, 5, 4)
    assert summary.tokens_per_s == pytest.approx(2.5)
    assert summary.ttft_ms == (10.0, 10.0, 10.0)


def test_a_request_without_ids_is_an_error_rather_than_a_zero(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no token ids"):
        read_streams(exported([request(0, [5], [""])], tmp_path))


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, 0.0), ([3.0], 0.99, 3.0), ([1.0, 2.0, 3.0, 4.0], 0.5, 2.5), ([4.0, 0.0], 0.75, 3.0)],
)
def test_a_percentile_lies_between_its_two_nearest_values(
    values: list[float], share: float, expected: float
) -> None:
    assert percentile(values, share) == expected


def test_every_row_of_a_load_has_its_own_prompt_and_adapters_take_turns() -> None:
    rows = request_rows(Load(("", "org/a", "org/b"), "hub", prompt_words=4, max_tokens=8), 7)
    assert len({row["text_input"][0] for row in rows}) == 7
    assert [row.get("adapter_id", [""])[0] for row in rows] == [
        "",
        "org/a",
        "org/b",
        "",
        "org/a",
        "org/b",
        "",
    ]


def test_the_table_has_a_cell_for_every_column() -> None:
    stream = Stream("", 0.0, (10.0, 20.0), (1, 1))
    lines = markdown_table([("1 at once", summarize([stream]))]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
