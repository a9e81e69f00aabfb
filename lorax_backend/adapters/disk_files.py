"""The files of downloaded adapters: `<source>/<repository>/snapshots/<revision>/<files>`. Standard library only.

This is also how `huggingface_hub` lays out its cache, so that its downloads can go straight there; its snapshots are
links to files in `blobs`, which they may share.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from lorax_backend.adapters.weight_files import CONFIG_NAME

_ID_FILE = ".adapter_id"
_STALE_S = 86400.0  # a download that broke off is taken up again for a day
_PARTIAL = (".incomplete", ".part")
_REMOVED = ".removed"
_MAX_NAME = 120


def repository_name(adapter_id: str) -> str:
    """The folder's name for an adapter of a source that has no layout of its own."""
    return f"{quote(adapter_id, safe='')[:_MAX_NAME]}-{hashlib.sha256(adapter_id.encode()).hexdigest()[:12]}"


def mark(repository: Path, adapter_id: str) -> None:
    """Make a repository that tells its adapter's id, where its name does not."""
    repository.mkdir(parents=True, exist_ok=True)
    (repository / _ID_FILE).write_text(adapter_id)


def adapter_id_of(repository: Path) -> str:
    """The adapter's id, by the repository's mark or its name."""
    marker = repository / _ID_FILE
    if marker.exists():
        return marker.read_text()
    return repository.name.removeprefix("models--").replace("--", "/")


def snapshots(root: Path) -> Iterator[Path]:
    """The folders that hold an adapter, and can be read."""
    for folder in root.glob("*/*/snapshots/*"):
        with contextlib.suppress(OSError):
            if (folder / CONFIG_NAME).exists() and not folder.name.endswith(_REMOVED):
                yield folder


def size_of(snapshot: Path) -> int:
    """Bytes of the files that a snapshot holds or links to."""
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(snapshot):
            with contextlib.suppress(OSError):
                total += entry.stat().st_size if entry.is_file() else 0
    return total


def remove_snapshot(folder: Path) -> None:
    """Remove a snapshot and the blobs that only it links to; with the last one, the repository."""
    blobs = _linked(folder)
    doomed = folder.with_name(folder.name + _REMOVED)
    shutil.rmtree(doomed, ignore_errors=True)  # an earlier removal may have broken off
    with contextlib.suppress(OSError):
        folder.rename(doomed)  # at once, so that nobody finds half of it
    shutil.rmtree(doomed, ignore_errors=True)
    left = [entry for entry in folder.parent.glob("*") if entry.is_dir()]
    if not left:
        shutil.rmtree(folder.parent.parent, ignore_errors=True)
        return
    for snapshot in left:
        blobs -= _linked(snapshot)
    for blob in blobs:
        blob.unlink(missing_ok=True)


def remove_leftovers(root: Path) -> None:
    """Remove what removals that broke off have left, and downloads that broke off long ago."""
    for doomed in root.glob(f"*/*/snapshots/*{_REMOVED}"):
        shutil.rmtree(doomed, ignore_errors=True)
    for partial in root.glob("*/*/*/*"):
        with contextlib.suppress(OSError):  # another server may have removed it
            if partial.name.endswith(_PARTIAL) and time.time() - partial.stat().st_mtime > _STALE_S:
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def _linked(folder: Path) -> set[Path]:
    with contextlib.suppress(OSError):
        return {entry.resolve() for entry in folder.iterdir() if entry.is_symlink()}
    return set()
