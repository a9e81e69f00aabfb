"""The life of adapters from the first request that names one to its eviction. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from lorax_backend.adapters.background import COPY
from lorax_backend.adapters.control import AdapterControl
from lorax_backend.adapters.counters import DEVICE
from lorax_backend.adapters.loading import AdapterLoading, AdapterParts
from lorax_backend.adapters.registry import AdapterRecord, AdapterStatus
from lorax_backend.adapters.report import device_problems, tier_stats
from lorax_backend.adapters.tiers import DeviceTier
from lorax_backend.engine.protocols import AdapterFailure
from lorax_backend.errors import LoraxError
from lorax_backend.types import AdapterRef

_CLAIM_S = 1.0  # how long a slot filled for a request is kept for it while others ask for room


class AdapterLifecycle:
    """Implements `engine.protocols.AdapterProvider`; the engine thread calls every method, and none waits.

    An adapter is fetched and read once however many requests wait for it. A failure ends the requests that waited
    and is forgotten, so that the next request tries again; "not found" and "not allowed" are remembered for two
    seconds. Adapters stay on the device and the host until their room is needed (see eviction for who goes first);
    what a running sequence uses, or an operator has pinned, is never let go.

    Permission: every request's token is checked against the source, whose word holds for a while (see permissions),
    before `is_ready` is true for it. One that may not read the adapter gets the error of a missing one, holds up
    nobody, and starts nothing but the question to the source.
    """

    def __init__(self, parts: AdapterParts, clock: Callable[[], float] = time.monotonic) -> None:
        self._loading = AdapterLoading(parts, clock)
        self._device = DeviceTier(parts.arena, clock)
        self._arena = parts.arena
        self._disk = parts.disk
        self._clock = clock
        self._retired: set[AdapterRecord] = set()
        self._control = AdapterControl(self, self._loading, self._device, parts, clock)

    def resolve(self, ref: AdapterRef) -> AdapterRef:
        """The reference under which a request that comes now is to be scheduled: in its one spelling, and of the
        weights that are current. One that cannot be right comes back as it is; `acquire` will refuse it."""
        try:
            return self._loading.references.resolve(ref)
        except LoraxError:
            return ref

    def acquire(self, handle: int, ref: AdapterRef, api_token: str | None) -> None:
        """See AdapterProvider. A reference that cannot be right ends the request through `poll` as well."""
        record = self._loading.acquire(handle, ref, api_token)
        if record is not None:
            self._device.order.hit(record.ref)

    def release(self, handle: int) -> None:
        record = self._loading.release(handle)
        if record is not None:
            self._device.order.touch(record.ref)
            self._settle(record)

    def poll(self) -> list[AdapterFailure]:
        loading = self._loading
        loading.take_in()
        for record in list(self._retired):
            self._settle(record)
        failures = loading.take_failures()
        self._control.take_failures([failure for failure in failures if failure.handle < 0])
        self._control.progress()
        loading.start_reads()
        return [failure for failure in failures if failure.handle >= 0]

    def is_ready(self, handle: int, ref: AdapterRef) -> bool:
        """True if the weights are on the host or the device and this request may use them."""
        record = self._loading.record_of(handle)
        return record is not None and record.is_loaded and handle not in record.unverified

    def is_loaded(self, ref: AdapterRef) -> bool:
        """True if the weights are on the host or the device, and no request for them waits for permission."""
        record = self._loading.find(ref)
        return record is not None and record.is_loaded and not record.unverified

    def is_on_device(self, ref: AdapterRef) -> bool:
        record = self._loading.find(ref)
        return record is not None and record.slot is not None

    def cache_key(self, ref: AdapterRef) -> str:
        """See AdapterProvider.

        Raises:
            KeyError: the adapter is not loaded.
        """
        record = self._loading.find(ref)
        if record is None or not record.is_loaded:
            raise KeyError(ref)
        return f"{record.ref.source}:{record.ref.id}@{record.revision}"

    def activate(self, ref: AdapterRef) -> int | None:
        record = self._loading.find(ref)
        if record is None or not record.is_loaded:
            return None
        if record.slot is None:
            if not self.bring_in(record):
                return None
            record.claimed_until = self._clock() + _CLAIM_S
        assert record.slot is not None
        if not self._arena.is_ready(record.slot):
            return None
        record.users += 1
        record.started = True
        record.claimed_until = 0.0
        self._touch(record)
        return record.slot

    def deactivate(self, ref: AdapterRef) -> None:
        """See AdapterProvider.

        Raises:
            RuntimeError: there was no `activate` to undo; a defect of the caller.
        """
        record = self._loading.find(ref)
        if record is None or not record.users:
            raise RuntimeError(f"adapter {ref} is deactivated more often than activated")
        record.users -= 1
        self._touch(record)
        self._loading.room_changed()
        self._settle(record)

    def prefetch(self, refs: Iterable[AdapterRef]) -> None:
        """Copy adapters that are soon to be activated to the device, as far as only unneeded ones must go for it."""
        for ref in refs:
            record = self._loading.find(ref)
            if record is not None and record.is_loaded and record.slot is None:
                self.bring_in(record, idle_only=True)

    def fits(self, ref: AdapterRef) -> bool:
        record = self._loading.find(ref)
        if record is None or not record.rank:
            return True
        taken = 0 if record.pinned == "device" else self._device.num_pinned_pages
        return self._arena.fits(record.rank) and record.num_pages <= self._arena.num_pages - taken

    def control(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run an operator's command; see `control.AdapterControl`.

        Raises:
            ValidationError: unknown command, or arguments that are missing or wrong.
        """
        return self._control.run(command, arguments)

    def set_wakeup(self, wakeup: Callable[[], None]) -> None:
        self._loading.background.set_wakeup(wakeup)

    def stats(self) -> dict[str, Any]:
        """See `report.tier_stats`."""
        return tier_stats(self._loading, self._device, self._disk)

    def describe(self) -> list[dict[str, Any]]:
        """One dict an adapter: those loaded or loading, those on disk only, and those that lately failed to load."""
        return self._control.rows()

    def close(self) -> None:
        self._loading.close()

    def check(self) -> None:
        """Verify that rooms, records and requests agree.

        Raises:
            RuntimeError: naming what is off; a defect of this program.
        """
        problems = [*self._loading.problems(), *device_problems(self._loading, self._device)]
        if problems:
            raise RuntimeError("adapters are not accounted for: " + "; ".join(problems))

    def bring_in(self, record: AdapterRecord, idle_only: bool = False) -> bool:
        """Start the copy of a loaded adapter to the device; False if there is no room for it."""
        victims = self._device.victims(record.num_pages, idle_only)
        if victims is None or record.host is None:
            return False
        for victim in victims:
            self.evict(victim)
        started = time.monotonic()
        event = self._device.add(record)
        self._loading.counters.loaded(DEVICE, time.monotonic() - started)
        self._loading.host.copied(record, event)
        record.move(AdapterStatus.ON_DEVICE)
        if event is not None and record.slot is not None and not self._arena.is_ready(record.slot):
            # An engine with nothing else to do sleeps until the copy is over.
            self._loading.background.submit(record.ref, COPY, event.synchronize, lambda value, error: None)
        return True

    def evict(self, record: AdapterRecord) -> None:
        """Let go of an adapter on the device that no sequence runs with."""
        self._device.remove(record)
        self._loading.counters.evictions[DEVICE] += 1
        if record.host is not None:
            record.move(AdapterStatus.ON_HOST)
        elif record.handles:
            record.move(AdapterStatus.FETCHING)
            self._loading.start_fetch(record)
        else:
            self._loading.counters.dropped += 1
            self._loading.drop(record)
        self._loading.room_changed()

    def retire(self, record: AdapterRecord) -> None:
        """Let an adapter live only as long as the requests that hold it; new ones get another."""
        record.retired = True
        self._loading.pin(record, "")
        self._retired.add(record)
        self._settle(record)

    def _settle(self, record: AdapterRecord) -> None:
        """Let go of a retired adapter once nobody needs it."""
        if record.status is AdapterStatus.DROPPED:
            self._retired.discard(record)
        elif record.retired and record.is_loaded and not record.handles and not record.users:
            self._retired.discard(record)
            if record.slot is not None:
                self._device.remove(record, evicted=False)
            if record.host is not None:
                self._loading.host.remove(record, evicted=False)
            self._loading.drop(record)
            self._loading.room_changed()

    def _touch(self, record: AdapterRecord) -> None:
        record.last_used = self._clock()
        self._loading.host.order.touch(record.ref)
        self._device.order.touch(record.ref)
