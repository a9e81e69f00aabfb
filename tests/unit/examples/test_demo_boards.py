"""How the demo shows texts that grow at once."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[3] / "examples" / "demo_boards.py"


@pytest.fixture(scope="module")
def boards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_boards", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_pipe_gets_every_word_once_behind_its_panes_name(boards: ModuleType) -> None:
    panes = [boards.Pane("base", "?"), boards.Pane("pirate", "?")]
    stream = io.StringIO()
    board = boards.open_board(panes, stream)
    words = {pane.name: [f"{pane.name[0]}{number}" for number in range(60)] for pane in panes}
    for number in range(60):
        for pane in panes:
            pane.status = "writing"
            pane.text += words[pane.name][number] + ("\n" if number == 30 else " ")
            board.changed(pane)
    for pane in panes:
        pane.status = "done"
        board.changed(pane)
    board.close()
    printed: dict[str, list[str]] = {"base": [], "pirate": []}
    for line in stream.getvalue().splitlines():
        name, _, text = line.partition(" | ")
        assert len(text) <= 60
        printed[name.strip()] += text.split()
    assert printed == words


def test_a_terminal_shows_the_newest_lines_of_all_panes_side_by_side(boards: ModuleType) -> None:
    panes = [boards.Pane(f"p{number}", "question") for number in range(5)]
    stream = io.StringIO()
    board = boards.ColumnBoard(panes, stream, columns=3, cell_width=20)
    for pane in panes:
        pane.text = " ".join(f"{pane.name}w{number:02}" for number in range(40))
        board.changed(pane)
    board.close()
    last = stream.getvalue().rpartition("\x1b[16A")[2]
    assert last.count("\n") == 16
    for pane in panes:
        assert f"{pane.name}w39" in last
        assert f"{pane.name}w00" not in last
