"""Progress of a batch: a bar where one can be drawn, lines or nothing elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

# Called with the number of items done and of all items.
ProgressCallback = Callable[[int, int], object]

_LINES = 20  # plain progress lines in a whole batch


class Progress(Protocol):
    """Shows how many items are done."""

    def update(self, done: int) -> None: ...

    def close(self) -> None: ...


class _Silent:
    def update(self, done: int) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing to end."""


class _Callback:
    def __init__(self, call: ProgressCallback, total: int) -> None:
        self._call, self._total = call, total

    def update(self, done: int) -> None:
        self._call(done, self._total)

    def close(self) -> None:
        """Nothing to end."""


class _Tqdm:
    def __init__(self, total: int, stream: TextIO) -> None:
        self._bar: Any = importlib.import_module("tqdm").tqdm(total=total, unit="prompt", file=stream)

    def update(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Rich:
    def __init__(self, total: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._bar = Bar(console=Console(file=stream))
        self._task = self._bar.add_task("prompts", total=total)
        self._bar.start()

    def update(self, done: int) -> None:
        self._bar.update(self._task, completed=done)

    def close(self) -> None:
        self._bar.stop()


class _Lines:
    """A line now and then, with the time the rest will take at the pace so far."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total, self._stream = total, stream
        self._start = time.monotonic()
        self._next = 1

    def update(self, done: int) -> None:
        if done < min(self._next, self._total):
            return
        self._next = done + max(1, self._total // _LINES)
        spent = time.monotonic() - self._start
        left = spent / done * (self._total - done)
        self._stream.write(f"{done}/{self._total} prompts, {spent:.0f} s, about {left:.0f} s left\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing to end."""


def open_progress(progress: bool | ProgressCallback, total: int, stream: TextIO | None = None) -> Progress:
    """A progress bar by tqdm or rich if one is installed, else lines on a terminal, else nothing.

    Args:
        progress: True for a bar on standard error, False for nothing, or a function to call.
        total: number of items.
        stream: where to draw instead of standard error.
    """
    if callable(progress):
        return _Callback(progress, total)
    stream = sys.stderr if stream is None else stream
    if not progress or not stream.isatty():
        return _Silent()
    for module, kind in (("tqdm", _Tqdm), ("rich", _Rich)):
        if importlib.util.find_spec(module) is not None:
            return kind(total, stream)
    return _Lines(total, stream)
