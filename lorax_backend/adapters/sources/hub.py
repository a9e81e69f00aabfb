"""Adapters on a Hugging Face hub, through `huggingface_hub`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from filelock import Timeout as FileLockTimeout
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id  # type: ignore[attr-defined]

from lorax_backend.adapters.disk_cache import DiskCache, DiskLease
from lorax_backend.adapters.sources.base import FetchedAdapter
from lorax_backend.adapters.sources.hub_errors import is_disk_full, is_transient, retry_after, translate
from lorax_backend.adapters.sources.hub_parts import REQUEST_TIMEOUT_S, HubParts
from lorax_backend.adapters.sources.retry import Retry
from lorax_backend.adapters.sources.tokens import token_digest
from lorax_backend.adapters.weight_files import CONFIG_NAME, TEMPLATE_NAMES, choose_weight_names
from lorax_backend.errors import (
    AdapterDownloadError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    ValidationError,
)
from lorax_backend.types import AdapterRef

T = TypeVar("T")

_TRUE = ("1", "true", "yes", "on")
_MAIN = "main"
_DOWNLOADS = 3  # of one adapter, when its files vanish meanwhile


@dataclass(frozen=True, slots=True)
class HubSource:
    """`adapter_source=hub`: the id is `owner/name` or `owner/name@revision`.

    Only adapter_config.json and the weights are downloaded. A fetch first asks the hub whether the token may read the
    repository, also when the files are cached; only with HF_HUB_OFFLINE=1, when nobody can be asked, the cache alone
    decides. HF_ENDPOINT and HF_HUB_OFFLINE are read at each fetch.

    A request's own token is used if it has one. Otherwise the server's (HF_TOKEN, or HUGGING_FACE_HUB_TOKEN) is used
    if LORAX_USE_GLOBAL_HF_TOKEN=1, and none if not, so that a server's private adapters are private unless it says so.

    Attributes:
        cache_dir: folder of the hub's files; None for Hugging Face's default.
        disk: the disk cache that `cache_dir` is a part of, if it is; files that are in Hugging Face's own cache
            already are then used where they are.
        max_bytes: largest total size of an adapter's files.
        deadline_s: seconds after which a fetch is not tried again, and a transfer under way ends.
        allow_pickle: take adapter_model.bin where there are no safetensors.
    """

    cache_dir: str | None = None
    max_bytes: int = 8 << 30
    deadline_s: float = 120.0
    attempts: int = 5
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    disk: DiskCache | None = None
    allow_pickle: bool = False

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
                f"adapter_id: {repo!r} is not a hub repository such as 'owner/name'; what lies elsewhere needs its "
                "adapter_source, local for a folder on the server"
            ) from None
        return AdapterRef(self.name, repo, inline or ref.revision or None)

    def credential(self, token: str | None) -> str:
        return token_digest(_effective_token(token))

    def fetch(self, ref: AdapterRef, token: str | None) -> FetchedAdapter:
        ref = self.canonical(ref)
        if _offline():
            return self._from_cache(ref)
        client = _HubClient(self, ref, _effective_token(token))
        info = client.describe()
        sizes = self._sizes(ref, info)
        public = not info.private and not info.gated
        folder = self._cached_folder(ref, info.sha, sizes)
        if folder is not None:
            lease = self._lease(ref, folder)
            if lease is not None or self.disk is None or not folder.is_relative_to(self.disk.root):
                return FetchedAdapter(folder, info.sha, public, True, lease)
        return self._download(client, info.sha, sizes, public)

    def authorize(self, ref: AdapterRef, token: str | None) -> bool:
        if _offline():
            return True
        info = _HubClient(self, self.canonical(ref), _effective_token(token)).describe()
        return not info.private and not info.gated

    def _download(
        self, client: _HubClient, commit: str, sizes: dict[str, int], public: bool
    ) -> FetchedAdapter:
        with contextlib.ExitStack() as stack:
            if self.disk is not None:
                repository = self.disk.folder(self.name) / f"models--{client.ref.id.replace('/', '--')}"
                stack.enter_context(self.disk.writing(repository, sum(sizes.values())))
            for _ in range(_DOWNLOADS):
                folders = {client.download(name, commit, size).parent for name, size in sizes.items()}
                if len(folders) != 1:
                    raise AdapterDownloadError(
                        f"{client.ref}: the files of one revision ended in {len(folders)} folders of the cache"
                    )
                client.remember_revision(commit)
                folder = folders.pop()
                lease = self._lease(client.ref, folder)
                if all((folder / name).exists() for name in sizes):
                    return FetchedAdapter(folder, commit, public, False, lease)
        raise AdapterDownloadError(f"{client.ref}: somebody removes its files as they come to the disk cache")

    def _lease(self, ref: AdapterRef, folder: Path) -> DiskLease | None:
        if self.disk is None or not folder.is_relative_to(self.disk.root):
            return None
        return self.disk.lease(self.name, ref.id, folder)

    def _cached_folder(self, ref: AdapterRef, commit: str, sizes: dict[str, int]) -> Path | None:
        """The folder that holds all files in full, if there is one."""
        for cache in [self.cache_dir] if self.disk is None else [self.cache_dir, None]:
            found = [try_to_load_from_cache(ref.id, name, cache_dir=cache, revision=commit) for name in sizes]
            files = [Path(path) for path in found if isinstance(path, str)]
            with contextlib.suppress(FileNotFoundError):  # it has just left the cache
                if len(files) == len(sizes) and all(
                    not sizes[file.name] or file.stat().st_size == sizes[file.name] for file in files
                ):
                    return files[0].parent
        return None

    def _from_cache(self, ref: AdapterRef) -> FetchedAdapter:
        for cache in [self.cache_dir] if self.disk is None else [self.cache_dir, None]:
            found = try_to_load_from_cache(
                ref.id, CONFIG_NAME, cache_dir=cache, revision=ref.revision or _MAIN
            )
            if isinstance(found, str):
                folder = Path(found).parent
                choose_weight_names((entry.name for entry in folder.iterdir()), self.allow_pickle)
                return FetchedAdapter(folder, folder.name, True, True, self._lease(ref, folder))
        raise AdapterDownloadError(f"{ref} is not in the cache, and HF_HUB_OFFLINE forbids to download it")

    def _sizes(self, ref: AdapterRef, info: Any) -> dict[str, int]:
        """Bytes of each file of the adapter."""
        known = {entry.rfilename: entry.size or 0 for entry in info.siblings if "/" not in entry.rfilename}
        if CONFIG_NAME not in known:
            raise AdapterNotFoundError(f"{ref} holds no {CONFIG_NAME} at the top, so it is no PEFT adapter")
        names = [CONFIG_NAME, *choose_weight_names(known, self.allow_pickle)]
        names += [name for name in TEMPLATE_NAMES if name in known]
        total = sum(known[name] for name in names)
        if total > self.max_bytes:
            raise AdapterTooLargeError(
                f"{ref}: its files have {total} bytes, this server takes at most {self.max_bytes} "
                "(max_adapter_bytes); is it a whole model?"
            )
        return {name: known[name] for name in names}


@dataclass(frozen=True, slots=True)
class _HubClient:
    """The hub's API for one repository and token, with retries and our errors."""

    source: HubSource
    ref: AdapterRef
    token: str | None = field(repr=False)
    started: float = field(default_factory=time.monotonic)
    endpoint: str | None = field(default_factory=lambda: os.environ.get("HF_ENDPOINT") or None)

    def describe(self) -> Any:
        """The repository's `ModelInfo` at the revision; raises unless the token may read its files."""
        api = HfApi(endpoint=self.endpoint, token=self.token or False, library_name="lorax-triton")
        info = self._try(
            lambda: api.model_info(
                self.ref.id,
                revision=self.ref.revision or _MAIN,
                files_metadata=True,
                timeout=REQUEST_TIMEOUT_S,
            )
        )
        if info.gated:  # its description is public, its files are not
            url = hf_hub_url(self.ref.id, CONFIG_NAME, revision=info.sha, endpoint=self.endpoint)
            self._try(lambda: get_hf_file_metadata(url, token=self.token or False, timeout=REQUEST_TIMEOUT_S))
        return info

    def download(self, name: str, revision: str, size: int = 0) -> Path:
        """One file in the cache, downloaded unless it is there; a partial file is taken up where it ended, one of
        another size than `size` is downloaded anew."""

        def work() -> Path:
            try:
                self._parts().bring(name, revision, size)
            except FileLockTimeout:
                raise AdapterDownloadError(
                    f"{self.ref}: somebody else's download of it does not end"
                ) from None
            path = hf_hub_download(
                self.ref.id,
                name,
                revision=revision,
                cache_dir=self.source.cache_dir,
                endpoint=self.endpoint,
                token=self.token or False,
                etag_timeout=REQUEST_TIMEOUT_S,
                library_name="lorax-triton",
            )
            return Path(path)

        return self._try(work)

    def remember_revision(self, commit: str) -> None:
        """Let the cache know the commit a branch stands for, so that the adapter is found offline later."""
        branch = self.ref.revision or _MAIN
        known = try_to_load_from_cache(
            self.ref.id, CONFIG_NAME, cache_dir=self.source.cache_dir, revision=branch
        )
        if branch != commit and not (isinstance(known, str) and Path(known).parent.name == commit):
            with contextlib.suppress(Exception):  # only a convenience for later
                self.download(CONFIG_NAME, branch)

    def _parts(self) -> HubParts:
        source = self.source
        return HubParts(
            self.ref.id,
            Path(source.cache_dir or constants.HF_HUB_CACHE),
            self.endpoint,
            self.token,
            self.started,
            source.deadline_s,
            source.sleep,
        )

    def _try(self, call: Callable[[], T]) -> T:
        source = self.source
        retry = Retry(source.attempts, source.deadline_s, source.sleep)
        return retry.call(
            call,
            self.started,
            self._may_try_again,
            lambda error: translate(error, self.ref, with_token=self.token is not None),
            retry_after,
        )

    def _may_try_again(self, error: Exception) -> bool:
        if is_disk_full(error) and self.source.disk is not None:
            return self.source.disk.shrink() > 0
        return is_transient(error)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE


def _effective_token(token: str | None) -> str | None:
    if token:
        return token
    if os.environ.get("LORAX_USE_GLOBAL_HF_TOKEN", "").lower() in _TRUE:
        return os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or None
    return None
