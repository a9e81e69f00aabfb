"""What is known of each adapter, and the states it can be in. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from lorax_backend.adapters.permissions import Permissions
from lorax_backend.errors import LoraxError
from lorax_backend.types import AdapterRef

if TYPE_CHECKING:
    from lorax_backend.adapters.tiers import HostPlace


class AdapterStatus(Enum):
    """Where an adapter is. The values are shown to operators."""

    FETCHING = "fetching"  # its files are being downloaded and their headers checked
    FETCHED = "fetched"  # the files are here and fit; the weights wait for room in host memory
    READING = "reading"  # the weights are being read into host memory
    ON_HOST = "on_host"
    ON_DEVICE = "on_device"  # perhaps on the host too
    FAILED = "failed"
    DROPPED = "dropped"  # forgotten; the next request starts anew


_S = AdapterStatus
_TRANSITIONS: dict[AdapterStatus, tuple[AdapterStatus, ...]] = {
    _S.FETCHING: (_S.FETCHED, _S.FAILED, _S.DROPPED),
    _S.FETCHED: (_S.READING, _S.FAILED, _S.DROPPED),
    _S.READING: (_S.ON_HOST, _S.FAILED),
    _S.ON_HOST: (_S.ON_DEVICE, _S.DROPPED),
    _S.ON_DEVICE: (_S.ON_HOST, _S.FETCHING, _S.DROPPED),
    _S.FAILED: (_S.FETCHING, _S.DROPPED),
    _S.DROPPED: (),
}
_TIERS = {
    _S.FETCHING: "remote",
    _S.FETCHED: "disk",
    _S.READING: "disk",
    _S.ON_HOST: "host",
    _S.ON_DEVICE: "device",
}


class LoadedAdapter(Protocol):
    """Weights in host memory."""

    @property
    def rank(self) -> int: ...

    @property
    def num_pages(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class PlannedAdapter(Protocol):
    """Checked files; `load` reads the weights and may take long."""

    @property
    def rank(self) -> int: ...

    @property
    def num_pages(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def load(self, pages: Any) -> Any:
        """The weights, a `LoadedAdapter`, in these pages of host memory."""
        ...


@dataclass(slots=True, eq=False)
class AdapterRecord:
    """One adapter. Only the engine thread reads or writes it.

    Attributes:
        handles: requests that need the adapter now, each with the credential of its token.
        tokens: for each credential in `handles`, the token; kept no longer than the handles.
        unverified: those of `handles` whose right to the adapter is not known yet.
        checking: credentials whose permission is being looked up.
        users: sequences that run with it; `slot` is None unless it is on the device.
        started: a sequence has run with it, so that other weights under the same reference would be a mix.
        host: its weights in host memory, at `place`; None if they are not there.
        plan: its checked files while they wait to be read; `files` keeps them on disk meanwhile.
        pinned: "device" or "host" if it must stay there; "" if not.
        retired: replaced or unloaded: lives only as long as its requests.
        replaces: the record that this one is to replace once it is loaded.
        uncounted: requests that came before it was loaded, to be counted as hits of the tier it comes from.
        claimed_until: time until which a slot just filled is kept for those who asked for it.
    """

    ref: AdapterRef
    status: AdapterStatus = AdapterStatus.FETCHING
    error: str = ""
    handles: dict[int, str] = field(default_factory=dict, repr=False)
    tokens: dict[str, str | None] = field(default_factory=dict, repr=False)
    unverified: set[int] = field(default_factory=set, repr=False)
    permissions: Permissions = field(default_factory=Permissions, repr=False)
    checking: set[str] = field(default_factory=set, repr=False)
    credential: str = field(default="", repr=False)
    ticket: Any = field(default=None, repr=False)
    revision: str = ""
    rank: int = 0
    num_pages: int = 0
    nbytes: int = 0
    plan: PlannedAdapter | None = field(default=None, repr=False)
    files: Any = field(default=None, repr=False)
    place: HostPlace | None = field(default=None, repr=False)
    host: LoadedAdapter | None = field(default=None, repr=False)
    slot: int | None = None
    users: int = 0
    started: bool = False
    pinned: str = ""
    retired: bool = False
    replaces: AdapterRecord | None = field(default=None, repr=False)
    claimed_until: float = 0.0
    load_tier: str = ""
    uncounted: int = 0
    hits: int = 0
    last_used: float = 0.0

    def move(self, status: AdapterStatus, error: str = "") -> None:
        """Change the state.

        Raises:
            RuntimeError: the table of transitions does not have this one; a defect of this program.
        """
        if status not in _TRANSITIONS[self.status]:
            raise RuntimeError(f"adapter {self.ref} cannot go from {self.status.value} to {status.value}")
        self.status = status
        self.error = error

    @property
    def is_loaded(self) -> bool:
        return self.status in (AdapterStatus.ON_HOST, AdapterStatus.ON_DEVICE)

    @property
    def is_wanted(self) -> bool:
        """Somebody needs it, now or for good."""
        return bool(self.handles or self.pinned)

    def attach(self, handle: int, credential: str, token: str | None) -> None:
        self.handles[handle] = credential
        self.tokens[credential] = token

    def detach(self, handle: int) -> None:
        credential = self.handles.pop(handle)
        self.unverified.discard(handle)
        if credential not in self.handles.values():
            del self.tokens[credential]

    def describe(self, now: float) -> dict[str, Any]:
        """Facts for operators; no tokens."""
        return {
            "id": self.ref.id,
            "source": self.ref.source,
            "revision": self.ref.revision,
            "resolved_revision": self.revision or None,
            "status": self.status.value,
            "tier": _TIERS.get(self.status),
            "error": self.error or None,
            "rank": self.rank,
            "pages": self.num_pages,
            "bytes": self.nbytes,
            "on_host": self.host is not None,
            "slot": self.slot,
            "users": self.users,
            "requests": sum(handle >= 0 for handle in self.handles),
            "hits": self.hits,
            "last_used_s": round(now - self.last_used, 3),
            "pinned": self.pinned or None,
            "public": self.permissions.public,
            "retired": self.retired,
        }


class NegativeCache:
    """Failures remembered for a moment, so that a storm of requests for a missing adapter costs one look."""

    def __init__(self, ttl_s: float, max_entries: int, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._max_entries = max_entries
        self._clock = clock
        self._entries: dict[tuple[AdapterRef, str], tuple[float, LoraxError]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, ref: AdapterRef, credential: str, error: LoraxError) -> None:
        self._entries.pop((ref, credential), None)
        self._entries[ref, credential] = (self._clock() + self._ttl_s, error)
        while len(self._entries) > self._max_entries:
            del self._entries[next(iter(self._entries))]

    def forget(self, ref: AdapterRef) -> None:
        """An operator wants it tried again."""
        self._entries = {key: entry for key, entry in self._entries.items() if key[0] != ref}

    def get(self, ref: AdapterRef, credential: str) -> LoraxError | None:
        """The failure, or None if there was none in the last `ttl_s` seconds."""
        now = self._clock()
        while self._entries:
            key, (expiry, _) = next(iter(self._entries.items()))  # oldest first, all live equally long
            if expiry > now:
                break
            del self._entries[key]
        found = self._entries.get((ref, credential))
        return None if found is None else found[1]
