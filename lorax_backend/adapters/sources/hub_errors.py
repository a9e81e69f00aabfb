"""What the many exceptions of `huggingface_hub` mean to a caller of ours.

Our messages are made here, not taken over: the originals hold addresses, which may be signed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

from lorax_backend.adapters.sources.retry import OutOfTimeError
from lorax_backend.errors import (
    AdapterDownloadError,
    AdapterError,
    AdapterNotFoundError,
    AdapterUnauthorizedError,
)
from lorax_backend.types import AdapterRef

_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)


def translate(error: Exception, ref: AdapterRef, with_token: bool) -> AdapterError:
    """The error to give to the caller; an `AdapterError` is passed through."""
    if isinstance(error, AdapterError):
        return error
    if isinstance(error, OutOfTimeError):
        return error.told(ref)
    token = "the given token may not read it" if with_token else "it needs an api_token"
    for cause in _causes(error):
        if isinstance(cause, GatedRepoError):
            return AdapterUnauthorizedError(f"{ref} is gated and {token}")
        if isinstance(cause, RepositoryNotFoundError):
            return AdapterNotFoundError(f"{ref} does not exist on the hub, or it is private and {token}")
        if isinstance(cause, RevisionNotFoundError):
            return AdapterNotFoundError(f"{ref}: there is no revision {ref.revision or 'main'!r}")
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return AdapterNotFoundError(f"{ref}: a file of the adapter is missing on the hub")
    status = _status(error)
    if status in (401, 403, 404):  # in the words for a private one, so that they tell nothing about it
        return AdapterNotFoundError(f"{ref} does not exist on the hub, or it is private and {token}")
    if status is not None:
        return AdapterDownloadError(f"{ref}: the hub answered {status}; trying again later may help")
    root = list(_causes(error))[-1]
    if isinstance(root, OfflineModeIsEnabled):
        return AdapterDownloadError(f"{ref} is not in the cache, and HF_HUB_OFFLINE forbids to download it")
    if isinstance(root, OSError) and root.errno is not None and not isinstance(root, ConnectionError):
        return not_stored(root, ref)
    return AdapterDownloadError(f"{ref}: the hub could not be reached or broke off ({type(root).__name__})")


def not_stored(error: OSError, ref: AdapterRef) -> AdapterDownloadError:
    """The download failed on this machine's side."""
    remedy = "; make room on the disk of adapter_disk_cache" if is_disk_full(error) else ""
    return AdapterDownloadError(
        f"{ref} could not be stored: {error.strerror or type(error).__name__}{remedy}"
    )


def is_disk_full(error: Exception) -> bool:
    """True if a file could not be written for want of room."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(isinstance(cause, OSError) and cause.errno in full for cause in _causes(error))


def is_transient(error: Exception) -> bool:
    """True if the same call may succeed a little later."""
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled | EntryNotFoundError) and not cause.__cause__:
            return False
        if isinstance(cause, HfHubHTTPError):
            return cause.response is not None and cause.response.status_code in _TRANSIENT_STATUS
        if isinstance(cause, TransportError | ConnectionError | TimeoutError):
            return True
        if type(cause) is FileNotFoundError:
            return True  # somebody has removed the folder that it was to be stored in
        if (
            isinstance(cause, OSError)
            and cause.errno is None
            and not isinstance(cause, LocalEntryNotFoundError)
        ):
            return True  # a file that came out shorter than announced
    return False


def retry_after(error: Exception) -> float | None:
    """Seconds the hub asked to wait, if it did in a way we read."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if response is not None:
            text = response.headers.get("Retry-After", "")
            return float(text) if text.isdecimal() else None
    return None


def _status(error: Exception) -> int | None:
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from, outermost first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__
