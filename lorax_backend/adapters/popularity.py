"""Which adapters are asked for most, known without looking at all of them. Standard library only."""

from __future__ import annotations

from lorax_backend.adapters.registry import AdapterRecord


class MostAsked:
    """The `size` adapters with most requests, of those that are known; a request costs at most `size` looks.

    When one of them is forgotten its place goes to the next that is asked for, so for a moment it may be held by one
    that is less popular than another.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._records: set[AdapterRecord] = set()

    def count(self, record: AdapterRecord) -> None:
        """The record's `hits` have grown."""
        if record in self._records:
            return
        if len(self._records) >= self._size:
            least = min(self._records, key=lambda other: other.hits)
            if record.hits <= least.hits:
                return
            self._records.remove(least)
        self._records.add(record)

    def discard(self, record: AdapterRecord) -> None:
        """The record is forgotten."""
        self._records.discard(record)

    def by_name(self) -> dict[str, int]:
        """Requests by name, most first. Those with none are left out."""
        ranked = sorted(self._records, key=lambda record: (-record.hits, str(record.ref)))
        return {str(record.ref): record.hits for record in ranked if record.hits}
