"""What the sync and async gRPC transports share: address, TLS, metadata, methods and retry policy. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from lorax_triton.errors import (
    LoraxError,
    RequestCancelledError,
    RequestTimeoutError,
    ServerConnectionError,
    code_of_text,
    error_from_grpc,
    find_error_payload,
)

DEFAULT_PORT = 8001
STREAM_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
READY_METHOD = "/inference.GRPCInferenceService/ModelReady"
# Wait for the stream's own end, after the last response, before it is cancelled instead.
END_TIMEOUT_S = 5.0
# Wait of a client that closes for the ends of its finished streams.
CLOSE_TIMEOUT_S = 2.0
_FIRST_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Tls:
    """Encryption of the connection.

    Attributes:
        root_certificates: PEM file of the authorities to trust; None trusts those of gRPC.
        private_key: PEM file of the client's key, for servers that ask for one.
        certificate_chain: PEM file of the client's certificate; needs `private_key`.
        server_name: host name to expect in the server's certificate, if it is not the one in the address.
    """

    root_certificates: str | Path | None = None
    private_key: str | Path | None = None
    certificate_chain: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("private_key and certificate_chain need each other")

    def credentials(self) -> Any:
        """gRPC channel credentials.

        Raises:
            OSError: a file cannot be read.
        """
        files = (self.root_certificates, self.private_key, self.certificate_chain)
        return grpc.ssl_channel_credentials(
            *(None if file is None else Path(file).read_bytes() for file in files)
        )


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """How to reach one server.

    Attributes:
        target: host:port for gRPC.
        tls: None for plain text.
        metadata: (key, value) pairs sent with every call.
        connect_timeout: longest wait in seconds for a connection attempt.
        max_session_retries: new channels to try after a connection was lost before any response came.
    """

    target: str
    tls: Tls | None = None
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    connect_timeout: float = 10.0
    max_session_retries: int = 2

    def options(self) -> list[tuple[str, Any]]:
        """gRPC channel options."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # A new channel must make new connections, not share the broken one's back-off.
            ("grpc.use_local_subchannel_pool", 1),
            # gRPC takes this as the time limit of one connection attempt.
            ("grpc.min_reconnect_backoff_ms", max(1, int(self.connect_timeout * 1000))),
        ]
        if self.tls is not None and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options


def parse_base_url(base_url: str) -> tuple[str, bool]:
    """(gRPC target, whether the scheme asks for TLS) of "host", "host:port", "grpc://host:port" or "grpcs://...".

    Raises:
        ValueError: another scheme, or no host.
    """
    scheme, separator, rest = base_url.strip().rpartition("://")
    if separator and scheme not in ("grpc", "grpcs"):
        raise ValueError(
            f"base_url {base_url!r}: this client speaks gRPC to Triton; give host:{DEFAULT_PORT} or"
            f" grpc://host:{DEFAULT_PORT} instead of {scheme}://"
        )
    if rest.startswith("unix:"):
        return rest, scheme == "grpcs"
    host = rest.rstrip("/")
    if not host or "/" in host:
        raise ValueError(f"base_url {base_url!r}: give host:port, such as localhost:{DEFAULT_PORT}")
    has_port = host.rpartition("]")[2].count(":") == 1
    return host if has_port else f"{host}:{DEFAULT_PORT}", scheme == "grpcs"


def make_metadata(
    headers: Mapping[str, str] | None, cookies: Mapping[str, str] | None
) -> tuple[tuple[str, str], ...]:
    """Headers and cookies as gRPC metadata; keys become lower case, as the protocol demands."""
    # Not `triton_grpc_error`, which asks for errors as status codes: under load it brings servers before 26.04 down.
    metadata = [(key.lower(), value) for key, value in (headers or {}).items()]
    if cookies:
        metadata.append(("cookie", "; ".join(f"{name}={value}" for name, value in cookies.items())))
    return tuple(metadata)


def bearer_token(headers: Mapping[str, str] | None) -> str | None:
    """The token of an `Authorization: Bearer ...` header, or None."""
    for key, value in (headers or {}).items():
        scheme, _, token = value.partition(" ")
        if key.lower() == "authorization" and scheme.lower() == "bearer" and token.strip():
            return token.strip()
    return None


def connection_lost(code: str, details: str) -> bool:
    """True if a call ended because of the connection, not by an answer of the server's.

    Both may end with UNAVAILABLE; only the words tell them apart.
    """
    return code == "UNAVAILABLE" and find_error_payload(details) is None and code_of_text(details) is None


def error_of_call(code: str, details: str, config: ChannelConfig, request_id: str) -> LoraxError:
    """The exception for a gRPC call that ended with a status other than OK."""
    if not connection_lost(code, details):
        return error_from_grpc(code, details, request_id)
    error = ServerConnectionError(f"No connection to {config.target}: {details}")
    error.request_id = request_id
    return error


def wait_expired(timeout: float | None, request_id: str) -> RequestTimeoutError:
    """The exception for a wait that this client gave up."""
    error = RequestTimeoutError(
        f"No response within {timeout} s (request {request_id}); a longer `timeout` may help"
    )
    error.request_id = request_id
    return error


def cancelled_here(request_id: str) -> RequestCancelledError:
    """The exception for a reader whose stream was cancelled by this client."""
    error = RequestCancelledError(f"Request {request_id} was cancelled")
    error.request_id = request_id
    return error


def retry_pause(attempt: int) -> float:
    """Seconds to wait before retry `attempt` (from 0): 0.1, 0.2, 0.4 ..."""
    return float(_FIRST_PAUSE_S * 2**attempt)


def open_channel(library: Any, config: ChannelConfig) -> Any:
    """A channel of `library`, which is `grpc` or `grpc.aio`; it connects at its first call."""
    if config.tls is None:
        return library.insecure_channel(config.target, options=config.options())
    return library.secure_channel(config.target, config.tls.credentials(), options=config.options())


def server_methods(channel: Any) -> tuple[Any, Any]:
    """The calls of a channel of either library: inference, and the readiness of a model.

    The server declares inference as a bidirectional stream; with one request each, a unary-stream call is that on the
    wire, and it spares gRPC's sending thread per call. The half-close after the request lets the server end the call by
    itself.
    """
    infer = channel.unary_stream(
        STREAM_METHOD,
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
    )
    model_ready = channel.unary_unary(
        READY_METHOD,
        request_serializer=service_pb2.ModelReadyRequest.SerializeToString,
        response_deserializer=service_pb2.ModelReadyResponse.FromString,
    )
    return infer, model_ready
