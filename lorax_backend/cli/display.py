"""What the command line shows: progress while something takes long, and tables of facts. Needs no torch."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from typing import Any, Protocol, TextIO

Row = tuple[str, str]

_PERCENT = re.compile(r"(\d{1,3})(?:\.\d+)? ?%")
_COUNT = re.compile(r"(\d+) ?(?:/|of) ?(\d+)")
_REPEAT_AFTER_S = 10.0


class Display(Protocol):
    """Shows one line of progress at a time."""

    def progress(self, message: str) -> None:
        """Show what is going on; a percentage or 'n/m' in the message is drawn as a bar where possible."""
        ...

    def line(self, text: str) -> None:
        """Print a line that stays."""
        ...

    def close(self) -> None:
        """End the progress line."""
        ...


def share_done(message: str) -> float | None:
    """The share between 0 and 1 that a progress message tells, or None."""
    percent = _PERCENT.search(message)
    if percent:
        return min(int(percent[1]), 100) / 100
    count = _COUNT.search(message)
    if count and 0 < int(count[2]) >= int(count[1]):
        return int(count[1]) / int(count[2])
    return None


class PlainDisplay:
    """A printed line a message, for logs and pipes. A message that only counts on is printed every ten seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_kind = ""
        self._last_time = float("-inf")

    def progress(self, message: str) -> None:
        kind = re.sub(r"[\d.]+", "#", message)
        now = time.monotonic()
        if kind == self._last_kind and now - self._last_time < _REPEAT_AFTER_S and share_done(message) != 1.0:
            return
        self._last_kind, self._last_time = kind, now
        self.line(message)

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._last_kind = ""


class TerminalDisplay:
    """A spinner with a bar, redrawn in place by rich."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(file=stream, highlight=False)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task: Any = None
        self._indeterminate = False

    def progress(self, message: str) -> None:
        share = share_done(message)
        if self._task is not None and (share is None) != self._indeterminate:
            # A rich task cannot lose its total again: a message without a share gets a task of its own.
            self.close()
        self._indeterminate = share is None
        if self._task is None:
            self._task = self._bar.add_task(message, total=None if share is None else 100)
            self._bar.start()
        self._bar.update(self._task, description=message, completed=int(100 * (share or 0)))

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None


def open_display(stream: TextIO | None = None) -> Display:
    """A terminal display if `stream` (standard error unless given) is a terminal and rich is installed."""
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        try:
            return TerminalDisplay(stream)
        except ImportError:
            pass
    return PlainDisplay(stream)


def table(title: str, rows: Iterable[Row]) -> str:
    """Rows of (name, value) in two aligned columns below a title."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, "", *(f"  {name:<{width}}  {value}" for name, value in rows)])


def byte_size(count: float) -> str:
    """Bytes as people read them: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
