"""Adapters in folders of the server's file system. Standard library only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from lorax_backend.adapters.sources.base import FetchedAdapter
from lorax_backend.adapters.weight_files import CONFIG_NAME, PICKLE_NAME
from lorax_backend.errors import AdapterNotFoundError, AdapterTooLargeError, ValidationError
from lorax_backend.types import AdapterRef

_SAMPLES, _SAMPLE_BYTES = 16, 4096


class LocalSource:
    """`adapter_source=local`: the id is a folder, absolute or relative to the server's working directory.

    The folder is only read. Its revision is a digest of adapter_config.json and, for each file of weights, of its size,
    its times of modification and of change, and samples of its content, so that an adapter trained again in the same
    place is another one once it is loaded again. Nobody can set the time of change, so not even a file of the same
    size and time of modification passes for the old one; where a file system keeps no such time, the samples tell them
    apart. Hashing all of it would take longer than loading it. A file that was only touched counts as a new one, which
    costs a load and no more.

    With `roots`, relative ids are relative to the first of them, and folders outside all of them are told as missing:
    for servers whose callers are not trusted with the whole file system.
    """

    name = "local"
    remote = False

    def __init__(self, roots: tuple[Path, ...] = (), max_bytes: int = 8 << 30) -> None:
        self._base = os.path.abspath(roots[0]) if roots else None
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._max_bytes = max_bytes

    def canonical(self, ref: AdapterRef) -> AdapterRef:
        if ref.revision is not None:
            raise ValidationError(
                f"adapter_id: a local adapter has no revisions, but {ref.revision!r} was given"
            )
        if not ref.id or "\0" in ref.id:
            raise ValidationError("adapter_id: a local adapter needs the path of its folder")
        folder = os.path.join(self._base, ref.id) if self._base else ref.id
        return AdapterRef(self.name, os.path.abspath(folder))

    def credential(self, token: str | None) -> str:
        return ""

    def fetch(self, ref: AdapterRef, token: str | None) -> FetchedAdapter:
        folder = Path(self.canonical(ref).id)
        if not self._is_served(folder):
            raise self._missing(folder)
        try:
            if not folder.is_dir():
                if folder.exists():
                    raise AdapterNotFoundError(f"adapter folder {folder} is not a folder")
                raise self._missing(folder)
            return FetchedAdapter(folder, self._content_digest(folder))
        except FileNotFoundError:
            raise AdapterNotFoundError(f"{folder} holds no {CONFIG_NAME}, so it is no PEFT adapter") from None
        except OSError as error:
            raise AdapterNotFoundError(f"adapter folder {folder} cannot be read: {error.strerror}") from None

    def authorize(self, ref: AdapterRef, token: str | None) -> bool:
        return True

    def _is_served(self, folder: Path) -> bool:
        real = Path(os.path.realpath(folder))
        return not self._roots or any(real.is_relative_to(root) for root in self._roots)

    def _missing(self, folder: Path) -> AdapterNotFoundError:
        """The same words for what is not there and for what is not served, which callers have no right to know."""
        outside = ", or it is outside the folders this server takes adapters from" if self._roots else ""
        return AdapterNotFoundError(f"adapter folder {folder} does not exist on the server{outside}")

    def _content_digest(self, folder: Path) -> str:
        if not self._is_served(folder / CONFIG_NAME):
            raise self._missing(folder / CONFIG_NAME)
        digest, total = hashlib.sha256((folder / CONFIG_NAME).read_bytes()), 0
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.endswith(".safetensors") or entry.name == PICKLE_NAME:
                if not self._is_served(Path(entry.path)):  # a link out of the folder
                    raise self._missing(Path(entry.path))
                info = entry.stat()
                total += info.st_size
                times = f"{info.st_mtime_ns} {info.st_ctime_ns}"
                digest.update(f"{entry.name} {info.st_size} {times}\n".encode())
                _add_samples(digest, Path(entry.path), info.st_size)
        if total > self._max_bytes:
            raise AdapterTooLargeError(
                f"{folder}: its weights have {total} bytes, this server takes at most {self._max_bytes} "
                "(max_adapter_bytes); is it a whole model?"
            )
        return digest.hexdigest()[:40]


def _add_samples(digest: Any, file: Path, size: int) -> None:
    """Add blocks from all over the file, with the first and the last; of a small one everything."""
    with file.open("rb", buffering=0) as content:
        for number in range(_SAMPLES):
            content.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(content.read(_SAMPLE_BYTES))
