"""HTTP connections that take their time, or that are opened and left: uvicorn waits for them for ever.

A connection has a request, from the end of its headers to the end of its answer, or it has none. Without one it may be
silent between two requests, but once a byte has come, and from the beginning, headers have to be complete in time.
Bodies and answers have limits of their own (`bodies.py`, `streaming.py`).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.errors import HttpError, error_body

MAX_HEADER_BYTES = 64 << 10


def limited_protocol(config: GatewayConfig) -> type[HttpToolsProtocol]:
    """uvicorn's HTTP protocol with the limits of `config`, for one server."""
    idle: dict[_LimitedProtocol, None] = {}  # in the order in which they became so

    class Protocol(_LimitedProtocol):
        _idle = idle
        _max_idle = config.max_idle_connections
        _header_timeout = config.header_timeout

    return Protocol


class _LimitedProtocol(HttpToolsProtocol):
    _idle: dict[_LimitedProtocol, None]
    _max_idle: int
    _header_timeout: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._in_headers = False
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._start_deadline()
        self._became_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._stop_deadline()
        self._idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._deadline is None and not self._has_request():
            self._start_deadline()
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                message = (
                    f"the headers are longer than {MAX_HEADER_BYTES} bytes; send what is long in the body"
                )
                self._refuse(HttpError(431, "headers_too_large", message))
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """See httptools."""
        self._in_headers = True
        self._header_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._in_headers = False
        self._stop_deadline()
        self._idle.pop(self, None)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        if not self.transport.is_closing() and not self._has_request():
            self._became_idle()

    def send_400_response(self, msg: str) -> None:
        """See uvicorn; the error is an ErrorResponse, as all others are."""
        self._refuse(HttpError(400, "invalid_http", f"{msg} Is it HTTP/1.1?"))

    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _became_idle(self) -> None:
        """Where there are too many, the one that has been idle for longest goes: its caller connects again, which one
        that could not connect at all would not be told."""
        self._idle[self] = None
        if len(self._idle) > self._max_idle:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            oldest.transport.close()

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self._header_timeout, self._too_late)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self._has_request() or self.transport.is_closing():
            return
        if self._in_headers:
            message = f"the headers did not arrive within {self._header_timeout:g} s"
            self._refuse(HttpError(408, "request_timeout", message))
        else:
            self.transport.close()

    def _refuse(self, error: HttpError) -> None:
        """Answer outside the application and close: what else comes cannot be told from another request."""
        if self.transport.is_closing():
            return
        if not self._has_request():  # in the middle of another answer there is no place for this one
            body = error_body(error)
            head = STATUS_LINE[error.status] + b"content-type: application/json\r\nconnection: close\r\n"
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()
