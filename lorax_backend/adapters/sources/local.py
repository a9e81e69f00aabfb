"""Adapters in folders of the server's file system. Standard library only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lorax_backend.adapters.sources.base import FetchedAdapter
from lorax_backend.adapters.weight_files import CONFIG_NAME
from lorax_backend.errors import AdapterNotFoundError, ValidationError
from lorax_backend.types import AdapterRef


class LocalSource:
    """`adapter_source=local`: the id is a folder, absolute or relative to the server's working directory.

    The folder is only read. Its revision is a digest of adapter_config.json and of the weights' sizes and times of
    change, so that an adapter trained again in the same place is another one once it is loaded again. With `root`
    set, folders outside it are refused: for servers whose callers are not trusted with the whole file system.
    """

    name = "local"
    remote = False

    def __init__(self, root: Path | None = None) -> None:
        self._root = None if root is None else Path(os.path.realpath(root))

    def canonical(self, ref: AdapterRef) -> AdapterRef:
        if ref.revision is not None:
            raise ValidationError(
                f"adapter_id: a local adapter has no revisions, but {ref.revision!r} was given"
            )
        if not ref.id or "\0" in ref.id:
            raise ValidationError("adapter_id: a local adapter needs the path of its folder")
        return AdapterRef(self.name, os.path.abspath(ref.id))

    def credential(self, token: str | None) -> str:
        return ""

    def fetch(self, ref: AdapterRef, token: str | None) -> FetchedAdapter:
        folder = Path(self.canonical(ref).id)
        if self._root is not None and not Path(os.path.realpath(folder)).is_relative_to(self._root):
            raise AdapterNotFoundError(
                f"adapter folder {folder} is outside the folder this server takes adapters from"
            )
        try:
            if not folder.is_dir():
                problem = "is not a folder" if folder.exists() else "does not exist on the server"
                raise AdapterNotFoundError(f"adapter folder {folder} {problem}")
            return FetchedAdapter(folder, _content_digest(folder))
        except FileNotFoundError:
            raise AdapterNotFoundError(f"{folder} holds no {CONFIG_NAME}, so it is no PEFT adapter") from None
        except OSError as error:
            raise AdapterNotFoundError(f"adapter folder {folder} cannot be read: {error.strerror}") from None

    def authorize(self, ref: AdapterRef, token: str | None) -> None:
        return None


def _content_digest(folder: Path) -> str:
    digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes())
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.endswith(".safetensors"):
            info = entry.stat()
            digest.update(f"{entry.name} {info.st_size} {info.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:40]
