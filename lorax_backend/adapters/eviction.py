"""Who leaves first when room is short: how often and how lately adapters were asked for. Standard library only.

Each request for an adapter counts one, and counts fade by half in as many requests as `_HALF_LIFE` times the adapters
in the tier. What an adapter was asked for before it had to leave is remembered for a while.

An adapter that has come and was not asked for again is worth what it was before it came: the request that brought it
does not count. So those that come once each, or round and round, more of them than there is room for, replace each
other and not the ones that are asked for again; with plain LRU each would be gone just before its turn. A few
newcomers are spared, so that a favourite can become one. perf/adapter_churn_sim.py compares all this with plain LRU.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from lorax_backend.types import AdapterRef

_HALF_LIFE = 3.0
_SPARED = 8  # one newcomer in so many adapters of the tier, and at least one
_REMEMBERED = 4  # adapters that had to leave, for each in the tier
_LEAST_REMEMBERED = 64
# Bringing an adapter in costs about this many pages' copying beside the pages themselves.
_FIXED_COST = 0.3


@dataclass(slots=True)
class _Entry:
    """`count` is as of `time`; `order` settles ties; `arrival` numbers those that came, in their order."""

    weight: float
    count: float
    time: int
    order: int
    arrival: int
    asked_again: bool = False


class EvictionOrder:
    """Adapters in one tier, first to leave first; among equals that were asked for again, the least recently used."""

    def __init__(self) -> None:
        self._entries: dict[AdapterRef, _Entry] = {}
        self._past: OrderedDict[AdapterRef, tuple[float, int]] = OrderedDict()  # count, time
        self._time = 0  # requests so far
        self._order = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._entries

    def __iter__(self) -> Iterator[AdapterRef]:
        return iter(sorted(self._entries, key=self.rank))

    def rank(self, ref: AdapterRef) -> tuple[float, int]:
        """Smaller leaves earlier; the first number is 0 or more."""
        entry = self._entries[ref]
        count, order = entry.count, entry.order
        if not entry.asked_again:
            if self._arrivals - entry.arrival >= max(1, len(self._entries) // _SPARED):
                count -= 1.0
            order = -entry.arrival  # the latest leaves first, or all would be gone before their turn
        return max(0.0, count) * self._faded(entry.time) * entry.weight, order

    def add(self, ref: AdapterRef, num_pages: int, requests: int = 1) -> None:
        """It has come to this tier for so many requests, at least one."""
        self._time += 1
        self._order += 1
        self._arrivals += 1
        count, time = self._past.pop(ref, (0.0, 0))
        count = count * self._faded(time) + max(1, requests)
        weight = 1.0 + _FIXED_COST / max(num_pages, 1)
        self._entries[ref] = _Entry(weight, count, self._time, self._order, self._arrivals)

    def hit(self, ref: AdapterRef) -> None:
        """A request came for it; ignored if it is not here."""
        entry = self._entries.get(ref)
        if entry is not None:
            self._time += 1
            self._order += 1
            entry.count = entry.count * self._faded(entry.time) + 1.0
            entry.time, entry.order, entry.asked_again = self._time, self._order, True

    def touch(self, ref: AdapterRef) -> None:
        """It is in use now, meanwhile its count has not faded; ignored if it is not here."""
        entry = self._entries.get(ref)
        if entry is not None:
            self._order += 1
            entry.time, entry.order = self._time, self._order

    def remove(self, ref: AdapterRef, evicted: bool = False) -> None:
        """Take it out; one that was `evicted` to make room is remembered."""
        entry = self._entries.pop(ref)
        if evicted:
            self._past[ref] = entry.count, entry.time
            while len(self._past) > max(_LEAST_REMEMBERED, _REMEMBERED * len(self._entries)):
                self._past.popitem(last=False)

    def _faded(self, time: int) -> float:
        """What is left now of a count of 1 at that time."""
        return math.exp2((time - self._time) / (_HALF_LIFE * max(8, len(self._entries))))
