"""Room for adapters: host memory by runs of pages, the device by slots and pages, each with its order of eviction.

The tiers answer who would have to go; the caller lets them go. Nothing is evicted for a newcomer that would not fit
even then. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from lorax_backend.adapters.eviction import EvictionOrder
from lorax_backend.adapters.page_runs import FreeRuns, best_run
from lorax_backend.adapters.registry import AdapterRecord
from lorax_backend.types import AdapterRef


class CopyEvent(Protocol):
    """The end of a copy on the device."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class DeviceArena(Protocol):
    """Device memory for adapters; `lorax_backend.adapters.arena.LoraArena`."""

    @property
    def num_pages(self) -> int: ...

    @property
    def num_free_pages(self) -> int: ...

    @property
    def num_used_slots(self) -> int: ...

    @property
    def max_slots(self) -> int: ...

    def fits(self, rank: int) -> bool: ...

    def allocate(self, rank: int) -> int | None: ...

    def write(self, slot: int, adapter: Any) -> Any: ...

    def is_ready(self, slot: int) -> bool: ...

    def free(self, slot: int) -> None: ...


class HostPages(Protocol):
    """Host memory for adapters; `lorax_backend.adapters.host_memory.HostMemory`."""

    @property
    def page_bytes(self) -> int: ...

    @property
    def num_pages(self) -> int: ...

    def pages(self, first: int, count: int) -> Any: ...


@dataclass(slots=True, eq=False)
class HostPlace:
    """A run of pages that holds an adapter, or is being filled.

    `writing`: a thread may still write to it. `owner` None: given up, to be freed when that thread is done.
    """

    first: int
    count: int
    owner: AdapterRecord | None
    writing: bool = True


@dataclass(frozen=True, slots=True)
class HostRoom:
    """Where an adapter can go, once the victims have gone."""

    first: int
    victims: list[AdapterRecord]


class _Tier:
    """Records in one tier with their order of eviction."""

    def __init__(self) -> None:
        self.order = EvictionOrder()
        self._records: dict[AdapterRef, AdapterRecord] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[AdapterRecord]:
        return iter(self._records.values())


class HostTier(_Tier):
    """Adapters in host memory; `num_used` counts the pages of those there and of those being read."""

    def __init__(self, memory: HostPages, max_records: int) -> None:
        super().__init__()
        self.memory = memory
        self.max_records = max_records
        self._free = FreeRuns(memory.num_pages)
        self._places: dict[int, HostPlace] = {}
        self._draining: list[tuple[int, int, CopyEvent]] = []
        self._events: dict[AdapterRef, CopyEvent] = {}

    @property
    def num_used(self) -> int:
        return self.memory.num_pages - self._free.num_free

    @property
    def budget(self) -> int:
        """Bytes of all pages."""
        return self.memory.num_pages * self.memory.page_bytes

    @property
    def used(self) -> int:
        """Bytes of the pages that are taken."""
        return self.num_used * self.memory.page_bytes

    def find_room(self, num_pages: int) -> HostRoom | None:
        """A place for so many pages, and who must leave it; None if there can be none now.

        Of all windows that could be cleared, the one whose best record is the worst.
        """
        crowded = len(self) >= self.max_records
        first = None if crowded else best_run(self._free, num_pages)
        if first is not None:
            return HostRoom(first, [])
        segments: list[tuple[int, int, HostPlace | None]] = [(*run, None) for run in self._free]
        segments += [(place.first, place.count, place) for place in self._places.values()]
        segments.sort(key=lambda segment: segment[0])
        best: tuple[tuple[float, int], int, HostRoom] | None = None
        for index in range(len(segments)):
            window = self._clear_window(segments, index, num_pages, at_least=int(crowded))
            if window is not None and (best is None or window[:2] < best[:2]):
                best = window
        return None if best is None else best[2]

    def _clear_window(
        self, segments: list[tuple[int, int, HostPlace | None]], index: int, num_pages: int, at_least: int
    ) -> tuple[tuple[float, int], int, HostRoom] | None:
        """The window that begins with a segment: rank of its best record, number of victims, and the room."""
        pages, victims, worst = 0, [], (-1.0, -1)
        for position in range(index, len(segments)):  # a slice would copy the whole list for each window
            _, count, place = segments[position]
            if place is not None:
                if not _may_leave_host(place):
                    return None
                assert place.owner is not None
                victims.append(place.owner)
                worst = max(worst, self.order.rank(place.owner.ref))
            pages += count
            if pages >= num_pages and len(victims) >= at_least:
                return worst, len(victims), HostRoom(segments[index][0], victims)
        return None

    def reserve(self, record: AdapterRecord, first: int) -> list[CopyEvent]:
        """Set pages aside for a record that is going to be read; the copies to wait for before they are written."""
        self._free.take(first, record.num_pages)
        record.place = self._places[first] = HostPlace(first, record.num_pages, record)
        self._draining = [entry for entry in self._draining if not entry[2].query()]
        end = first + record.num_pages
        return [event for start, count, event in self._draining if start < end and first < start + count]

    def abandon(self, record: AdapterRecord) -> None:
        """The read failed. The pages are free as soon as no thread can write to them."""
        place, record.place = record.place, None
        if place is not None:
            place.owner = None
            self._free_if_idle(place)

    def written(self, place: HostPlace) -> None:
        """The thread that filled the place is done with it, for good or ill."""
        place.writing = False
        self._free_if_idle(place)

    def add(self, record: AdapterRecord, weights: Any) -> None:
        """The weights of a record with a reservation have come."""
        record.host = weights
        self._records[record.ref] = record
        self.order.add(record.ref, record.num_pages, record.uncounted)

    def copied(self, record: AdapterRecord, event: CopyEvent | None) -> None:
        """A copy of the record's pages to the device ends with `event`; they must not change before."""
        if event is not None:
            self._events[record.ref] = event

    def remove(self, record: AdapterRecord, evicted: bool = True) -> None:
        record.host = None
        del self._records[record.ref]
        self.order.remove(record.ref, evicted)
        place, event = record.place, self._events.pop(record.ref, None)
        assert place is not None
        if event is not None and not event.query():
            self._draining.append((place.first, place.count, event))
        self.abandon(record)

    def problems(self) -> Iterator[str]:
        """What does not add up; a defect of this program."""
        taken = sum(place.count for place in self._places.values())
        if taken != self.num_used:
            yield f"{self.num_used} host pages are accounted for, {taken} used"
        for place in self._places.values():
            if (place.owner is None and not place.writing) or (
                place.owner is not None and place.owner.place is not place
            ):
                yield f"host page {place.first}"
        if {r.ref for r in self} != {r.ref for r in self if r.host is not None and r.ref in self.order}:
            yield "records on the host"

    def _free_if_idle(self, place: HostPlace) -> None:
        if place.owner is None and not place.writing:
            del self._places[place.first]
            self._free.give(place.first, place.count)


