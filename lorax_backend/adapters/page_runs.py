"""Runs of adjacent pages. Standard library only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator


def runs(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first page, number of pages) of every stretch of consecutive numbers, in the order given."""
    first = count = 0
    for page in pages:
        if count and page == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = page, 1
    if count:
        yield first, count


def best_run(found: Iterable[tuple[int, int]], count: int) -> int | None:
    """First page of the shortest of these runs that holds `count` pages, the lowest among equals."""
    fitting = [(length, first) for first, length in found if length >= count]
    return min(fitting)[1] if fitting else None


class FreeRuns:
    """The free ones of `num_pages` pages, as runs that never touch each other."""

    def __init__(self, num_pages: int) -> None:
        self.num_free = num_pages
        self._runs: list[tuple[int, int]] = [(0, num_pages)] if num_pages else []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(first, count), ascending."""
        return iter(self._runs)

    def take(self, first: int, count: int) -> None:
        """Take pages that are free.

        Raises:
            RuntimeError: one of them is not; a defect of this program.
        """
        index = bisect_left(self._runs, (first + 1,)) - 1
        start, length = self._runs[index] if index >= 0 else (0, 0)
        if not start <= first <= first + count <= start + length:
            raise RuntimeError(f"host pages {first} to {first + count - 1} are not free")
        parts = [(start, first - start), (first + count, start + length - first - count)]
        self._runs[index : index + 1] = [part for part in parts if part[1]]
        self.num_free -= count

    def give(self, first: int, count: int) -> None:
        """Give taken pages back."""
        self.num_free += count
        index = bisect_left(self._runs, (first,))
        if index < len(self._runs) and self._runs[index][0] == first + count:
            count += self._runs.pop(index)[1]
        if index and sum(self._runs[index - 1]) == first:
            start, length = self._runs.pop(index - 1)
            first, count, index = start, count + length, index - 1
        self._runs.insert(index, (first, count))
