"""Who may read an adapter, for how long that is known, and the asking. Standard library only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorax_backend.adapters.background import PERMISSION, Background
from lorax_backend.adapters.counters import AdapterCounters
from lorax_backend.adapters.sources.base import AdapterSource
from lorax_backend.errors import AdapterDownloadError, AdapterError

if TYPE_CHECKING:
    from lorax_backend.adapters.registry import AdapterRecord

_MAX_GRANTS = 4096
_MAX_OUTAGE_S = 3600.0  # a source that cannot be reached takes no permission back for this long

EndRequests = Callable[["AdapterRecord", AdapterError, set[int]], None]


@dataclass(slots=True)
class Permissions:
    """When a source last said that a credential may read an adapter, or that everybody may."""

    granted: dict[str, float] = field(default_factory=dict, repr=False)
    public_at: float | None = None

    @property
    def public(self) -> bool:
        return self.public_at is not None

    def age(self, credential: str, now: float) -> float | None:
        """Seconds since the source let this credential in; None if it never has."""
        times = [time for time in (self.granted.get(credential), self.public_at) if time is not None]
        return now - max(times) if times else None

    def grant(self, credential: str, public: bool, now: float) -> None:
        self.public_at = now if public else None
        self.granted.pop(credential, None)
        self.granted[credential] = now
        while len(self.granted) > _MAX_GRANTS:
            del self.granted[next(iter(self.granted))]

    def revoke(self, credential: str) -> None:
        """The source refused the credential, so it lets in not everybody either."""
        self.public_at = None
        self.granted.pop(credential, None)


class Authorization:
    """Checks every request's right to its adapter, whether the weights are here already or not.

    A source's word holds `ttl_s` seconds. In the second half of that time the next request has it renewed without
    waiting, so that requests for an adapter in steady use never wait. A right taken away ends no request that was let
    in; it keeps out the next.
    """

    def __init__(
        self,
        sources: Mapping[str, AdapterSource],
        background: Background,
        counters: AdapterCounters,
        ttl_s: float,
        clock: Callable[[], float],
        end_requests: EndRequests,
    ) -> None:
        self._sources = sources
        self._background = background
        self._counters = counters
        self._ttl_s = ttl_s
        self._clock = clock
        self._end_requests = end_requests

    def admit(self, record: AdapterRecord, handle: int) -> None:
        """Let a request use an adapter whose files are here, at once or when the source has said so."""
        if record.permissions.public and not self._sources[record.ref.source].remote:
            return  # a folder on our own disk does not become private, and to ask costs a change of threads
        credential = record.handles[handle]
        age = record.permissions.age(credential, self._clock())
        if age is None or age >= self._ttl_s:
            record.unverified.add(handle)
        if age is None or age >= self._ttl_s / 2:
            self._ask(record, credential)

    def fetched(self, record: AdapterRecord, public: bool) -> None:
        """The source has given the files to `record.credential`; the other waiting requests are still to be checked."""
        now = self._clock()
        record.permissions.grant(record.credential, public, now)
        self._let_in(record, record.credential)
        for credential in {record.handles[handle] for handle in record.unverified}:
            age = record.permissions.age(credential, now)
            if age is not None and age < self._ttl_s:
                self._let_in(record, credential)
            else:
                self._ask(record, credential)

    def _ask(self, record: AdapterRecord, credential: str) -> None:
        if credential in record.checking:
            return
        record.checking.add(credential)
        self._counters.auth_checks += 1
        source = self._sources[record.ref.source]
        work = functools.partial(source.authorize, record.ref, record.tokens[credential])
        done = functools.partial(self._on_checked, record, credential)
        self._background.submit(record.ref, PERMISSION, work, done)

    def _on_checked(
        self, record: AdapterRecord, credential: str, public: bool | None, error: AdapterError | None
    ) -> None:
        record.checking.discard(credential)
        now, permissions = self._clock(), record.permissions
        age = permissions.age(credential, now)
        if error is None:
            permissions.grant(credential, bool(public), now)
            self._let_in(record, credential)
            for other in {record.handles[handle] for handle in record.unverified}:
                self._ask(record, other)
        elif isinstance(error, AdapterDownloadError) and age is not None and age < _MAX_OUTAGE_S:
            self._let_in(record, credential)
        else:
            self._counters.auth_denials += not isinstance(error, AdapterDownloadError)
            permissions.revoke(credential)
            waiting = {h for h in record.unverified if record.handles[h] == credential}
            self._end_requests(record, error, waiting)

    @staticmethod
    def _let_in(record: AdapterRecord, credential: str) -> None:
        if record.permissions.public:
            record.unverified.clear()
        else:
            record.unverified = {h for h in record.unverified if record.handles[h] != credential}
