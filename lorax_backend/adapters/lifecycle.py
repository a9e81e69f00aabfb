"""The life of adapters from the first request that names one to its eviction. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from lorax_backend.adapters.loading import AdapterLoading, AdapterParts
from lorax_backend.adapters.registry import AdapterRecord, AdapterStatus
from lorax_backend.adapters.tiers import DeviceTier
from lorax_backend.engine.protocols import AdapterFailure
from lorax_backend.errors import ValidationError
from lorax_backend.types import AdapterRef


class AdapterLifecycle:
    """Implements `engine.protocols.AdapterProvider`; the engine thread calls every method.

    An adapter is fetched and read once however many requests wait for it. A failure ends the requests that waited
    and is forgotten, so that the next request tries again; "not found" and "not allowed" are remembered for two
    seconds. Adapters stay on the device and the host until their room is needed, least recently used first out; what
    a running sequence uses is never let go.

    Permission: a source that is asked for an adapter with a token checks that token. While a private adapter is
    known, a request with another token is held back until the source has been asked whether that token may read it,
    and `is_loaded` is False meanwhile for every waiting request of this adapter; running ones go on. A permission once
    given lasts until the adapter is forgotten. A failed check ends only the requests with that token.
    """

    def __init__(self, parts: AdapterParts, clock: Callable[[], float] = time.monotonic) -> None:
        self._loading = AdapterLoading(parts, clock)
        self._device = DeviceTier(parts.arena)
        self._arena = parts.arena

    def resolve(self, ref: AdapterRef) -> AdapterRef:
        """See AdapterProvider; however it is spelled, a reference finds its adapter."""
        return ref

    def acquire(self, handle: int, ref: AdapterRef, api_token: str | None) -> None:
        """See AdapterProvider. A reference that cannot be right ends the request through `poll` as well."""
        record = self._loading.acquire(handle, ref, api_token)
        if record is not None:
            self._device.touch(record)

    def release(self, handle: int) -> None:
        record = self._loading.release(handle)
        if record is not None:
            self._device.touch(record)

    def poll(self) -> list[AdapterFailure]:
        return self._loading.poll()

    def is_loaded(self, ref: AdapterRef) -> bool:
        return self._loaded(ref) is not None

    def is_ready(self, handle: int, ref: AdapterRef) -> bool:
        """See AdapterProvider."""
        return self.is_loaded(ref)

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
        record = self._loaded(ref)
        if record is None:
            return None
        if record.slot is None:
            victims = self._device.victims(record.num_pages)
            if victims is None:
                return None
            for victim in victims:
                self._evict(victim)
            self._device.add(record)
            record.move(AdapterStatus.ON_DEVICE)
        record.users += 1
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

    def fits(self, ref: AdapterRef) -> bool:
        record = self._loading.find(ref)
        return record is None or not record.rank or self._arena.fits(record.rank)

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        """See AdapterProvider. Copies are made when adapters are activated, none before."""

    def control(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """See AdapterProvider.

        Raises:
            ValidationError: always, since there are no commands.
        """
        raise ValidationError(f"command: {command!r} is not known")

    def set_wakeup(self, wakeup: Callable[[], None]) -> None:
        self._loading.wakeup = wakeup

    def stats(self) -> dict[str, int]:
        """See AdapterProvider; besides: on_host, host_bytes_total, host_bytes_used, failed_loads."""
        loading, arena = self._loading, self._arena
        return {
            "pages_total": arena.num_pages,
            "pages_used": arena.num_pages - arena.num_free_pages,
            "on_device": len(self._device),
            "on_host": len(loading.host),
            "host_bytes_total": loading.host.budget,
            "host_bytes_used": loading.host.used,
            "loading": sum(not record.is_loaded for record in loading.records.values()),
            "loads": loading.num_loads,
            "failed_loads": loading.num_failures,
            "evictions": loading.num_evictions,
        }

    def describe(self) -> list[dict[str, Any]]:
        records = self._loading.records.values()
        return [record.describe() for record in sorted(records, key=lambda record: str(record.ref))]

    def close(self) -> None:
        self._loading.close()

    def check(self) -> None:
        """Verify that rooms, records and requests agree.

        Raises:
            RuntimeError: naming what is off; a defect of this program.
        """
        problems = list(self._loading.problems())
        records = self._loading.records.values()
        pages = sum(record.num_pages for record in records if record.slot is not None)
        if pages + self._arena.num_free_pages != self._arena.num_pages:
            problems.append("pages of the device")
        if {r.ref for r in records if r.slot is not None} != {r.ref for r in self._device}:
            problems.append("records on the device")
        if any(record.slot is None for record in records if record.users):
            problems.append("slots of running sequences")
        if problems:
            raise RuntimeError("adapters are not accounted for: " + "; ".join(problems))

    def _loaded(self, ref: AdapterRef) -> AdapterRecord | None:
        record = self._loading.find(ref)
        return record if record is not None and record.is_loaded and not record.unverified else None

    def _touch(self, record: AdapterRecord) -> None:
        self._loading.host.touch(record)
        self._device.touch(record)

    def _evict(self, record: AdapterRecord) -> None:
        """Let go of an adapter on the device that no sequence runs with."""
        self._device.remove(record)
        self._loading.num_evictions += 1
        if record.host is not None:
            record.move(AdapterStatus.ON_HOST)
        elif record.handles:
            record.move(AdapterStatus.FETCHING)
            self._loading.start_fetch(record)
        else:
            self._loading.drop(record)
