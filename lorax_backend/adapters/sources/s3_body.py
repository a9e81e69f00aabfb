"""The bytes of an object as they come, so that a time limit holds however slowly that is. Does not import boto3."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from lorax_backend.adapters.sources.retry import OutOfTimeError

_CHUNK = 1 << 20


def pieces(body: Any, started: float, limit_s: float) -> Iterator[bytes]:
    """The content of a `StreamingBody`, in pieces of at most 1 MiB, then closed.

    Raises:
        OutOfTimeError: it did not end within `limit_s` seconds of `started` (by `time.monotonic()`).
    """
    with contextlib.closing(body):
        if hasattr(getattr(body, "_raw_stream", None), "read1"):
            body._raw_stream = _AsItComes(body._raw_stream)
        while chunk := body.read(_CHUNK):
            yield chunk
            if time.monotonic() - started > limit_s:
                raise OutOfTimeError(limit_s)


class _AsItComes:
    """urllib3's response, whose `read` waits for all that is asked for: each byte in time, the whole for hours. Below
    the `StreamingBody`, which goes on to check length and checksum."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def read(self, amount: int) -> bytes:
        return bytes(self._raw.read1(amount))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)