def _may_leave_host(place: HostPlace) -> bool:
    """Nobody would miss it: no request waits for it, except where the device has it too and runs it."""
    record = place.owner
    if record is None or record.host is None or record.pinned == "host":
        return False
    if record.users:
        return not record.retired
    return not record.handles


class DeviceTier(_Tier):
    """Adapters on the device."""

    def __init__(self, arena: DeviceArena, clock: Callable[[], float]) -> None:
        super().__init__()
        self.arena = arena
        self._clock = clock

    @property
    def num_pinned_pages(self) -> int:
        return sum(record.num_pages for record in self if record.pinned == "device")

    def victims(self, num_pages: int, idle_only: bool = False) -> list[AdapterRecord] | None:
        """Records to let go so that an adapter of `num_pages` fits, or None if those in use leave no room.

        First go adapters that no request needs, then (unless `idle_only`) those with a copy on the host, then those
        that must be read anew: among equals in order of eviction.
        """
        now = self._clock()
        idle = [
            record
            for record in (self._records[ref] for ref in self.order)
            if not record.users
            and record.pinned != "device"
            and record.claimed_until <= now
            # Its requests have begun with weights that the source may no longer give.
            and not (record.retired and record.handles and record.host is None)
        ]
        if idle_only:
            idle = [record for record in idle if not record.handles]
        idle.sort(key=lambda record: (bool(record.handles), bool(record.handles) and record.host is None))
        pages, slots = self.arena.num_free_pages, self.arena.max_slots - self.arena.num_used_slots
        victims: list[AdapterRecord] = []
        for record in idle:
            if pages >= num_pages and slots > 0:
                break
            victims.append(record)
            pages += record.num_pages
            slots += 1
        return victims if pages >= num_pages and slots > 0 else None

    def add(self, record: AdapterRecord) -> CopyEvent | None:
        """Copy the host's weights of a record to the device, where there is room; the copy's end, if it goes on."""
        slot = self.arena.allocate(record.rank)
        if slot is None:
            raise RuntimeError(f"the device has no room for adapter {record.ref}, though it was made")
        try:
            event: CopyEvent | None = self.arena.write(slot, record.host)
        except Exception:
            self.arena.free(slot)
            raise
        record.slot = slot
        self._records[record.ref] = record
        self.order.add(record.ref, record.num_pages, len(record.handles))
        return event

    def remove(self, record: AdapterRecord, evicted: bool = True) -> None:
        if record.slot is None or record.users:
            raise RuntimeError(f"adapter {record.ref} is evicted while {record.users} sequences run with it")
        self.arena.free(record.slot)
        record.slot = None
        record.claimed_until = 0.0
        del self._records[record.ref]
        self.order.remove(record.ref, evicted)
