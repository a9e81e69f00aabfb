"""Adapters on a Hugging Face hub, through `huggingface_hub`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import disable_progress_bars, validate_repo_id  # type: ignore[attr-defined]

from lorax_backend.adapters.sources.base import FetchedAdapter
from lorax_backend.adapters.sources.hub_errors import is_transient, retry_after, translate
from lorax_backend.adapters.weight_files import CONFIG_NAME, choose_weight_names
from lorax_backend.errors import (
    AdapterDownloadError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    ValidationError,
)
from lorax_backend.types import AdapterRef

T = TypeVar("T")

_TRUE = ("1", "true", "yes", "on")
_REQUEST_TIMEOUT_S = 10.0
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 8.0
_MAIN = "main"


@dataclass(frozen=True, slots=True)
class HubSource:
    """`adapter_source=hub`: the id is `owner/name` or `owner/name@revision`.

    Only adapter_config.json and the safetensors are downloaded, into the hub's usual cache. A fetch first asks the
    hub whether the token may read the repository, also when the files are cached; only with HF_HUB_OFFLINE=1, when
    nobody can be asked, the cache alone decides. HF_ENDPOINT and HF_HUB_OFFLINE are read at each fetch.

    A request's own token is used if it has one. Otherwise the server's (HF_TOKEN, or HUGGING_FACE_HUB_TOKEN) is used
    if LORAX_USE_GLOBAL_HF_TOKEN=1, and none if not, so that a server's private adapters are private unless it says so.

    Attributes:
        cache_dir: folder of the hub's files; None for Hugging Face's default.
        max_bytes: largest total size of an adapter's files.
        deadline_s: seconds after which a fetch is not tried again.
    """

    cache_dir: str | None = None
    max_bytes: int = 8 << 30
    deadline_s: float = 120.0
    attempts: int = 5
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    name = "hub"
    remote = True

    def __post_init__(self) -> None:
        disable_progress_bars("huggingface_hub.http_get")  # several at once, in a server's log

    def canonical(self, ref: AdapterRef) -> AdapterRef:
        repo, _, inline = ref.id.partition("@")
        if inline and ref.revision and inline != ref.revision:
            raise ValidationError(
                f"adapter_id: {ref.id!r} names another revision than {ref.revision!r}; give one"
            )
        try:
            validate_repo_id(repo)
        except ValueError:
            raise ValidationError(
                f"adapter_id: {repo!r} is not a hub repository such as 'owner/name'"
            ) from None
        return AdapterRef(self.name, repo, inline or ref.revision or None)

    def credential(self, token: str | None) -> str:
        used = _effective_token(token)
        return hashlib.sha256(used.encode()).hexdigest() if used else ""

    def fetch(self, ref: AdapterRef, token: str | None) -> FetchedAdapter:
        ref = self.canonical(ref)
        if _offline():
            return self._from_cache(ref)
        client = _HubClient(self, ref, _effective_token(token))
        info = client.describe()
        names = [CONFIG_NAME, *_weight_names(ref, info)]
        self._check_size(ref, info, names)
        folders = {client.download(name, info.sha).parent for name in names}
        if len(folders) != 1:
            raise AdapterDownloadError(
                f"{ref}: the files of one revision ended in {len(folders)} folders of the cache"
            )
        client.remember_revision(info.sha)
        public = not info.private and not info.gated
        return FetchedAdapter(folders.pop(), info.sha, public)

    def authorize(self, ref: AdapterRef, token: str | None) -> None:
        if not _offline():
            _HubClient(self, self.canonical(ref), _effective_token(token)).describe()

    def _from_cache(self, ref: AdapterRef) -> FetchedAdapter:
        found = try_to_load_from_cache(
            ref.id, CONFIG_NAME, cache_dir=self.cache_dir, revision=ref.revision or _MAIN
        )
        if not isinstance(found, str):
            raise AdapterDownloadError(
                f"{ref} is not in the cache, and HF_HUB_OFFLINE forbids to download it"
            )
        folder = Path(found).parent
        choose_weight_names(entry.name for entry in folder.iterdir())
        return FetchedAdapter(folder, folder.name)

    def _check_size(self, ref: AdapterRef, info: Any, names: list[str]) -> None:
        total = sum(entry.size or 0 for entry in info.siblings if entry.rfilename in names)
        if total > self.max_bytes:
            raise AdapterTooLargeError(
                f"{ref}: its files have {total} bytes, this server takes at most {self.max_bytes}; is it a whole model?"
            )


@dataclass(frozen=True, slots=True)
class _HubClient:
    """The hub's API for one repository and token, with retries and our errors."""

    source: HubSource
    ref: AdapterRef
    token: str | None = field(repr=False)
    started: float = field(default_factory=time.monotonic)

    @property
    def _endpoint(self) -> str | None:
        return os.environ.get("HF_ENDPOINT") or None

    def describe(self) -> Any:
        """The repository's `ModelInfo` at the revision; raises unless the token may read its files."""
        api = HfApi(endpoint=self._endpoint, token=self.token or False, library_name="lorax-triton")
        info = self._try(
            lambda: api.model_info(
                self.ref.id,
                revision=self.ref.revision or _MAIN,
                files_metadata=True,
                timeout=_REQUEST_TIMEOUT_S,
            )
        )
        if info.gated:  # its description is public, its files are not
            url = hf_hub_url(self.ref.id, CONFIG_NAME, revision=info.sha, endpoint=self._endpoint)
            self._try(
                lambda: get_hf_file_metadata(url, token=self.token or False, timeout=_REQUEST_TIMEOUT_S)
            )
        return info

    def download(self, name: str, revision: str) -> Path:
        """One file in the cache, downloaded unless it is there; a partial file is taken up where it ended."""
        return Path(
            self._try(
                lambda: hf_hub_download(
                    self.ref.id,
                    name,
                    revision=revision,
                    cache_dir=self.source.cache_dir,
                    endpoint=self._endpoint,
                    token=self.token or False,
                    etag_timeout=_REQUEST_TIMEOUT_S,
                    library_name="lorax-triton",
                )
            )
        )

    def remember_revision(self, commit: str) -> None:
        """Let the cache know the commit a branch stands for, so that the adapter is found offline later."""
        branch = self.ref.revision or _MAIN
        known = try_to_load_from_cache(
            self.ref.id, CONFIG_NAME, cache_dir=self.source.cache_dir, revision=branch
        )
        if branch != commit and not (isinstance(known, str) and Path(known).parent.name == commit):
            with contextlib.suppress(Exception):  # only a convenience for later
                self.download(CONFIG_NAME, branch)

    def _try(self, call: Callable[[], T]) -> T:
        wait = _FIRST_WAIT_S
        for attempt in range(self.source.attempts):
            try:
                return call()
            except Exception as error:
                pause = retry_after(error) or wait * random.uniform(0.5, 1.0)
                left = self.source.deadline_s - (time.monotonic() - self.started)
                last = attempt + 1 == self.source.attempts
                if last or pause > left or not is_transient(error):
                    raise translate(error, self.ref, with_token=self.token is not None) from None
            self.source.sleep(pause)
            wait = min(wait * 2, _LONGEST_WAIT_S)
        raise AdapterDownloadError(f"{self.ref} was not tried: attempts is {self.source.attempts}")


def _weight_names(ref: AdapterRef, info: Any) -> list[str]:
    names = [entry.rfilename for entry in info.siblings if "/" not in entry.rfilename]
    if CONFIG_NAME not in names:
        raise AdapterNotFoundError(f"{ref} holds no {CONFIG_NAME} at the top, so it is no PEFT adapter")
    return choose_weight_names(names)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE


def _effective_token(token: str | None) -> str | None:
    if token:
        return token
    if os.environ.get("LORAX_USE_GLOBAL_HF_TOKEN", "").lower() in _TRUE:
        return os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or None
    return None
