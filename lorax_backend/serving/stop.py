"""Stop strings in a text that arrives in pieces. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Finds the first stop string anywhere in the text, also across pieces, and cuts what follows it.

    Args:
        stops: the stop strings, none empty.
        include: keep the stop string at the end of the text. If false, text that may turn out to be the beginning of
            one is held back until that is decided, so that a reader never sees part of it.
    """

    __slots__ = ("_include", "_longest", "_stops", "_tail", "matched")

    def __init__(self, stops: Sequence[str], include: bool = True) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._longest = max((len(stop) for stop in stops), default=0)
        self._tail = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Take in a piece; the text that may be shown. `matched` is set once a stop string is complete."""
        if self.matched is not None:
            return ""
        text = self._tail + piece
        found = self._first(text)
        if found is not None:
            start, self.matched = found
            end = start + len(self.matched)
            shown = len(self._tail) if self._include else 0  # with `include` the tail has been shown already
            self._tail = ""
            return text[shown : end if self._include else start]
        if self._include:
            self._tail = text[max(0, len(text) - self._longest + 1) :] if self._longest > 1 else ""
            return piece
        held = self._open_length(text)
        self._tail = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The text held back, at the end of the sequence."""
        held = "" if self._include or self.matched is not None else self._tail
        self._tail = ""
        return held

    def _first(self, text: str) -> tuple[int, str] | None:
        """Start and stop string of the match that is complete first; the longest of those that end together."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
