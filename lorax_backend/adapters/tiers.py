"""Room for adapters: host memory by bytes, the device by slots and pages, each with least recently used order.

The tiers answer who would have to go; the caller lets them go. Nothing is evicted for a newcomer that would not fit
even then. Standard library only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol

from lorax_backend.adapters.registry import AdapterRecord
from lorax_backend.types import AdapterRef


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

    def write(self, slot: int, adapter: Any) -> None: ...

    def free(self, slot: int) -> None: ...


class _Recency:
    """Records from the least to the most recently used."""

    def __init__(self) -> None:
        self._records: OrderedDict[AdapterRef, AdapterRecord] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[AdapterRecord]:
        return iter(self._records.values())

    def __contains__(self, record: AdapterRecord) -> bool:
        return self._records.get(record.ref) is record

    def touch(self, record: AdapterRecord) -> None:
        """`record` is used now; ignored if it is not here."""
        if record.ref in self._records:
            self._records.move_to_end(record.ref)

    def _add(self, record: AdapterRecord) -> None:
        self._records[record.ref] = record

    def _remove(self, record: AdapterRecord) -> None:
        del self._records[record.ref]


class HostTier(_Recency):
    """Adapters in host memory. `used` counts those there and those being read; it never exceeds `budget`."""

    def __init__(self, budget: int, max_records: int) -> None:
        super().__init__()
        self.budget = budget
        self.max_records = max_records
        self.used = 0

    def victims(self, nbytes: int) -> list[AdapterRecord] | None:
        """Records to let go so that `nbytes` more fit, or None if that cannot be.

        An adapter that requests need stays, unless it runs on the device, where its weights are safe.
        """
        missing = self.used + nbytes - self.budget
        surplus = len(self) + 1 - self.max_records
        victims: list[AdapterRecord] = []
        for record in self:
            if missing <= 0 and surplus <= 0:
                break
            if not record.handles or record.users:
                victims.append(record)
                missing -= record.nbytes
                surplus -= 1
        return victims if missing <= 0 else None

    def reserve(self, record: AdapterRecord) -> None:
        """Set aside the bytes of a record that is going to be read."""
        record.reserved = record.nbytes
        self.used += record.reserved

    def cancel_reservation(self, record: AdapterRecord) -> None:
        self.used -= record.reserved
        record.reserved = 0

    def add(self, record: AdapterRecord, weights: Any) -> None:
        """The weights of a record with a reservation have come."""
        record.reserved = 0
        record.host = weights
        self._add(record)

    def remove(self, record: AdapterRecord) -> None:
        record.host = None
        self.used -= record.nbytes
        self._remove(record)


class DeviceTier(_Recency):
    """Adapters on the device."""

    def __init__(self, arena: DeviceArena) -> None:
        super().__init__()
        self.arena = arena

    def victims(self, num_pages: int) -> list[AdapterRecord] | None:
        """Records to let go so that an adapter of `num_pages` fits, or None if those in use leave no room.

        First go adapters that no request needs, then those with a copy on the host, then those that must be read
        anew: among equals the least recently used first.
        """
        idle = [record for record in self if not record.users]
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

    def add(self, record: AdapterRecord) -> None:
        """Copy the host's weights of a record to the device; there is room."""
        slot = self.arena.allocate(record.rank)
        if slot is None:
            raise RuntimeError(f"the device has no room for adapter {record.ref}, though it was made")
        try:
            self.arena.write(slot, record.host)
        except Exception:
            self.arena.free(slot)
            raise
        record.slot = slot
        self._add(record)

    def remove(self, record: AdapterRecord) -> None:
        if record.slot is None or record.users:
            raise RuntimeError(f"adapter {record.ref} is evicted while {record.users} sequences run with it")
        self.arena.free(record.slot)
        record.slot = None
        self._remove(record)
