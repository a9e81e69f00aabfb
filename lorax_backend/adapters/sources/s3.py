"""Adapters in S3 buckets, and in what speaks S3's protocol, through boto3 (extra `s3`)."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from filelock import Timeout as FileLockTimeout

from lorax_backend.adapters.disk_cache import DiskCache
from lorax_backend.adapters.sources.base import FetchedAdapter
from lorax_backend.adapters.sources.retry import Retry
from lorax_backend.adapters.sources.s3_body import pieces
from lorax_backend.adapters.sources.s3_errors import (
    ShortReadError,
    is_beginning,
    is_damaged,
    is_disk_full,
    is_transient,
    translate,
)
from lorax_backend.adapters.weight_files import CONFIG_NAME, TEMPLATE_NAMES, choose_weight_names
from lorax_backend.errors import (
    AdapterDownloadError,
    AdapterError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    UnsupportedError,
    ValidationError,
)
from lorax_backend.types import AdapterRef

_TIMEOUT_S = 10.0
_SCHEME = "s3://"
_REVISION = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class _Object:
    """A file of an adapter, as the bucket lists it."""

    key: str
    name: str
    size: int
    etag: str


class S3Source:
    """`adapter_source=s3`: `s3://bucket/prefix`, `bucket/prefix`, or with PREDIBASE_MODEL_BUCKET just the prefix there
    (below PREDIBASE_MODEL_FOLDER, if that is set).

    The adapter is what lies directly under the prefix and a slash. Its revision is a digest of its files' ETags; one
    given in a request must be the present one or still be in the disk cache. The server's credentials are used for
    everybody (AWS_ACCESS_KEY_ID and the rest of boto3's ways), so whatever they may read is public to all callers.
    Another endpoint than Amazon's is named by S3_ENDPOINT_URL, R2_ACCOUNT_ID (Cloudflare) or AWS_ENDPOINT_URL_S3, in
    this order.
    """

    name = "s3"
    remote = True

    def __init__(
        self,
        disk: DiskCache,
        max_bytes: int = 8 << 30,
        deadline_s: float = 120.0,
        attempts: int = 5,
        allow_pickle: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._disk = disk
        self._max_bytes = max_bytes
        self._allow_pickle = allow_pickle
        self._retry = Retry(attempts, deadline_s, sleep)
        self._lock_timeout_s = deadline_s

    def canonical(self, ref: AdapterRef) -> AdapterRef:
        bucket, key = split_id(ref.id)
        return AdapterRef(self.name, f"{_SCHEME}{bucket}/{key}", ref.revision or None)

    def credential(self, token: str | None) -> str:
        return ""

    def fetch(self, ref: AdapterRef, token: str | None) -> FetchedAdapter:
        ref = self.canonical(ref)
        started = time.monotonic()
        found = self._list(ref, started)
        self._check_size(ref, found)
        digest = hashlib.sha256("\n".join(f"{item.name} {item.etag}" for item in found).encode())
        revision = digest.hexdigest()[:40]
        repository = self._disk.repository(self.name, ref.id)
        if ref.revision is not None and ref.revision != revision:
            former = self._former(ref, ref.revision, repository)
            if former is None:
                raise AdapterNotFoundError(
                    f"{ref}: there is no revision {ref.revision!r}; it is {revision} now"
                )
            return former
        folder = repository / "snapshots" / revision
        try:
            with self._alone(folder):
                while True:
                    cached = folder.exists()
                    if not cached:
                        with self._disk.writing(repository, sum(item.size for item in found), ref.id):
                            self._download(ref, found, folder, started)
                    lease = self._disk.lease(self.name, ref.id, folder)
                    if lease is not None:
                        return FetchedAdapter(folder, revision, True, cached, lease)
        except FileLockTimeout:
            raise AdapterDownloadError(f"{ref}: somebody else's download of it does not end") from None

    def authorize(self, ref: AdapterRef, token: str | None) -> bool:
        self._list(self.canonical(ref), time.monotonic())
        return True

    def _former(self, ref: AdapterRef, revision: str, repository: Path) -> FetchedAdapter | None:
        """What the bucket held before, if it is still here: requests that began with it can end with it."""
        folder = repository / "snapshots" / revision
        if not _REVISION.fullmatch(revision) or not folder.is_dir():
            return None
        lease = self._disk.lease(self.name, ref.id, folder)
        return None if lease is None else FetchedAdapter(folder, revision, True, True, lease)

    def _alone(self, folder: Path) -> FileLock:
        """One download of an adapter at a time, also among servers that share the folder: it appends to files."""
        locks = self._disk.folder(".locks") / self.name
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{folder.parent.parent.name}-{folder.name}.lock", self._lock_timeout_s)

    def _list(self, ref: AdapterRef, started: float) -> list[_Object]:
        """The adapter's configuration and weights, sorted by name."""
        bucket, key = split_id(ref.id)

        def work() -> list[_Object]:
            pages = self._client().get_paginator("list_objects_v2")
            # With the slash, "adapters/1" does not find "adapters/10"; with the delimiter, nothing deeper.
            listed = pages.paginate(Bucket=bucket, Prefix=f"{key}/", Delimiter="/")
            return [
                _Object(
                    entry["Key"], entry["Key"].rpartition("/")[2], entry["Size"], entry["ETag"].strip('"')
                )
                for page in listed
                for entry in page.get("Contents", ())
            ]

        found = {item.name: item for item in self._try(work, ref, started)}
        if CONFIG_NAME not in found:
            raise AdapterNotFoundError(
                f"{ref} does not exist, holds no {CONFIG_NAME}, or the server may not read it"
            )
        names = [CONFIG_NAME, *choose_weight_names(found, self._allow_pickle)]
        names += [name for name in TEMPLATE_NAMES if name in found]
        return [found[name] for name in sorted(names)]

    def _check_size(self, ref: AdapterRef, found: list[_Object]) -> None:
        total = sum(item.size for item in found)
        if total > self._max_bytes:
            raise AdapterTooLargeError(
                f"{ref}: its files have {total} bytes, this server takes at most {self._max_bytes} "
                "(max_adapter_bytes); is it a whole model?"
            )

    def _download(self, ref: AdapterRef, found: list[_Object], folder: Path, started: float) -> None:
        """All files, then their folder, appear at once; what broke off is taken up where it ended, also by another
        process later."""
        partial = folder.with_name(f"{folder.name}.part")

        def give_up(error: Exception) -> AdapterError:
            if not is_beginning(error):
                shutil.rmtree(partial, ignore_errors=True)  # of no use to anybody, and the disk may be full
            return translate(error, ref)

        for item in found:
            work = functools.partial(self._download_file, ref, item, partial, started)
            self._retry.call(work, started, self._may_try_again, give_up)
        partial.rename(folder)

    def _download_file(self, ref: AdapterRef, item: _Object, folder: Path, started: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / item.name
        have = target.stat().st_size if target.exists() else 0
        if have > item.size:
            target.unlink()
            have = 0
        if have == item.size and target.exists():
            return
        answer = self._client().get_object(
            Bucket=split_id(ref.id)[0],
            Key=item.key,
            IfMatch=item.etag,
            **({"Range": f"bytes={have}-"} if have else {}),
        )
        try:
            with target.open("ab") as file:
                for piece in pieces(answer["Body"], started, self._retry.deadline_s):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:
            if is_damaged(error):
                target.unlink()
            raise
        if target.stat().st_size != item.size:
            raise ShortReadError

    def _try(self, work: Callable[[], Any], ref: AdapterRef, started: float) -> Any:
        return self._retry.call(work, started, self._may_try_again, functools.partial(translate, ref=ref))

    def _may_try_again(self, error: Exception) -> bool:
        return self._disk.shrink() > 0 if is_disk_full(error) else is_transient(error)

    def _client(self) -> Any:
        with _creation:
            return _client(_endpoint())


_creation = threading.Lock()  # boto3 makes one client at a time


@functools.lru_cache(4)
def _client(endpoint: str | None) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise UnsupportedError(
            "adapter_source: s3 needs boto3 on the server: pip install 'lorax-triton[s3]'"
        ) from None
    config = Config(
        connect_timeout=_TIMEOUT_S,
        read_timeout=_TIMEOUT_S,
        retries={"total_max_attempts": 1},  # tried again by us, within the adapter's time
        max_pool_connections=32,
    )
    return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)


def _endpoint() -> str | None:
    """None leaves it to boto3, which reads AWS_ENDPOINT_URL_S3."""
    account = os.environ.get("R2_ACCOUNT_ID")
    return os.environ.get("S3_ENDPOINT_URL") or (
        f"https://{account}.r2.cloudflarestorage.com" if account else None
    )


def split_id(adapter_id: str) -> tuple[str, str]:
    """Bucket and key prefix that an id names.

    Raises:
        ValidationError: one of them is missing.
    """
    default = os.environ.get("PREDIBASE_MODEL_BUCKET", "")
    if adapter_id.startswith(_SCHEME) or not default:
        bucket, _, key = adapter_id.removeprefix(_SCHEME).partition("/")
    else:
        bucket, key = default, adapter_id
        folder = os.environ.get("PREDIBASE_MODEL_FOLDER", "").strip("/")
        key = f"{folder}/{key}" if folder else key
    key = key.strip("/")
    if not bucket or not key or "\0" in key:
        raise ValidationError(f"adapter_id: {adapter_id!r} is not s3://bucket/prefix or bucket/prefix")
    return bucket, key
