"""The seam between the client and the wire: what a transport is given, what it gives back.

`Client` and `AsyncClient` only know the protocols here, so that a test, or a program with other means of transport,
can put in its own. The gRPC ones are in `_grpc` and `_grpc_aio`, one without a network in `testing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Tensor:
    """A one-dimensional input tensor. `datatype` is Triton's word: BYTES (values are str), BOOL, INT32 ..."""

    datatype: str
    values: Sequence[Any]


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request to one model of the server. `request_id` is unique over all clients."""

    model_name: str
    request_id: str
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class InferResponse:
    """One response: values by output name, and whether Triton marked it as the request's last.

    `error` is set instead of outputs if the request failed inside the stream.
    """

    outputs: Mapping[str, list[Any]] = field(default_factory=dict)
    final: bool = False
    error: str | None = None


class ResponseStream(Protocol):
    """The responses to one request. One thread at a time receives; any thread may cancel."""

    def receive(self, timeout: float | None) -> InferResponse | None:
        """The next response, or None after the last.

        Args:
            timeout: longest wait in seconds; None waits until the request's total time is over.

        Raises:
            RequestTimeoutError: nothing came in time; the request is cancelled on the server.
            RequestCancelledError: `cancel` was called.
            ServerConnectionError: the server cannot be reached, or the connection broke.
            LoraxError: the server's own error.
        """
        ...

    def cancel(self) -> None:
        """End the request here and on the server. Does nothing after the last response."""
        ...


class Transport(Protocol):
    """Carries requests to a server."""

    def open_stream(self, request: InferRequest, total_timeout: float | None) -> ResponseStream:
        """Send a request; returns at once. `total_timeout` bounds the whole answer, in seconds."""
        ...

    def is_ready(self, model_name: str, timeout: float) -> bool:
        """True if the server answers within `timeout` seconds that it serves the model."""
        ...

    def close(self) -> None:
        """Give up the connections; open streams are cancelled."""
        ...


class AsyncResponseStream(Protocol):
    """`ResponseStream` for an event loop."""

    async def receive(self, timeout: float | None) -> InferResponse | None: ...

    def cancel(self) -> None: ...


class AsyncTransport(Protocol):
    """`Transport` for an event loop; every method is called from one loop."""

    def open_stream(self, request: InferRequest, total_timeout: float | None) -> AsyncResponseStream: ...

    async def is_ready(self, model_name: str, timeout: float) -> bool: ...

    async def close(self) -> None: ...
