"""From a request that names an adapter to its weights in host memory. Standard library only.

The engine thread calls every method. Threads of the loader only put what they finished into a queue, which `poll`
empties, so that there is one writer and no lock.
"""

from __future__ import annotations

import functools
import logging
import queue
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_backend.adapters.loader import Loader, LoadTimeoutError
from lorax_backend.adapters.registry import AdapterRecord, AdapterStatus, NegativeCache, PlannedAdapter
from lorax_backend.adapters.sources.base import AdapterSource
from lorax_backend.adapters.tiers import DeviceArena, HostTier
from lorax_backend.engine.protocols import AdapterFailure
from lorax_backend.errors import (
    AdapterDownloadError,
    AdapterError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    AdapterUnauthorizedError,
    LoraxError,
    ValidationError,
)
from lorax_backend.types import AdapterRef

_log = logging.getLogger(__name__)

DOWNLOAD, READ, PERMISSION = "download", "read", "permission"

_PERMISSION_TIMEOUT_S = 30.0
_NEGATIVE_TTL_S = 2.0
_MAX_NEGATIVE = 4096
_MAX_ON_HOST = 8192
_MAX_AUTHORIZED = 4096
_CANONICAL_ENTRIES = 8192

_Then = Callable[[Any, AdapterError | None], None]


@dataclass(frozen=True, slots=True)
class AdapterParts:
    """What the life of adapters is made of. `inspect` checks a folder and plans its reading; it runs on loader
    threads, as do the sources' methods and the plans' `load`."""

    sources: Mapping[str, AdapterSource]
    inspect: Callable[[Path], PlannedAdapter]
    arena: DeviceArena
    loader: Loader
    host_bytes: int
    load_timeout_s: float


