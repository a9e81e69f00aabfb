"""What boto3's exceptions mean to a caller of ours. Does not import boto3: its absence is told by the source."""

from __future__ import annotations

import errno

from lorax_backend.adapters.sources.retry import OutOfTimeError
from lorax_backend.errors import AdapterDownloadError, AdapterError, AdapterNotFoundError, LoraxError
from lorax_backend.types import AdapterRef

_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_CHANGED_STATUS = (412, 416)  # IfMatch or Range failed: the object is another one now
# Refusals that are about the server's keys, whatever the caller asked for.
_KEY_CODES = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
)


class ShortReadError(Exception):
    """The connection ended before the file did."""


def translate(error: Exception, ref: AdapterRef) -> AdapterError:
    """The error to give to the caller; one of ours is passed through. A bucket, key or right that is missing is told
    in the same words, and without the address, which may be the operator's secret."""
    if isinstance(error, LoraxError):
        raise error
    if isinstance(error, OutOfTimeError):
        return error.told(ref)
    status, code = _status(error), _code(error)
    if code in _KEY_CODES:
        return AdapterDownloadError(
            f"{ref}: the bucket's server refuses this server's credentials ({code}); the operator has to mend "
            "AWS_ACCESS_KEY_ID and what belongs to it"
        )
    if status in (400, 401, 403, 404):
        return AdapterNotFoundError(f"{ref} does not exist, or the server may not read it")
    if status in _CHANGED_STATUS:
        return AdapterDownloadError(f"{ref} changed while it was downloaded; try again")
    if status is not None:
        return AdapterDownloadError(
            f"{ref}: the bucket's server answered {status}; trying again later may help"
        )
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return AdapterDownloadError(f"{ref}: this server has no credentials for S3 (AWS_ACCESS_KEY_ID)")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        remedy = "; make room on the disk of adapter_disk_cache" if is_disk_full(error) else ""
        return AdapterDownloadError(f"{ref} could not be stored: {error.strerror}{remedy}")
    return AdapterDownloadError(
        f"{ref}: the bucket's server could not be reached or broke off ({type(error).__name__})"
    )


def is_transient(error: Exception) -> bool:
    """True if the same call may succeed a little later."""
    if isinstance(error, LoraxError):
        return False
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if isinstance(error, OSError) and error.errno is not None:
        return isinstance(error, ConnectionError | TimeoutError)
    # botocore's and urllib3's for connections, time limits and answers cut short
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        names
        & {
            "ShortReadError",
            "HTTPClientError",
            "ConnectionError",
            "HTTPError",
            "IncompleteReadError",
            "ResponseStreamingError",
            "FlexibleChecksumError",
        }
    )


def is_beginning(error: Exception) -> bool:
    """True if what was stored before the error is the beginning of the right file, worth keeping for the next try."""
    return isinstance(error, OutOfTimeError) or is_transient(error)


def is_damaged(error: Exception) -> bool:
    """True if what was stored is not what the bucket holds: its checksum is another."""
    return type(error).__name__ == "FlexibleChecksumError"


def is_disk_full(error: Exception) -> bool:
    """True if a file could not be written for want of room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    return metadata.get("HTTPStatusCode")


def _code(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
