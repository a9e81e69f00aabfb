"""From a request that names an adapter to its weights in host memory. Standard library only.

The engine thread calls every method; the work runs on the loader's threads (see background).
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorax_backend.adapters.background import DOWNLOAD, READ, Background
from lorax_backend.adapters.counters import DEVICE, DISK, HOST, REMOTE, AdapterCounters
from lorax_backend.adapters.loader import Loader
from lorax_backend.adapters.permissions import Authorization
from lorax_backend.adapters.popularity import MostAsked
from lorax_backend.adapters.references import References
from lorax_backend.adapters.registry import AdapterRecord, AdapterStatus, NegativeCache, PlannedAdapter
from lorax_backend.adapters.sources.base import AdapterSource, DiskTier
from lorax_backend.adapters.tiers import DeviceArena, HostPages, HostPlace, HostTier
from lorax_backend.engine.protocols import AdapterFailure
from lorax_backend.errors import (
    AdapterDownloadError,
    AdapterError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    AdapterUnauthorizedError,
    LoraxError,
)
from lorax_backend.types import AdapterRef

_NEGATIVE_TTL_S = 2.0
_MAX_NEGATIVE = 4096
_MAX_ON_HOST = 8192
MAX_NAMED = 64  # adapters named in one list of a report, so that none grows with the number of adapters


@dataclass(frozen=True, slots=True)
class AdapterParts:
    """What the life of adapters is made of. `inspect` checks a folder and plans its reading; it runs on loader
    threads, as do the sources' methods and the plans' `load`. `disk` is None where nothing is downloaded."""

    sources: Mapping[str, AdapterSource]
    inspect: Callable[[Path], PlannedAdapter]
    arena: DeviceArena
    memory: HostPages
    loader: Loader
    load_timeout_s: float
    auth_ttl_s: float = 300.0
    disk: DiskTier | None = None
    default_source: str = "hub"


class AdapterLoading:
    """Owns the records of adapters, the requests that need them, and host memory."""

    def __init__(self, parts: AdapterParts, clock: Callable[[], float]) -> None:
        self.records: dict[AdapterRef, AdapterRecord] = {}
        self.pinned: set[AdapterRecord] = set()
        self.most_asked = MostAsked(MAX_NAMED)
        self.host = HostTier(parts.memory, _MAX_ON_HOST)
        self.counters = AdapterCounters()
        self.references = References(parts.sources)
        self.background = Background(parts.loader, parts.load_timeout_s)
        self.recent = NegativeCache(_NEGATIVE_TTL_S, _MAX_NEGATIVE, clock)
        self._parts = parts
        self._clock = clock
        self._authorization = Authorization(
            parts.sources, self.background, self.counters, parts.auth_ttl_s, clock, self._end_requests
        )
        self._handles: dict[int, AdapterRecord] = {}
        self._awaiting_room: deque[AdapterRecord] = deque()
        self._room_changed = False
        self._failures: list[AdapterFailure] = []

    def find(self, ref: AdapterRef) -> AdapterRecord | None:
        """The record of an adapter, if it is known, however the reference is spelled; of exactly its generation, or
        of the current one if it has none of its own."""
        try:
            record = self.records.get(self.references.exact(ref))
            return record if record is not None else self.records.get(self.references.resolve(ref))
        except LoraxError:
            return None

    def record_of(self, handle: int) -> AdapterRecord | None:
        """The record that a request holds."""
        return self._handles.get(handle)

    def acquire(
        self, handle: int, ref: AdapterRef, token: str | None, replaces: AdapterRecord | None = None
    ) -> AdapterRecord | None:
        """Note that a request needs the adapter, and start what has to be done; None if it fails at once."""
        known: LoraxError | None = None
        try:
            key = self.references.resolve(ref)
            credential = self._source(key).credential(token)
            known = self.recent.get(self.references.base(key), credential)
        except LoraxError as error:
            known = error
        if known is not None:
            self._failures.append(AdapterFailure(handle, known))
            self.background.wakeup()
            return None
        record = self.records.get(key)
        is_new = record is None
        if record is None:
            record = self.records[key] = AdapterRecord(key, replaces=replaces)
        record.attach(handle, credential, token)
        self._handles[handle] = record
        self._count(record, handle)
        if is_new:
            self.start_fetch(record)
        elif record.status in (AdapterStatus.FETCHING, AdapterStatus.FAILED):
            record.unverified.add(handle)
        else:
            self._authorization.admit(record, handle)
        return record

    def release(self, handle: int) -> AdapterRecord | None:
        """The request is over; the record it held, if any."""
        record = self._handles.pop(handle, None)
        if record is None:
            return None
        verified = handle not in record.unverified
        record.detach(handle)
        if not record.handles:
            record.claimed_until = 0.0
        self.host.order.touch(record.ref)
        self.room_changed()
        fetching = record.status is AdapterStatus.FETCHING
        if fetching and not record.is_wanted and self.background.cancel(record.ticket):
            self.drop(record)
        elif self._awaiting_room or not verified:
            self.background.wakeup()  # others may go on now
        return record

    def take_in(self) -> None:
        """Take in what the loader's threads finished."""
        if self.background.run_finished():
            self.room_changed()

    def take_failures(self) -> list[AdapterFailure]:
        """The requests that have failed since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def pin(self, record: AdapterRecord, tier: str) -> None:
        """Let an adapter stay in a tier until told otherwise; "" lets it go."""
        record.pinned = tier
        if tier:
            self.pinned.add(record)
        else:
            self.pinned.discard(record)

    def waiting(self) -> list[AdapterRecord]:
        """Up to MAX_NAMED adapters that requests need and no sequence runs with; longest waited for first."""
        found: dict[AdapterRecord, None] = {}
        for handle, record in self._handles.items():
            if handle >= 0 and not record.users:
                found[record] = None
                if len(found) == MAX_NAMED:
                    break
        return list(found)

    def room_changed(self) -> None:
        """Somebody who waits for host memory may find room now."""
        self._room_changed = True

    def evict(self, record: AdapterRecord) -> None:
        """Let go of an adapter's weights on the host, and of the adapter if it is not on the device."""
        self.host.remove(record)
        self.counters.evictions[HOST] += 1
        self.room_changed()
        if record.slot is None:
            self.counters.dropped += 1
            self.drop(record)

    def drop(self, record: AdapterRecord) -> None:
        """Forget an adapter that nobody needs."""
        record.move(AdapterStatus.DROPPED)
        record.plan = record.files = record.replaces = None
        del self.records[record.ref]
        self.pinned.discard(record)
        self.most_asked.discard(record)
        self.references.forget(record.ref, self.records)

    def close(self) -> None:
        self.background.close()
        self.records.clear()
        self.pinned.clear()
        self._handles.clear()
        self._awaiting_room.clear()

    def problems(self) -> Iterable[str]:
        """What does not add up, if anything; a defect of this program."""
        records = self.records.values()
        yield from self.host.problems()
        if {r.ref for r in records if r.host is not None} != {r.ref for r in self.host}:
            yield "records on the host"
        if {h: r.ref for r in records for h in r.handles} != {h: r.ref for h, r in self._handles.items()}:
            yield "requests"
        if any(not record.unverified <= set(record.handles) for record in records):
            yield "requests to be verified"
        if self.pinned != {record for record in records if record.pinned}:
            yield "pinned adapters"

    def start_fetch(self, record: AdapterRecord) -> None:
        """Bring the files of an adapter that requests need to this machine, with the token of one of them."""
        record.credential = next(iter(record.handles.values()))
        record.unverified.update(record.handles)
        source, inspect, remote = (
            self._source(record.ref),
            self._parts.inspect,
            self._source(record.ref).remote,
        )
        token = record.tokens[record.credential]
        # Weights that requests have begun with are asked for by their revision, where the source can give it.
        revision = record.revision if record.revision and remote else record.ref.revision
        ref = replace(record.ref, generation=0, revision=revision or None)

        def work() -> Any:
            started = time.monotonic()
            fetched = source.fetch(ref, token)
            seconds = time.monotonic() - started
            plan = inspect(fetched.folder)
            if not remote and source.fetch(ref, token).revision != fetched.revision:
                raise AdapterDownloadError(f"{record.ref} changed while it was looked at; try again")
            return fetched, plan, seconds

        done = functools.partial(self._on_fetched, record)
        record.ticket = self.background.submit(record.ref, DOWNLOAD if remote else READ, work, done)

    def _on_fetched(self, record: AdapterRecord, value: Any, error: AdapterError | None) -> None:
        if error is not None:
            self._fail(record, error)
            return
        fetched, plan, seconds = value
        if record.started and record.handles and fetched.revision != record.revision:
            changed = "changed at its source while requests ran with it; send them again"
            self._fail(record, AdapterDownloadError(f"{record.ref} {changed}"))
            return
        record.plan, record.files, record.revision = plan, fetched.lease, fetched.revision
        record.rank, record.num_pages, record.nbytes = plan.rank, plan.num_pages, plan.nbytes
        downloaded = self._source(record.ref).remote and not fetched.cached
        record.load_tier = REMOTE if downloaded else DISK
        if downloaded:
            self.counters.loaded(DISK, seconds)
        record.move(AdapterStatus.FETCHED)
        self._authorization.fetched(record, fetched.public)
        too_large = self._too_large(plan)
        if too_large:
            self._fail(record, AdapterTooLargeError(f"{record.ref} takes {too_large}"))
        else:
            self._awaiting_room.append(record)

    def _too_large(self, plan: PlannedAdapter) -> str:
        if not self._parts.arena.fits(plan.rank):
            held = f"this server's device holds {self._parts.arena.num_pages} (adapter_pages)"
            return f"{plan.num_pages} pages of rank 8, {held}"
        if plan.num_pages > self._parts.memory.num_pages:
            held = f"this server's host memory for adapters is {self.host.budget} (adapter_host_bytes)"
            return f"{plan.nbytes} bytes, {held}"
        return ""

    def start_reads(self) -> None:
        """Begin reading fetched adapters for which the host has room. One that is too big now holds up no other."""
        if not self._room_changed:
            return
        self._room_changed = False
        refused = self._parts.memory.num_pages + 1  # whoever needs that many pages finds none either
        for _ in range(len(self._awaiting_room)):
            record = self._awaiting_room.popleft()
            if not record.is_wanted:
                self.drop(record)
                continue
            room = self.host.find_room(record.num_pages) if record.num_pages < refused else None
            if room is None or record.plan is None:
                refused = min(refused, record.num_pages)
                self._awaiting_room.append(record)
                continue
            for victim in room.victims:
                self.evict(victim)
            self._read(record, record.plan, room.first)

    def _read(self, record: AdapterRecord, plan: PlannedAdapter, first: int) -> None:
        copies = self.host.reserve(record, first)
        pages, place, files = self._parts.memory.pages(first, record.num_pages), record.place, record.files
        assert place is not None
        record.move(AdapterStatus.READING)

        def work() -> Any:
            try:
                for copy in copies:
                    copy.synchronize()
                started = time.monotonic()
                weights = plan.load(pages)
                del held[:]
                return weights, time.monotonic() - started
            finally:  # also long after the work was given up: only now are the pages nobody's
                self.background.post(functools.partial(self._on_written, place))

        held = [files]  # the disk tier keeps the files until they are read
        self.background.submit(record.ref, READ, work, functools.partial(self._on_read, record))

    def _on_written(self, place: HostPlace) -> None:
        self.host.written(place)
        self.room_changed()

    def _on_read(self, record: AdapterRecord, value: Any, error: AdapterError | None) -> None:
        record.plan = record.files = None
        if error is not None:
            self.host.abandon(record)
            self._fail(record, error)
            return
        weights, seconds = value
        self.host.add(record, weights)
        record.move(AdapterStatus.ON_HOST)
        self.counters.loaded(HOST, seconds)
        self.counters.hits[record.load_tier] += record.uncounted
        record.uncounted = 0

    def _count(self, record: AdapterRecord, handle: int) -> None:
        record.last_used = self._clock()
        if handle < 0:
            return
        record.hits += 1
        self.most_asked.count(record)
        self.host.order.hit(record.ref)
        if record.is_loaded:
            self.counters.hits[HOST if record.slot is None else DEVICE] += 1
        else:
            record.uncounted += 1

    def _fail(self, record: AdapterRecord, error: AdapterError) -> None:
        """End the requests this failure concerns. Whether a token may read an adapter, or what is wrong with a private
        one, is no other token's business: requests with other tokens get a fetch of their own."""
        self.counters.failed_loads += 1
        record.uncounted = 0
        record.move(AdapterStatus.FAILED, error.message)
        record.plan = record.files = None
        public = record.permissions.public
        if public or isinstance(error, AdapterDownloadError):
            concerned = set(record.handles)
        else:
            trusted = set(record.permissions.granted) | {record.credential}
            concerned = {h for h, credential in record.handles.items() if credential in trusted}
        self._end_requests(record, error, concerned)
        if record.handles:
            record.move(AdapterStatus.FETCHING)
            self.start_fetch(record)
        else:
            self.drop(record)

    def _end_requests(self, record: AdapterRecord, error: AdapterError, handles: set[int]) -> None:
        if isinstance(error, AdapterNotFoundError | AdapterUnauthorizedError):
            for credential in {record.handles[handle] for handle in handles}:
                self.recent.add(self.references.base(record.ref), credential, error)
        for handle in sorted(handles):
            record.detach(handle)
            del self._handles[handle]
            self._failures.append(AdapterFailure(handle, error))

    def _source(self, ref: AdapterRef) -> AdapterSource:
        return self._parts.sources[ref.source]
