"""Downloaded adapters on disk, within a budget of bytes. Standard library only.

A snapshot's time of change is its last use: there is no index to corrupt, and a restarted server goes on with the same
order. Several processes may share the folder (see disk_locks), and none removes what another has used in the last
minute. How it looks inside is in disk_files.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_backend.adapters import disk_files
from lorax_backend.adapters.disk_locks import Lock, RepositoryLocks, release
from lorax_backend.adapters.weight_files import CONFIG_NAME
from lorax_backend.errors import AdapterTooLargeError

_FOREIGN_USE_S = 60.0


@dataclass(slots=True, eq=False)
class _Entry:
    source: str
    adapter_id: str
    folder: Path
    nbytes: int
    last_used: float
    leases: int = 0

    @property
    def repository(self) -> Path:
        return self.folder.parent.parent


class DiskLease:
    """Keeps one adapter's files on disk while it is referred to."""


class DiskCache:
    """Least recently used adapters leave first; those being written or read stay. Any thread may call it."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        """Look at what is there, and remove what broke off long ago.

        Raises:
            ValueError: the folder cannot be made.
        """
        self.root = root
        self.max_bytes = max_bytes
        # A lease may end in the middle of anything, also of what holds the lock.
        self._lock = threading.RLock()
        self._removed = threading.Condition(self._lock)
        self._entries: dict[Path, _Entry] = {}
        self._writing: dict[Path, int] = {}
        self._removing: set[Path] = set()
        self._used = 0  # bytes of all entries
        self._last_use_ms = 0
        self._locks = RepositoryLocks(root, self._lock)
        self._reserved = 0
        self._evictions = 0
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"adapter_disk_cache: {root} cannot be made: {error.strerror}") from error
        self._scan()

    def folder(self, source: str) -> Path:
        """Where a source keeps its repositories."""
        return self.root / source

    def repository(self, source: str, adapter_id: str) -> Path:
        """Where an adapter of a source that has no layout of its own is written; `writing` makes and marks it."""
        return self.folder(source) / disk_files.repository_name(adapter_id)

    @contextlib.contextmanager
    def writing(self, repository: Path, nbytes: int, mark: str | None = None) -> Iterator[None]:
        """Make room for a download of so many bytes into a repository, which nobody removes meanwhile.

        `mark` is the adapter's id, to be found after a restart where the folder's name does not tell it.

        Raises:
            AdapterTooLargeError: it exceeds the whole budget.
        """
        if nbytes > self.max_bytes:
            raise AdapterTooLargeError(
                f"the adapter's files have {nbytes} bytes, this server's disk cache holds {self.max_bytes} "
                "(adapter_disk_bytes)"
            )
        with self._removed:
            self._removed.wait_for(lambda: repository not in self._removing)
            self._reserved += nbytes
            self._writing[repository] = self._writing.get(repository, 0) + 1
        lock = self._locks.shared(repository)
        try:
            self._evict(lambda: self._used + self._reserved > self.max_bytes)
            if mark is not None:
                disk_files.mark(repository, mark)
            yield
        finally:
            release(lock)
            with self._lock:
                self._reserved -= nbytes
                self._writing[repository] -= 1
                if not self._writing[repository]:
                    del self._writing[repository]

    def lease(self, source: str, adapter_id: str, folder: Path) -> DiskLease | None:
        """Note a use of the adapter in `folder` and keep it; None if it has just been removed."""
        with self._removed:
            # Its files are still there while they are on their way out, and would vanish under the reader.
            self._removed.wait_for(lambda: folder.parent.parent not in self._removing)
            entry = self._entries.get(folder)
            if entry is None:
                entry = self._entries[folder] = _Entry(source, adapter_id, folder, 0, 0.0)
            self._last_use_ms = max(int(time.time() * 1000), self._last_use_ms + 1)  # no two at once
            entry.last_used = self._last_use_ms / 1000
            entry.leases += 1
        lease = DiskLease()
        weakref.finalize(lease, self._release, entry, self._locks.lease(entry.repository))
        nbytes = disk_files.size_of(folder)
        with self._lock:
            if self._entries.get(folder) is entry:
                self._used += nbytes - entry.nbytes
            entry.nbytes = nbytes
        with contextlib.suppress(OSError):
            os.utime(folder, (entry.last_used, entry.last_used))
        if not (folder / CONFIG_NAME).exists():
            with self._lock:
                self._drop(entry)
            return None
        return lease

    def shrink(self) -> int:
        """The disk is full before the budget is: remove a quarter of what is there; the bytes freed."""
        with self._lock:
            before = self._used
        return self._evict(lambda: self._used > before * 3 // 4)

    def purge(self, source: str | None = None, adapter_id: str | None = None) -> int:
        """Remove an adapter's files, or everybody's; the bytes freed. What is being read stays."""
        with self._lock:
            victims = [
                entry
                for entry in self._entries.values()
                if entry.source == (source or entry.source)
                and entry.adapter_id == (adapter_id or entry.adapter_id)
            ]
            victims = [entry for entry in victims if self._is_free(entry)]
            self._forget(victims)
        return self._remove(victims)

    def stats(self) -> dict[str, int]:
        """For the engine's thread, which waits for nobody: without the lock, since each number is read at once."""
        return {
            "bytes_total": self.max_bytes,
            "bytes_used": self._used,
            "entries": len(self._entries),
            "evictions": self._evictions,
        }

    def entries(self) -> list[dict[str, Any]]:
        """source, id, revision, bytes and last_used (seconds since the epoch), most recently used first."""
        with self._lock:
            entries = sorted(self._entries.values(), key=lambda entry: -entry.last_used)
        return [
            {
                "source": entry.source,
                "id": entry.adapter_id,
                "revision": entry.folder.name,
                "bytes": entry.nbytes,
                "last_used": entry.last_used,
            }
            for entry in entries
        ]

    def _add(self, entry: _Entry) -> None:
        """With the lock held, as `_drop`."""
        self._drop(self._entries.get(entry.folder))
        self._entries[entry.folder] = entry
        self._used += entry.nbytes

    def _drop(self, entry: _Entry | None) -> None:
        if entry is not None and self._entries.get(entry.folder) is entry:
            del self._entries[entry.folder]
            self._used -= entry.nbytes

    def _is_free(self, entry: _Entry) -> bool:
        return not (entry.leases or entry.repository in self._writing or entry.repository in self._removing)

    def _evict(self, needed: Callable[[], bool]) -> int:
        victims: list[_Entry] = []
        with self._lock:
            candidates = sorted(
                filter(self._is_free, self._entries.values()), key=lambda entry: entry.last_used
            )
            for entry in candidates:
                if not needed():
                    break
                if _used_elsewhere(entry):
                    continue
                self._drop(entry)  # `needed` counts what is left
                victims.append(entry)
            self._forget(victims)
            self._evictions += len(victims)
        return self._remove(victims)

    def _forget(self, victims: list[_Entry]) -> None:
        """With the lock held: `_remove` will follow, and until then nobody may read or write in their repositories."""
        for entry in victims:
            self._drop(entry)
            self._removing.add(entry.repository)

    def _remove(self, victims: list[_Entry]) -> int:
        """Delete what was forgotten, without the lock, since a file system may take its time; the bytes freed. What
        another process reads or writes just now stays, and is known again."""
        kept: list[_Entry] = []
        try:
            for entry in victims:
                try:
                    lock = self._locks.exclusive(entry.repository)
                except BlockingIOError:
                    kept.append(entry)
                    continue
                try:
                    disk_files.remove_snapshot(entry.folder)
                finally:
                    release(lock)
        finally:
            with self._removed:
                for entry in kept:
                    self._add(entry)
                self._removing.difference_update(entry.repository for entry in victims)
                self._removed.notify_all()
        return sum(entry.nbytes for entry in victims) - sum(entry.nbytes for entry in kept)

    def _release(self, entry: _Entry, lock: Lock) -> None:
        self._locks.end_lease(lock)
        with self._lock:
            entry.leases -= 1

    def _scan(self) -> None:
        for folder in disk_files.snapshots(self.root):
            repository = folder.parent.parent
            with contextlib.suppress(OSError):  # another server may have removed it
                adapter_id, nbytes = disk_files.adapter_id_of(repository), disk_files.size_of(folder)
                source, used = repository.parent.name, folder.stat().st_mtime
                self._add(_Entry(source, adapter_id, folder, nbytes, used))
        disk_files.remove_leftovers(self.root)


def _used_elsewhere(entry: _Entry) -> bool:
    """True if another process has just used it; takes over its time of use."""
    try:
        used = entry.folder.stat().st_mtime
    except OSError:
        return False
    if abs(used - entry.last_used) < 0.002:
        return False
    entry.last_used = used
    return time.time() - used < _FOREIGN_USE_S
