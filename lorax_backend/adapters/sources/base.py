"""What every source of adapters can do. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lorax_backend.types import AdapterRef


@dataclass(frozen=True, slots=True)
class FetchedAdapter:
    """An adapter's files on this machine.

    Attributes:
        folder: holds adapter_config.json and the weights; read-only for us.
        revision: what exactly was fetched: a commit, or a digest of the content. Two fetches with the same
            revision hold the same weights.
        public: True if every caller may use it, whatever its token.
        cached: True if nothing had to be downloaded.
        lease: keeps the folder on disk for as long as somebody refers to this object; None if nothing removes it.
    """

    folder: Path
    revision: str
    public: bool = True
    cached: bool = field(default=False, compare=False)
    lease: Any = field(default=None, compare=False, repr=False)


class DiskTier(Protocol):
    """Downloaded adapters on this machine's disk; `lorax_backend.adapters.disk_cache.DiskCache`."""

    def stats(self) -> dict[str, int]:
        """bytes_total (the budget), bytes_used, entries, evictions."""
        ...

    def entries(self) -> list[dict[str, Any]]:
        """source, id, revision, bytes and last_used (seconds since the epoch) of each adapter on disk."""
        ...

    def purge(self, source: str | None = None, adapter_id: str | None = None) -> int:
        """Remove an adapter's files, or everybody's; the bytes freed. Blocks."""
        ...


class AdapterSource(Protocol):
    """A place adapters come from, chosen by a request's `adapter_source`. Methods may be called from any thread."""

    @property
    def name(self) -> str:
        """The value of `adapter_source`."""
        ...

    @property
    def remote(self) -> bool:
        """True if `fetch` goes over a network, so that it must not hold up sources that do not."""
        ...

    def canonical(self, ref: AdapterRef) -> AdapterRef:
        """The one spelling of a reference; quick, touches neither disk nor network.

        Raises:
            ValidationError: the id or the revision cannot be meant for this source.
        """
        ...

    def credential(self, token: str | None) -> str:
        """A digest of the token a fetch would really use; equal digests have equal rights; '' for no token. It is of
        this process only (see tokens), so that it says nothing to whoever finds it."""
        ...

    def fetch(self, ref: AdapterRef, token: str | None) -> FetchedAdapter:
        """Bring the adapter's files to this machine; blocks. Succeeds only if `token` may read the adapter.

        Raises:
            AdapterNotFoundError: no such adapter, revision or file.
            AdapterUnauthorizedError: the token may not read it.
            AdapterIncompatibleError: weights in a refused format only.
            AdapterTooLargeError: its files are larger than any adapter this server takes.
            AdapterDownloadError: the source cannot be reached or broke off.
        """
        ...

    def authorize(self, ref: AdapterRef, token: str | None) -> bool:
        """Check that `token` may read an adapter that is here already; True if everybody may. Blocks; raises as
        `fetch`, and for an adapter that the token may not read just as for one that does not exist."""
        ...
