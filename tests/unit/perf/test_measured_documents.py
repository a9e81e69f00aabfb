"""The documents hold what the results say, in tables and in pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from plots import PICTURES, RESULTS, digest, draw, drawn_from
from readme_table import DECODE_8B, SOURCES, documents, find, main, replaced, take

SWEEP = {
    "environment": {"gpu": "none"}, "command": "python perf/engine_tables.py sweep", "shape": "llama3-8b",
    "through": "engine", "streams": 128, "arena_adapters": 16,
    "sweep": [{"registered": n, "tokens_s": 9000.0 - n} for n in (1, 8, 32, 128)],
}  # fmt: skip


def test_the_documents_tables_are_what_the_results_give() -> None:
    stale = [str(path) for path, text in documents() if path.read_text() != text]
    assert not stale, "run python perf/readme_table.py"
    assert main(["--check"]) == 0


def test_another_number_makes_another_document(tmp_path: Path) -> None:
    results = tmp_path / "perf" / "results"
    results.mkdir(parents=True)
    for source in SOURCES:
        found = find(source)
        if found is not None:
            (results / found[0]).write_text(json.dumps(found[1]))
    for name in ("README.md", "perf/results/README.md"):
        (tmp_path / name).write_text((RESULTS.parents[1] / name).read_text())
    assert all(path.read_text() == text for path, text in documents(tmp_path))
    measured = find(DECODE_8B)
    assert measured is not None
    engine = results / measured[0]
    changed = json.loads(engine.read_text())
    changed["decode"][0]["ms_p50"] += 1.0
    engine.write_text(json.dumps(changed))
    assert all(path.read_text() != text for path, text in documents(tmp_path))


def test_a_document_without_markers_is_an_error_rather_than_left_alone() -> None:
    with pytest.raises(ValueError, match="needs the line"):
        replaced("# Results\n", "| 1 |")


def test_a_runs_results_are_taken_under_the_machines_name_and_tiny_ones_left(tmp_path: Path) -> None:
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    results.mkdir()
    for name in ("kernels-8b", "table_b-llama3-8b", "table_f-tiny", "summary"):
        (out / f"{name}.json").write_text("{}")
    assert take(out, "h100", results) == ["kernels-llama3-8b-h100.json", "table_b-llama3-8b-h100.json"]
    assert len(list(results.iterdir())) == 2


def test_no_picture_is_older_than_its_numbers() -> None:
    for name, source, _ in PICTURES:
        found, picture = find(source), RESULTS / f"{name}.svg"
        assert picture.is_file() == (found is not None)
        if found is not None:
            assert drawn_from(picture) == digest(found[1]), "run python perf/plots.py"


def test_the_documents_show_every_picture_there_is() -> None:
    text = (RESULTS / "README.md").read_text()
    shown = set(re.findall(r"\]\(([\w.-]+\.svg)\)", text))
    assert shown == {path.name for path in RESULTS.glob("*.svg")}


def test_pictures_are_drawn_from_results_and_name_their_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    results.mkdir()
    for path in RESULTS.glob("*-h100.json"):
        (results / path.name).write_text(path.read_text())
    (results / "sweep-llama3-8b-h100.json").write_text(json.dumps(SWEEP))
    made = draw(results, tmp_path)
    assert [path.stem for path in made] == [name for name, _, _ in PICTURES]
    assert drawn_from(made[2]) == digest(SWEEP)
    text = made[2].read_text()
    assert "more than the GPU holds" in text
    assert "8,872" in text
    assert draw(results, tmp_path)[2].read_text() == text, "equal numbers give equal files"
