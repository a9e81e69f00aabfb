"""Options of the gateway, each a flag of `lorax-triton gateway` and, for secrets, an environment variable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_PORT = 8080
# axum's limit, which LoRAX keeps.
DEFAULT_BODY_BYTES = 2 << 20
USER_KEYS_VARIABLE = "LORAX_API_KEYS"
_DURATIONS = (
    "header_timeout",
    "body_timeout",
    "response_timeout",
    "write_timeout",
    "keep_alive",
    "health_interval",
)
ADMIN_KEYS_VARIABLE = "LORAX_ADMIN_API_KEYS"
BACKEND_ADMIN_KEY_VARIABLE = "LORAX_BACKEND_ADMIN_KEY"


@dataclass(frozen=True, slots=True)
class CorsOptions:
    """What browsers of other origins may do; LoRAX's flags. `*` in `origins` is any origin."""

    origins: tuple[str, ...] = ("*",)
    methods: tuple[str, ...] = ("GET", "POST")
    headers: tuple[str, ...] = ("content-type", "authorization", "x-hub-token", "x-request-id")
    expose_headers: tuple[str, ...] = ("x-request-id",)
    credentials: bool = False


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """Encryption towards Triton; files in PEM. None: the usual authorities, no certificate of the gateway's own, the
    address's host name."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """How a gateway serves. Times are in seconds.

    Attributes:
        triton_urls: gRPC addresses of the Triton servers, host:port each, at least one; grpcs://host:port with TLS.
        tls: for those with TLS.
        metrics_urls: where each server's Prometheus page is, in the same order; empty: port 8002 of each host.
        host: address to listen on.
        port: TCP port to listen on.
        workers: processes that share the port.
        api_keys: keys of users; empty: everybody may generate.
        admin_api_keys: keys of administrators, who may do all that users may; empty: the backend's own check decides.
        backend_admin_key: sent to the backend with administrators' commands; empty: the key the caller presented.
        max_body_bytes: longest request body.
        header_timeout: longest time for a request's headers to arrive.
        body_timeout: longest time for a request body to arrive.
        response_timeout: longest wait for the next piece of an answer from Triton.
        write_timeout: longest time a caller may leave a piece of a stream unread.
        keep_alive: seconds between comment lines in a stream that has nothing else to say.
        drain_timeout: how long running requests may go on after SIGTERM.
        health_interval: seconds between two looks at each Triton server.
        max_idle_connections: of a worker; beyond it the one that has had no request for longest is closed.
    """

    triton_urls: tuple[str, ...] = ("localhost:8001",)
    metrics_urls: tuple[str, ...] = ()
    host: str = "0.0.0.0"
    port: int = DEFAULT_PORT
    workers: int = 1
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_api_keys: tuple[str, ...] = field(default=(), repr=False)
    backend_admin_key: str = field(default="", repr=False)
    max_body_bytes: int = DEFAULT_BODY_BYTES
    header_timeout: float = 15.0
    body_timeout: float = 30.0
    response_timeout: float = 600.0
    write_timeout: float = 60.0
    keep_alive: float = 15.0
    drain_timeout: float = 90.0
    health_interval: float = 2.0
    max_idle_connections: int = 1024
    tls: TlsOptions = TlsOptions()
    cors: CorsOptions = CorsOptions()
    access_log: bool = False

    def __post_init__(self) -> None:
        if not self.triton_urls:
            raise ValueError("--triton-url: name at least one Triton server, such as localhost:8001")
        if len(set(self.triton_urls)) != len(self.triton_urls):
            raise ValueError("--triton-url: the same server is named twice")
        if self.metrics_urls and len(self.metrics_urls) != len(self.triton_urls):
            raise ValueError("--metrics-url: name one for each --triton-url, in the same order")
        if self.cors.credentials and "*" in self.cors.origins:
            raise ValueError(
                "--cors-allow-credentials needs --cors-allow-origin: browsers refuse it with any origin"
            )
        for name in _DURATIONS:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0 seconds")
        if min(self.workers, self.max_body_bytes, self.max_idle_connections) < 1:
            raise ValueError(
                "--gateway-workers, --max-body-bytes and --max-idle-connections must be at least 1"
            )

    @property
    def prometheus_urls(self) -> tuple[str, ...]:
        """Address of each server's metrics page."""
        if self.metrics_urls:
            return self.metrics_urls
        hosts = (url.rpartition("://")[2].rsplit(":", 1)[0] for url in self.triton_urls)
        return tuple(f"http://{host}:8002/metrics" for host in hosts)

    def to_json(self) -> str:
        """The options for a worker process, secrets included: for a pipe, never for a command line or a log."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> GatewayConfig:
        """Undo `to_json`."""
        values: dict[str, Any] = json.loads(text)
        cors: dict[str, Any] = values.pop("cors")
        tls = TlsOptions(**values.pop("tls"))
        return cls(**_tuples(values), cors=CorsOptions(**_tuples(cors)), tls=tls)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def read_keys(variable: str, file: str | None, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Keys out of a file, one a line, and an environment variable, separated by commas.

    Raises:
        ValueError: the file cannot be read, or a key holds what an HTTP header cannot.
    """
    text = (os.environ if environ is None else environ).get(variable, "").replace(",", "\n")
    if file:
        try:
            text += "\n" + Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read keys from {file}: {error}") from None
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ValueError(f"{file or variable}: keys are printable ASCII without blanks")
    return tuple(dict.fromkeys(keys))
