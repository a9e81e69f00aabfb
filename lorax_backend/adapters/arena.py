"""The device memory of adapters: one preallocated tensor of pages, and the tables that say whose they are.

An adapter on the device has a slot (a row of the tables) and `pages_for_rank(rank)` pages, next to each other if there
is such a place, so that one copy brings it in. Only the engine thread calls the arena; the runner reads the tables at
each launch.
"""

from __future__ import annotations

import heapq
from bisect import insort

import numpy as np
import numpy.typing as npt
import torch

from lorax_backend.adapters.host_adapter import HostAdapter
from lorax_backend.adapters.page_runs import best_run, runs
from lorax_kernels.layout import PageLayout, pages_for_rank

# A copy up to this size is over before the next step is launched, or nearly: that step waits for it on the device.
_INLINE_COPY_BYTES = 8 << 20


def site_kind(site: str) -> str:
    """The kind of a layout site: 'layers.3.qkv' -> 'qkv', 'lm_head' -> 'lm_head'."""
    return site.rpartition(".")[2]


class LoraArena:
    """Pages of rank 8 for every adapter on the device.

    The tables are numpy arrays on the host, changed in place and always consistent between two calls:

    Attributes:
        pages: [num_pages, layout.page_size] of `dtype` on `device`, zero at first.
        slot_pages: int32 [max_slots, max_pages], page numbers of each slot in rank order, -1 beyond them and in free
            slots.
        slot_ranks: int32 [max_slots], largest true rank of each slot's adapter, 0 in free slots.
        slot_sites: bool [max_slots, number of sites], sites that hold weights, in the order of `layout.sites`.
        slot_kinds: bool [max_slots, len(site_kinds)], the same by kind of site.
        site_kinds: the kinds of site of this model, such as ('qkv', 'o', 'gate_up', 'down', 'lm_head').
    """

    def __init__(
        self,
        layout: PageLayout,
        num_pages: int,
        max_slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_rank: int = 64,
    ) -> None:
        """Allocate `num_pages` pages.

        Raises:
            ValueError: fewer than one page or slot.
        """
        if num_pages < 1 or max_slots < 1 or max_rank < 1:
            found = f"num_pages={num_pages}, max_slots={max_slots}, max_rank={max_rank}"
            raise ValueError(f"adapter arena: {found}: each must be at least 1")
        self.layout = layout
        self.num_pages = num_pages
        self.max_slots = max_slots
        self.dtype = dtype
        self.device = torch.device(device)
        self.pages = torch.zeros(num_pages, layout.page_size, dtype=dtype, device=self.device)
        self.max_pages_per_slot = pages_for_rank(max_rank)
        self.slot_pages: npt.NDArray[np.int32] = np.full(
            (max_slots, self.max_pages_per_slot), -1, dtype=np.int32
        )
        self.slot_ranks: npt.NDArray[np.int32] = np.zeros(max_slots, dtype=np.int32)
        self._site_index = {key: index for index, key in enumerate(layout.sites)}
        self.site_kinds = tuple(dict.fromkeys(site_kind(key) for key in layout.sites))
        self._kind_index = {kind: index for index, kind in enumerate(self.site_kinds)}
        self.slot_sites: npt.NDArray[np.bool_] = np.zeros((max_slots, len(layout.sites)), dtype=np.bool_)
        self.slot_kinds: npt.NDArray[np.bool_] = np.zeros((max_slots, len(self.site_kinds)), dtype=np.bool_)
        self._free_pages = list(range(num_pages))  # ascending
        self._free_slots = list(
            range(max_slots)
        )  # a heap: the lowest first, so that runs of the program repeat
        self._copies: dict[int, torch.cuda.Event] = {}  # by slot, until found done
        self._copy_stream = self._new_stream()
        # The first write must come after the zeroing, every later one after the steps that read freed pages.
        self._pages_idle = (
            torch.cuda.current_stream(self.device).record_event() if self._copy_stream else None
        )

    @property
    def num_free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def num_used_pages(self) -> int:
        return self.num_pages - len(self._free_pages)

    @property
    def num_used_slots(self) -> int:
        return self.max_slots - len(self._free_slots)

    @property
    def nbytes(self) -> int:
        return self.pages.numel() * self.pages.element_size()

    def fits(self, rank: int) -> bool:
        """True if an adapter of this rank could be held by an empty arena."""
        return 0 < pages_for_rank(rank) <= min(self.num_pages, self.max_pages_per_slot)

    def can_allocate(self, rank: int) -> bool:
        """True if `allocate` would succeed now."""
        return self.fits(rank) and bool(self._free_slots) and pages_for_rank(rank) <= len(self._free_pages)

    def allocate(self, rank: int) -> int | None:
        """Take a slot and the pages for an adapter of this rank; None if there is no room now."""
        if not self.can_allocate(rank):
            return None
        slot = heapq.heappop(self._free_slots)
        count = pages_for_rank(rank)
        first = best_run(runs(self._free_pages), count)
        taken = self._free_pages[:count] if first is None else list(range(first, first + count))
        gone = set(taken)
        self._free_pages = [page for page in self._free_pages if page not in gone]
        self.slot_pages[slot, :count] = taken
        self.slot_ranks[slot] = rank
        return slot

    def write(self, slot: int, adapter: HostAdapter) -> torch.cuda.Event | None:
        """Copy an adapter into a slot just allocated for its rank; steps may use it once `is_ready`.

        On CUDA the copy runs on a stream of its own, after the steps that may still read the pages' last owner; the
        host does not wait for it if `adapter.pages` is pinned. The event returned marks its end; until then the pages
        on the host must stay as they are. Elsewhere the copy is made at once, and there is no event.

        Raises:
            ValueError: the slot is free or was allocated for another rank, or the pages are of another layout or
                dtype.
        """
        if self.slot_ranks[slot] == 0 or adapter.rank != self.slot_ranks[slot]:
            raise ValueError(f"slot {slot} is not allocated for an adapter of rank {adapter.rank}")
        numbers = self._pages_of(slot)
        expected = (len(numbers), self.layout.page_size)
        if tuple(adapter.pages.shape) != expected or adapter.pages.dtype != self.dtype:
            found = f"{tuple(adapter.pages.shape)} {adapter.pages.dtype}"
            raise ValueError(f"adapter pages are {found}, the arena needs {expected} {self.dtype}")
        for site in adapter.sites:
            self.slot_sites[slot, self._site_index[site]] = True
            self.slot_kinds[slot, self._kind_index[site_kind(site)]] = True
        if self._copy_stream is None:
            self._copy(numbers, adapter)
            return None
        if self._pages_idle is not None:
            self._copy_stream.wait_event(self._pages_idle)
        with torch.cuda.stream(self._copy_stream):
            self._copy(numbers, adapter)
            event = self._copy_stream.record_event()
        if adapter.nbytes <= _INLINE_COPY_BYTES:
            torch.cuda.current_stream(self.device).wait_event(event)
        else:
            self._copies[slot] = event
        return event

    def is_ready(self, slot: int) -> bool:
        """True if steps launched from now on find the slot's weights whole."""
        event = self._copies.get(slot)
        if event is None:
            return True
        if not event.query():
            return False
        del self._copies[slot]
        return True

    def free(self, slot: int) -> None:
        """Give a slot and its pages back. The caller launches no more steps that use the slot.

        Raises:
            ValueError: the slot is free already.
        """
        if self.slot_ranks[slot] == 0:
            raise ValueError(f"adapter slot {slot} is freed twice")
        for page in self._pages_of(slot):
            insort(self._free_pages, page)
        self._copies.pop(slot, None)  # the next copy comes after it on the same stream
        heapq.heappush(self._free_slots, slot)
        self.slot_pages[slot] = -1
        self.slot_ranks[slot] = 0
        self.slot_sites[slot] = False
        self.slot_kinds[slot] = False
        if self._copy_stream is not None:
            # Steps launched so far may still read these pages; the next write must come after them.
            self._pages_idle = torch.cuda.current_stream(self.device).record_event()

    def slot_has(self, slot: int, kind: str) -> bool:
        """True if the slot's adapter holds weights at any site of this kind; False for unknown kinds."""
        index = self._kind_index.get(kind)
        return index is not None and bool(self.slot_kinds[slot, index])

    def site_mask(self, site: str) -> npt.NDArray[np.bool_]:
        """bool [max_slots], live: which slots hold weights at this site of the layout."""
        return self.slot_sites[:, self._site_index[site]]

    def kind_mask(self, kind: str) -> npt.NDArray[np.bool_]:
        """bool [max_slots], live: which slots hold weights at any site of this kind (one of `site_kinds`)."""
        return self.slot_kinds[:, self._kind_index[kind]]

    def check(self) -> None:
        """Verify that every page is either free or held by exactly one slot.

        Raises:
            AssertionError: accounting is off; a defect of this program.
        """
        held = self.slot_pages[self.slot_pages >= 0].tolist()
        if sorted(held + self._free_pages) != list(range(self.num_pages)):
            raise AssertionError("adapter pages are lost or shared")
        used = {int(slot) for slot in np.flatnonzero(self.slot_ranks)}
        if used & set(self._free_slots) or len(used) + len(self._free_slots) != self.max_slots:
            raise AssertionError("adapter slots are lost or shared")
        for slot in used:
            if len(self._pages_of(slot)) != pages_for_rank(int(self.slot_ranks[slot])):
                raise AssertionError(f"adapter slot {slot} holds the wrong number of pages")

    def _new_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _pages_of(self, slot: int) -> list[int]:
        row = self.slot_pages[slot]
        numbers: list[int] = row[row >= 0].tolist()
        return numbers

    def _copy(self, numbers: list[int], adapter: HostAdapter) -> None:
        done = 0
        for first, count in runs(numbers):
            self.pages[first : first + count].copy_(adapter.pages[done : done + count], non_blocking=True)
            done += count
