"""What a request is answered with, independent of any web framework."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

JSON_TYPE = "application/json"
EVENT_STREAM_TYPE = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Answer:
    """Status, headers and body of an HTTP answer.

    A body that is an iterator is a stream of server-sent events: send each item as it comes, and call `aclose` on it
    if the caller goes away, which cancels the request on the server. `cause` is the error behind an answer that tells
    of one, for callers in the same process.
    """

    status: int
    headers: dict[str, str]
    body: bytes | AsyncIterator[bytes]
    cause: BaseException | None = field(default=None, repr=False)


def json_answer(payload: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] = {}) -> Answer:
    """An answer whose body is one JSON object."""
    return Answer(status, {"content-type": JSON_TYPE, **headers}, encode_json(payload))


def stream_answer(events: AsyncIterator[bytes], headers: Mapping[str, str] = {}) -> Answer:
    """An answer whose body is a stream of server-sent events."""
    # The last two keep proxies from holding events back.
    base = {"content-type": EVENT_STREAM_TYPE, "cache-control": "no-cache", "x-accel-buffering": "no"}
    return Answer(200, {**base, **headers}, events)


def event(payload: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(payload) + b"\n\n"


def encode_json(payload: Mapping[str, Any]) -> bytes:
    """Compact JSON in UTF-8; lone surrogates, which UTF-8 cannot carry, become question marks."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", errors="replace")
