"""Two ways to show several texts that grow at once: columns in a terminal, prefixed lines anywhere else."""

from __future__ import annotations

import shutil
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO

_CELL_WIDTH = 38
_TEXT_LINES = 5
_REDRAW_S = 0.04
_COLOURS = (37, 33, 36, 32, 35, 34, 31)
_LINE_LENGTH = 60


@dataclass
class Pane:
    """One growing text: who writes it, what was asked, and how far it is."""

    name: str
    prompt: str
    text: str = ""
    tokens: int = 0
    status: str = "waiting"


class Board(Protocol):
    """Shows panes as they change."""

    def changed(self, pane: Pane) -> None:
        """A pane has more text or another status."""
        ...

    def close(self) -> None:
        """Show the last state of all."""
        ...


def open_board(panes: Sequence[Pane], stream: TextIO) -> Board:
    """Columns if `stream` is a terminal large enough for them, else lines."""
    size = shutil.get_terminal_size()
    columns = max(1, min(3, size.columns // _CELL_WIDTH))
    rows = -(-len(panes) // columns)
    if stream.isatty() and rows * (_TEXT_LINES + 4) < size.lines:
        return ColumnBoard(panes, stream, columns, size.columns // columns)
    return LineBoard(panes, stream)


class LineBoard:
    """Prints what came as lines that begin with the pane's name; for pipes, logs and small terminals."""

    def __init__(self, panes: Sequence[Pane], stream: TextIO) -> None:
        self._panes = panes
        self._stream = stream
        self._printed = {pane.name: 0 for pane in panes}
        self._width = max(len(pane.name) for pane in panes)

    def changed(self, pane: Pane) -> None:
        """Print whole lines, and the rest once the pane is done."""
        rest = pane.text[self._printed[pane.name] :]
        while len(rest) > _LINE_LENGTH or "\n" in rest:
            cut = self._cut(rest)
            self._print(pane, rest[:cut])
            rest = rest[cut:]
        if rest and pane.status != "writing":
            self._print(pane, rest)

    def close(self) -> None:
        """Nothing is left to print."""

    @staticmethod
    def _cut(text: str) -> int:
        newline = text.find("\n", 0, _LINE_LENGTH)
        if newline >= 0:
            return newline + 1
        space = text.rfind(" ", 0, _LINE_LENGTH)
        return space + 1 if space > 0 else _LINE_LENGTH

    def _print(self, pane: Pane, piece: str) -> None:
        self._printed[pane.name] += len(piece)
        if piece.strip():
            print(f"{pane.name:>{self._width}} | {piece.rstrip()}", file=self._stream, flush=True)


class ColumnBoard:
    """Redraws all panes in place, side by side."""

    def __init__(self, panes: Sequence[Pane], stream: TextIO, columns: int, cell_width: int) -> None:
        self._panes = panes
        self._stream = stream
        self._columns = columns
        self._cell_width = cell_width
        self._drawn_lines = 0
        self._drawn_at = 0.0

    def changed(self, pane: Pane) -> None:
        """Redraw, unless it was done a moment ago."""
        if time.monotonic() - self._drawn_at >= _REDRAW_S:
            self._draw()

    def close(self) -> None:
        """Draw the last state."""
        self._draw()

    def _draw(self) -> None:
        lines: list[str] = []
        for start in range(0, len(self._panes), self._columns):
            cells = [
                self._cell(index) for index in range(start, min(start + self._columns, len(self._panes)))
            ]
            lines += ["".join(parts) for parts in zip(*cells, strict=True)]
        up = f"\x1b[{self._drawn_lines}A" if self._drawn_lines else ""
        self._stream.write(up + "".join(f"\r\x1b[K{line}\n" for line in lines))
        self._stream.flush()
        self._drawn_lines = len(lines)
        self._drawn_at = time.monotonic()

    def _cell(self, index: int) -> list[str]:
        pane = self._panes[index]
        width = self._cell_width - 2
        colour = _COLOURS[index % len(_COLOURS)]
        wrapped = [line for part in pane.text.splitlines() for line in textwrap.wrap(part, width) or [""]]
        shown = (wrapped[-_TEXT_LINES:] + [""] * _TEXT_LINES)[:_TEXT_LINES]
        title = f"{pane.name}  ({pane.status}, {pane.tokens} tokens)"
        plain = [title, f"> {pane.prompt}", *shown, ""]
        styles = [f"1;{colour}", "2", *[str(colour)] * _TEXT_LINES, "0"]
        return [
            f"\x1b[{style}m{text[:width]:<{self._cell_width}}\x1b[0m"
            for style, text in zip(styles, plain, strict=True)
        ]
