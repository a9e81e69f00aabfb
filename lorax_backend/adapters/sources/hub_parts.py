"""Downloads from a hub that broke off are taken up where they ended, also by another process.

`huggingface_hub` writes each try into a file of its own and throws it away. Here the bytes go to a file named after
the content, in the cache's own folder; when it is whole it gets the names under which `huggingface_hub` finds it.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from lorax_backend.adapters.sources.hub_body import append

_PART = ".part"
_PAUSE_S = 1.0
_COMMIT = re.compile("[0-9a-f]{40}")
REQUEST_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class HubParts:
    """Brings files of one repository to the cache.

    Attributes:
        cache: folder of the hub's files.
        endpoint: None for Hugging Face's.
        started: the `time.monotonic()` from which `limit_s` seconds count for all files together.
    """

    repo_id: str
    cache: Path
    endpoint: str | None
    token: str | None = field(repr=False)
    started: float
    limit_s: float
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def bring(self, name: str, revision: str, size: int) -> None:
        """Bring a file to the cache, unless it is there; `hf_hub_download` then has no more to transfer.

        Blocks while another process downloads it. `size` is the file's in bytes, 0 if it is not known; one of another
        size in the cache is replaced.

        Raises:
            OutOfTimeError: it did not end in its time; the next try goes on where it stopped.
            OSError: it broke off, or could not be stored.
            filelock.Timeout: somebody else's download of it does not end.
        """
        cached = try_to_load_from_cache(self.repo_id, name, cache_dir=self.cache, revision=revision)
        if isinstance(cached, str) and size in (0, _size(Path(cached))):
            return
        url = hf_hub_url(self.repo_id, name, revision=revision, endpoint=self.endpoint)
        facts = get_hf_file_metadata(url, token=self.token or False, timeout=REQUEST_TIMEOUT_S)
        size, etag = facts.size or size, facts.etag
        if not etag or not size or os.path.basename(etag) != etag or etag.startswith("."):
            return
        folder = repo_folder_name(repo_id=self.repo_id, repo_type="model")
        repository, locks = self.cache / folder, self.cache / ".locks" / folder
        blob = repository / "blobs" / etag
        part = blob.with_name(blob.name + _PART)
        blob.parent.mkdir(parents=True, exist_ok=True)
        locks.mkdir(parents=True, exist_ok=True)
        left = max(0.0, self.limit_s - (time.monotonic() - self.started))
        with FileLock(locks / f"{part.name}.lock", left):
            if _size(blob) != size:
                # The content may lie at another host, whose business the token is not.
                elsewhere = urlsplit(facts.location).netloc != urlsplit(url).netloc
                self._transfer(facts.location, False if elsewhere else self.token or False, part, size)
                part.replace(blob)
            if _COMMIT.fullmatch(revision):
                _link(repository / "snapshots" / revision / name, blob)

    def _transfer(self, url: str, token: str | bool, part: Path, size: int) -> None:
        """Make `part` whole. What breaks off goes on at once as long as each try brings something."""
        headers = build_hf_headers(token=token, library_name="lorax-triton")
        if _size(part) > size:
            part.unlink()
        while (have := _size(part)) < size:
            try:
                append(url, headers, part, self.started, self.limit_s)
                break
            except TransportError:
                if _size(part) <= have:
                    raise
            self.sleep(_PAUSE_S)
        if _size(part) != size:
            part.unlink()  # it cannot be the beginning of the right one
            raise OSError("the file is longer or shorter than announced")


def _size(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _link(pointer: Path, blob: Path) -> None:
    """Name a blob as `huggingface_hub` does, which spares it to ask for the file again."""
    with contextlib.suppress(OSError):  # it copies where there are no links
        pointer.parent.mkdir(parents=True, exist_ok=True)
        if _size(pointer) != _size(blob):
            pointer.unlink(missing_ok=True)
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