class AdapterLoading:
    """Owns the records of adapters, the requests that need them, and host memory."""

    def __init__(self, parts: AdapterParts, clock: Callable[[], float]) -> None:
        self.records: dict[AdapterRef, AdapterRecord] = {}
        self.host = HostTier(parts.host_bytes, _MAX_ON_HOST)
        self.wakeup: Callable[[], None] = lambda: None
        self.num_loads = 0
        self.num_failures = 0
        self.num_evictions = 0
        self._parts = parts
        self._handles: dict[int, AdapterRecord] = {}
        self._recent = NegativeCache(_NEGATIVE_TTL_S, _MAX_NEGATIVE, clock)
        self._canonical = functools.lru_cache(_CANONICAL_ENTRIES)(self._find_canonical)
        self._awaiting_room: deque[AdapterRecord] = deque()
        self._results: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._failures: list[AdapterFailure] = []

    def find(self, ref: AdapterRef) -> AdapterRecord | None:
        """The record of an adapter, if it is known, however the reference is spelled."""
        try:
            return self.records.get(self._canonical(ref))
        except LoraxError:
            return None

    def acquire(self, handle: int, ref: AdapterRef, token: str | None) -> AdapterRecord | None:
        """Note that a request needs the adapter, and start what has to be done; None if it fails at once."""
        known: LoraxError | None = None
        try:
            key = self._canonical(ref)
            credential = self._source(key).credential(token)
            known = self._recent.get(key, credential)
        except LoraxError as error:
            known = error
        if known is not None:
            self._failures.append(AdapterFailure(handle, known))
            self.wakeup()
            return None
        record = self.records.get(key)
        is_new = record is None
        if record is None:
            record = self.records[key] = AdapterRecord(key)
        record.attach(handle, credential, token)
        self._handles[handle] = record
        if is_new:
            self.start_fetch(record)
        else:
            self.host.touch(record)
            self._check_permissions(record)
        return record

    def release(self, handle: int) -> AdapterRecord | None:
        """The request is over; the record it held, if any."""
        record = self._handles.pop(handle, None)
        if record is None:
            return None
        verified = record.may_use(record.handles[handle])
        record.detach(handle)
        self.host.touch(record)
        fetching = record.status is AdapterStatus.FETCHING
        if fetching and not record.handles and self._parts.loader.cancel(record.ticket):
            self.drop(record)
        elif self._awaiting_room or not verified:
            self.wakeup()  # others may go on now
        return record

    def poll(self) -> list[AdapterFailure]:
        """Take in what the loader's threads finished; the requests that have failed since the last call."""
        while True:
            try:
                handler = self._results.get_nowait()
            except queue.Empty:
                break
            handler()
        self._start_reads()
        failures, self._failures = self._failures, []
        return failures

    def evict(self, record: AdapterRecord) -> None:
        """Let go of an adapter's weights on the host, and of the adapter if it is not on the device."""
        self.host.remove(record)
        if record.slot is None:
            self.num_evictions += 1
            self.drop(record)

    def drop(self, record: AdapterRecord) -> None:
        """Forget an adapter that nobody needs."""
        record.move(AdapterStatus.DROPPED)
        del self.records[record.ref]

    def close(self) -> None:
        self._parts.loader.close()
        self.records.clear()
        self._handles.clear()
        self._awaiting_room.clear()

    def problems(self) -> Iterable[str]:
        """What does not add up, if anything; a defect of this program."""
        records = self.records.values()
        used = sum(record.reserved + (record.nbytes if record.host is not None else 0) for record in records)
        if not used == self.host.used <= self.host.budget:
            yield f"{self.host.used} bytes of host memory are accounted for, {used} used"
        if {r.ref for r in records if r.host is not None} != {r.ref for r in self.host}:
            yield "records on the host"
        if {h: r.ref for r in records for h in r.handles} != {h: r.ref for h, r in self._handles.items()}:
            yield "requests"

    def start_fetch(self, record: AdapterRecord) -> None:
        """Bring the files of an adapter that requests need to this machine, with the token of one of them."""
        record.credential = next(iter(record.handles.values()))
        source, token, inspect = (
            self._source(record.ref),
            record.tokens[record.credential],
            self._parts.inspect,
        )

        def work() -> Any:
            fetched = source.fetch(record.ref, token)
            return fetched, inspect(fetched.folder)

        lane = DOWNLOAD if source.remote else READ
        record.ticket = self._submit(record, lane, work, functools.partial(self._on_fetched, record))

    def _on_fetched(self, record: AdapterRecord, value: Any, error: AdapterError | None) -> None:
        if error is not None:
            self._fail(record, error)
            return
        fetched, plan = value
        record.plan, record.revision, record.public = plan, fetched.revision, fetched.public
        record.authorized.add(record.credential)
        record.rank, record.num_pages, record.nbytes = plan.rank, plan.num_pages, plan.nbytes
        record.move(AdapterStatus.FETCHED)
        if not self._parts.arena.fits(plan.rank):
            held = f"this server's device holds {self._parts.arena.num_pages} (adapter_pages)"
            self._fail(
                record, AdapterTooLargeError(f"{record.ref} takes {plan.num_pages} pages of rank 8, {held}")
            )
        elif plan.nbytes > self.host.budget:
            held = f"this server's host memory for adapters is {self.host.budget} (adapter_host_bytes)"
            self._fail(record, AdapterTooLargeError(f"{record.ref} takes {plan.nbytes} bytes, {held}"))
        else:
            self._awaiting_room.append(record)
            self._check_permissions(record)

    def _start_reads(self) -> None:
        """Begin reading fetched adapters for which the host has room. One that is too big now holds up no other."""
        for _ in range(len(self._awaiting_room)):
            record = self._awaiting_room.popleft()
            if not record.handles:
                self.drop(record)
                continue
            victims = self.host.victims(record.nbytes)
            if victims is None or record.plan is None:
                self._awaiting_room.append(record)
                continue
            for victim in victims:
                self.evict(victim)
            self.host.reserve(record)
            record.move(AdapterStatus.READING)
            self._submit(record, READ, record.plan.load, functools.partial(self._on_read, record))

    def _on_read(self, record: AdapterRecord, weights: Any, error: AdapterError | None) -> None:
        record.plan = None
        if error is not None:
            self.host.cancel_reservation(record)
            self._fail(record, error)
            return
        self.host.add(record, weights)
        record.move(AdapterStatus.ON_HOST)
        self.num_loads += 1

    def _check_permissions(self, record: AdapterRecord) -> None:
        """Ask the source about tokens it has not been asked about yet; only once the adapter is known to be private."""
        if record.status in (AdapterStatus.FETCHING, AdapterStatus.FAILED):
            return
        source = self._source(record.ref)
        for credential in record.unverified - record.checking:
            record.checking.add(credential)
            self._submit(
                record,
                PERMISSION,
                functools.partial(source.authorize, record.ref, record.tokens[credential]),
                functools.partial(self._on_checked, record, credential),
            )

    def _on_checked(self, record: AdapterRecord, credential: str, _: Any, error: AdapterError | None) -> None:
        record.checking.discard(credential)
        if error is None:
            if len(record.authorized) >= _MAX_AUTHORIZED:
                record.authorized &= set(record.handles.values())
            record.authorized.add(credential)
        elif self.records.get(record.ref) is record:
            self._end_requests(record, error, {credential})

    def _fail(self, record: AdapterRecord, error: AdapterError) -> None:
        """End the requests this failure concerns. Whether a token may read an adapter, or what is wrong with a private
        one, is no other token's business: requests with other tokens get a fetch of their own."""
        self.num_failures += 1
        record.move(AdapterStatus.FAILED, error.message)
        record.plan = None
        everyone = record.public or isinstance(error, AdapterDownloadError)
        concerned = set(record.handles.values()) if everyone else record.authorized | {record.credential}
        self._end_requests(record, error, concerned)
        if record.handles:
            record.move(AdapterStatus.FETCHING)
            self.start_fetch(record)
        else:
            self.drop(record)

    def _end_requests(self, record: AdapterRecord, error: AdapterError, credentials: set[str]) -> None:
        if isinstance(error, AdapterNotFoundError | AdapterUnauthorizedError):
            for credential in credentials & set(record.handles.values()):
                self._recent.add(record.ref, credential, error)
        for handle in [handle for handle, credential in record.handles.items() if credential in credentials]:
            record.detach(handle)
            del self._handles[handle]
            self._failures.append(AdapterFailure(handle, error))

    def _find_canonical(self, ref: AdapterRef) -> AdapterRef:
        source = self._parts.sources.get(ref.source.lower())
        if source is None:
            known = ", ".join(sorted(self._parts.sources))
            raise ValidationError(f"adapter_source: {ref.source!r} is not known to this server, only {known}")
        return source.canonical(ref)

    def _source(self, ref: AdapterRef) -> AdapterSource:
        return self._parts.sources[ref.source]

    def _submit(self, record: AdapterRecord, lane: str, work: Callable[[], Any], then: _Then) -> Any:
        """Give work to the loader's threads; `poll` calls `then(value, error)` when it is done."""

        def done(value: Any, error: Exception | None) -> None:
            told = None if error is None else _as_adapter_error(record.ref, error)
            self._results.put(functools.partial(then, value, told))
            self.wakeup()

        timeout_s = self._parts.load_timeout_s
        if lane == PERMISSION:
            timeout_s = min(timeout_s, _PERMISSION_TIMEOUT_S)
        return self._parts.loader.submit(lane, work, timeout_s, done)


def _as_adapter_error(ref: AdapterRef, error: Exception) -> AdapterError:
    """What to tell the requests, and the log. Runs on a loader thread."""
    if isinstance(error, AdapterError):
        told = error
    elif isinstance(error, LoadTimeoutError):
        told = AdapterDownloadError(f"{ref}: loading it {error}; try again later")
    else:
        _log.error("unexpected failure of adapter %s", ref, exc_info=error)
        told = AdapterError(f"{ref} could not be loaded ({type(error).__name__}); the server's log says more")
    _log.warning("adapter %s: %s", ref, told.message)
    # The traceback holds frames, and they hold weights.
    return told.with_traceback(None)
