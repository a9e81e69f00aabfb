"""Downloaded adapters on disk, within a budget of bytes. Standard library only.

The folder holds `<source>/<repository>/snapshots/<revision>/<files>`, which is also how `huggingface_hub` lays out its
cache, so that its downloads can go straight here (its snapshots are links to files in `blobs`). A snapshot's time of
change is its last use: there is no index to corrupt, and a restarted server goes on with the same order. Several
processes may share the folder: who reads or writes in a repository holds a shared lock on it (a file in `.locks`), who
removes something from it an exclusive one, and none removes what another has used in the last minute.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from lorax_backend.adapters.weight_files import CONFIG_NAME
from lorax_backend.errors import AdapterTooLargeError

_ID_FILE = ".adapter_id"
_FOREIGN_USE_S = 60.0
_STALE_S = 86400.0  # a download that broke off is taken up again for a day
_PARTIAL = (".incomplete", ".part")
_REMOVED = ".removed"
_MAX_NAME = 120
_MAX_LOCKS = 256  # each is an open file; leases beyond them rely on the time of use


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
        self._locks = 0
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
        name = (
            f"{quote(adapter_id, safe='')[:_MAX_NAME]}-{hashlib.sha256(adapter_id.encode()).hexdigest()[:12]}"
        )
        return self.folder(source) / name

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
        lock = self._shared(repository)
        try:
            self._evict(lambda: self._used + self._reserved > self.max_bytes)
            if mark is not None:
                repository.mkdir(parents=True, exist_ok=True)
                (repository / _ID_FILE).write_text(mark)
            yield
        finally:
            _close(lock)
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
        weakref.finalize(lease, self._release, entry, self._lease_lock(entry.repository))
        nbytes = _size(folder)
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

    def _evict(self, needed: Any) -> int:
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
                    lock = self._locked(entry.repository, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    kept.append(entry)
                    continue
                try:
                    _remove_snapshot(entry.folder)
                finally:
                    _close(lock)
        finally:
            with self._removed:
                for entry in kept:
                    self._add(entry)
                self._removing.difference_update(entry.repository for entry in victims)
                self._removed.notify_all()
        return sum(entry.nbytes for entry in victims) - sum(entry.nbytes for entry in kept)

    def _release(self, entry: _Entry, lock: IO[str] | None) -> None:
        _close(lock)
        with self._lock:
            entry.leases -= 1
            self._locks -= lock is not None

    def _lease_lock(self, repository: Path) -> IO[str] | None:
        with self._lock:
            if self._locks >= _MAX_LOCKS:
                return None
            self._locks += 1
        lock = self._shared(repository)
        with self._lock:
            self._locks -= lock is None
        return lock

    def _shared(self, repository: Path) -> IO[str] | None:
        """Keep other processes from removing anything in a repository until the file is closed."""
        return self._locked(repository, fcntl.LOCK_SH)

    def _locked(self, repository: Path, mode: int) -> IO[str] | None:
        """The locked file, which stays when it is closed, as it could not be removed without a race; None where there
        are no locks to be had: on a full disk, or in a folder that cannot be written.

        Raises:
            BlockingIOError: somebody else has it locked.
        """
        locks = self.root / ".locks" / "repositories" / repository.parent.name
        file: IO[str] | None = None
        try:
            locks.mkdir(parents=True, exist_ok=True)
            file = (locks / f"{repository.name}.lock").open("a")
            fcntl.flock(file, mode)
        except BlockingIOError:
            _close(file)
            raise
        except OSError:
            _close(file)
            return None
        return file

    def _scan(self) -> None:
        for folder in self.root.glob("*/*/snapshots/*"):
            with contextlib.suppress(OSError):  # another server may have removed it
                if (folder / CONFIG_NAME).exists() and not folder.name.endswith(_REMOVED):
                    source, repository = folder.parts[-4], folder.parent.parent
                    entry = _Entry(
                        source, _adapter_id(repository), folder, _size(folder), folder.stat().st_mtime
                    )
                    self._add(entry)
        for doomed in self.root.glob(f"*/*/snapshots/*{_REMOVED}"):  # whose removal broke off
            shutil.rmtree(doomed, ignore_errors=True)
        for partial in self.root.glob("*/*/*/*"):
            with contextlib.suppress(OSError):
                if partial.name.endswith(_PARTIAL) and time.time() - partial.stat().st_mtime > _STALE_S:
                    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def _close(lock: IO[str] | None) -> None:
    if lock is not None:
        lock.close()


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


def _adapter_id(repository: Path) -> str:
    marker = repository / _ID_FILE
    if marker.exists():
        return marker.read_text()
    return repository.name.removeprefix("models--").replace("--", "/")


def _size(folder: Path) -> int:
    """Bytes of the files that a snapshot holds or links to."""
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                total += entry.stat().st_size if entry.is_file() else 0
    return total


def _remove_snapshot(folder: Path) -> None:
    """Remove a snapshot and the blobs that only it links to; with the last one, the repository."""
    blobs = _linked(folder)
    doomed = folder.with_name(folder.name + _REMOVED)
    shutil.rmtree(doomed, ignore_errors=True)  # an earlier removal may have broken off
    with contextlib.suppress(OSError):
        folder.rename(doomed)  # at once, so that nobody finds half of it
    shutil.rmtree(doomed, ignore_errors=True)
    snapshots = [entry for entry in folder.parent.glob("*") if entry.is_dir()]
    if not snapshots:
        shutil.rmtree(folder.parent.parent, ignore_errors=True)
        return
    for snapshot in snapshots:
        blobs -= _linked(snapshot)
    for blob in blobs:
        blob.unlink(missing_ok=True)


def _linked(folder: Path) -> set[Path]:
    with contextlib.suppress(OSError):
        return {entry.resolve() for entry in folder.iterdir() if entry.is_symlink()}
    return set()
