"""Adapters on the device: taken when a sequence starts to run, given back when no launched step can read them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as AbstractSequence
from typing import Protocol

from lorax_backend.scheduler.sequence import Sequence
from lorax_backend.types import AdapterRef


class AdapterRoom(Protocol):
    """What the scheduler needs of an adapter provider; see engine.protocols.AdapterProvider."""

    def is_ready(self, handle: int, ref: AdapterRef) -> bool: ...

    def is_on_device(self, ref: AdapterRef) -> bool: ...

    def cache_key(self, ref: AdapterRef) -> str: ...

    def activate(self, ref: AdapterRef) -> int | None: ...

    def deactivate(self, ref: AdapterRef) -> None: ...

    def fits(self, ref: AdapterRef) -> bool: ...

    def prefetch(self, refs: AbstractSequence[AdapterRef]) -> None: ...

    def release(self, handle: int) -> None: ...


class AdapterLeases:
    """Owns the activations of running sequences, one for each that has an adapter.

    An adapter given back may be overwritten at once, by a copy that does not wait for the steps on the device. So
    what is given back while steps are in flight is held until the last of them has been read.
    """

    def __init__(self, adapters: AdapterRoom) -> None:
        self._adapters = adapters
        self._held: deque[list[tuple[AdapterRef | None, int | None]]] = deque()

    def take(self, seq: Sequence) -> bool:
        """Activate the adapter of `seq` and note its slot; False if there is no room now."""
        if seq.adapter is None:
            return True
        slot = self._adapters.activate(seq.adapter)
        if slot is None:
            return False
        seq.adapter_slot = slot
        return True

    def give_back(self, seq: Sequence, over: bool) -> None:
        """`seq` stops running; `over` says that it will not run again."""
        active = seq.adapter if seq.adapter_slot >= 0 else None
        seq.adapter_slot = -1
        handle = seq.handle if over and seq.adapter is not None else None
        if self._held:
            self._held[-1].append((active, handle))
        else:
            self._settle(active, handle)

    def step_launched(self) -> None:
        self._held.append([])

    def step_done(self) -> None:
        """The oldest launched step has been read."""
        for active, handle in self._held.popleft():
            self._settle(active, handle)

    def step_not_launched(self) -> None:
        """The newest step failed to start; what was to wait for it waits for the one before."""
        orphans = self._held.pop()
        if self._held:
            self._held[-1].extend(orphans)
            return
        for active, handle in orphans:
            self._settle(active, handle)

    def _settle(self, active: AdapterRef | None, handle: int | None) -> None:
        if active is not None:
            self._adapters.deactivate(active)
        if handle is not None:
            self._adapters.release(handle)
