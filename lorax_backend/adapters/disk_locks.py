"""Locks on repositories of the disk cache among the processes that share its folder. Standard library only.

Who reads or writes in a repository holds a shared lock on it, who removes something from it an exclusive one. A lock is
an open file in `.locks`, gone with its process; the file stays, as it could not be removed without a race.
"""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import IO

_MAX_LEASED = 256  # each is an open file; leases beyond them rely on the time of use

Lock = IO[str] | None


class RepositoryLocks:
    """Gives out locks. None stands for a lock that is not to be had: on a full disk, or in a folder that cannot be
    written. Any thread may call it, also a destructor."""

    def __init__(self, root: Path, lock: threading.RLock) -> None:
        """`lock` is the one of the cache: a lease may end in the middle of what holds it, and a second lock taken there
        could be waited for in circles."""
        self._root = root / ".locks" / "repositories"
        self._lock = lock
        self.num_leased = 0

    def shared(self, repository: Path) -> Lock:
        """Keep other processes from removing anything in a repository until `release`."""
        return self._locked(repository, fcntl.LOCK_SH)

    def exclusive(self, repository: Path) -> Lock:
        """Keep other processes from reading and writing there until `release`.

        Raises:
            BlockingIOError: one does just now.
        """
        return self._locked(repository, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def lease(self, repository: Path) -> Lock:
        """`shared` for as long as an adapter is referred to, unless very many are; give it back to `end_lease`."""
        with self._lock:
            if self.num_leased >= _MAX_LEASED:
                return None
            self.num_leased += 1
        lock = self.shared(repository)
        with self._lock:
            self.num_leased -= lock is None
        return lock

    def end_lease(self, lock: Lock) -> None:
        """Give back what `lease` gave."""
        release(lock)
        with self._lock:
            self.num_leased -= lock is not None

    def _locked(self, repository: Path, mode: int) -> Lock:
        locks = self._root / repository.parent.name
        file: Lock = None
        try:
            locks.mkdir(parents=True, exist_ok=True)
            file = (locks / f"{repository.name}.lock").open("a")
            fcntl.flock(file, mode)
        except BlockingIOError:
            release(file)
            raise
        except OSError:
            release(file)
            return None
        return file


def release(lock: Lock) -> None:
    """Let others have what `lock` keeps."""
    if lock is not None:
        lock.close()
