"""`lorax-triton gateway`, and the flags that it shares with `serve`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from typing import Any

from lorax_backend.cli.connection import add_tls_flags, check_tls_flags
from lorax_backend.gateway.config import (
    ADMIN_KEYS_VARIABLE,
    BACKEND_ADMIN_KEY_VARIABLE,
    DEFAULT_BODY_BYTES,
    DEFAULT_PORT,
    USER_KEYS_VARIABLE,
    CorsOptions,
    GatewayConfig,
    TlsOptions,
    read_keys,
)

_LIBRARIES = ("starlette", "uvicorn", "pydantic")


class GatewayUsageError(Exception):
    """The gateway cannot run here or with these options; the message says what to change."""


def check_libraries() -> None:
    """Fail readably without the gateway's libraries.

    Raises:
        GatewayUsageError: naming them and what to install.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise GatewayUsageError(
            f"the gateway's libraries are not installed ({', '.join(missing)}); "
            "run: pip install 'lorax-triton[gateway]'"
        )


def _texts(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Add the gateway's flags that make sense wherever it is started from."""
    group = parser.add_argument_group(
        "gateway",
        f"Keys may also come from the environment, separated by commas: {USER_KEYS_VARIABLE}, {ADMIN_KEYS_VARIABLE}.",
    )
    add = group.add_argument
    add(
        "--gateway-workers",
        type=int,
        default=1,
        metavar="N",
        help="gateway processes that share the port [1]",
    )
    add("--api-key-file", metavar="FILE", help="users' keys, one a line; without any, everybody may generate")
    add("--admin-api-key-file", metavar="FILE", help="administrators' keys, one a line")
    add(
        "--max-body-bytes",
        type=int,
        default=DEFAULT_BODY_BYTES,
        metavar="N",
        help=f"longest request body [{DEFAULT_BODY_BYTES}]",
    )
    add(
        "--header-timeout-s",
        type=float,
        default=15.0,
        metavar="X",
        help="longest time for a request's headers to arrive [15]",
    )
    add(
        "--max-idle-connections",
        type=int,
        default=1024,
        metavar="N",
        help="connections without a request that a worker keeps open; beyond it the oldest goes [1024]",
    )
    add(
        "--body-timeout-s",
        type=float,
        default=30.0,
        metavar="X",
        help="longest time for a body to arrive [30]",
    )
    add(
        "--response-timeout-s",
        type=float,
        default=600.0,
        metavar="X",
        help="longest wait for the next piece of an answer [600]",
    )
    cors = CorsOptions()
    add("--cors-allow-origin", action="append", metavar="ORIGIN", help="may be repeated [any]")
    for name, default in (("method", cors.methods), ("header", cors.headers)):
        add(
            f"--cors-allow-{name}",
            type=_texts,
            action="append",
            metavar=f"{name.upper()}S",
            help=f"separated by commas; may be repeated [{','.join(default)}]",
        )
    add(
        "--cors-expose-header",
        type=_texts,
        action="append",
        metavar="HEADERS",
        help="headers scripts may read",
    )
    add("--cors-allow-credentials", action="store_true", help="let browsers send credentials")
    add("--access-log", action="store_true", help="log every HTTP request")


def add_gateway_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag of `gateway`."""
    add = parser.add_argument
    add(
        "--triton-url",
        type=_texts,
        action="append",
        metavar="HOST:PORT",
        help="Triton's gRPC address, grpcs://HOST:PORT with TLS; several, separated by commas or repeated, share the "
        "adapters [localhost:8001]",
    )
    add_tls_flags(parser, "triton-")
    add(
        "--metrics-url",
        type=_texts,
        action="append",
        metavar="URL",
        help="Prometheus page of each --triton-url, in their order [port 8002 of each]",
    )
    add("--hostname", default="0.0.0.0", metavar="ADDRESS", help="address to listen on [0.0.0.0]")
    add("--port", type=int, default=DEFAULT_PORT, metavar="N", help=f"port to listen on [{DEFAULT_PORT}]")
    add(
        "--drain-timeout-s",
        type=float,
        default=90.0,
        metavar="X",
        help="longest wait for requests at the end [90]",
    )
    add_shared_flags(parser)


def _flat(groups: list[tuple[str, ...]] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if groups is None else tuple(item for group in groups for item in group)


def read_gateway_config(arguments: argparse.Namespace, **overrides: Any) -> GatewayConfig:
    """The options of a gateway out of its flags and the environment; `overrides` win.

    Raises:
        ValueError: an option makes no sense.
    """
    defaults = CorsOptions()
    cors = CorsOptions(
        origins=tuple(arguments.cors_allow_origin or defaults.origins),
        methods=_flat(arguments.cors_allow_method, defaults.methods),
        headers=_flat(arguments.cors_allow_header, defaults.headers),
        expose_headers=_flat(arguments.cors_expose_header, defaults.expose_headers),
        credentials=arguments.cors_allow_credentials,
    )
    values: dict[str, Any] = {
        "workers": arguments.gateway_workers,
        "api_keys": read_keys(USER_KEYS_VARIABLE, arguments.api_key_file),
        "admin_api_keys": read_keys(ADMIN_KEYS_VARIABLE, arguments.admin_api_key_file),
        "backend_admin_key": os.environ.get(BACKEND_ADMIN_KEY_VARIABLE, ""),
        "max_body_bytes": arguments.max_body_bytes,
        "header_timeout": arguments.header_timeout_s,
        "max_idle_connections": arguments.max_idle_connections,
        "body_timeout": arguments.body_timeout_s,
        "response_timeout": arguments.response_timeout_s,
        "drain_timeout": arguments.drain_timeout_s,
        "cors": cors,
        "access_log": arguments.access_log,
    }
    return GatewayConfig(**values | overrides)


def run_gateway(arguments: argparse.Namespace) -> int:
    """`lorax-triton gateway`: serve until told to stop.

    Raises:
        GatewayUsageError: it cannot be started.
    """
    check_libraries()
    if not 0 <= arguments.port <= 65535:
        raise GatewayUsageError(f"--port {arguments.port}: is not a port (1 to 65535)")
    triton_urls = _flat(arguments.triton_url, GatewayConfig().triton_urls)
    try:
        config = read_gateway_config(
            arguments,
            triton_urls=triton_urls,
            tls=TlsOptions(**check_tls_flags(arguments, triton_urls, "triton-")),
            metrics_urls=_flat(arguments.metrics_url, ()),
            host=arguments.hostname,
            port=arguments.port,
        )
    except ValueError as error:
        raise GatewayUsageError(str(error)) from error
    import logging

    from lorax_backend.gateway.server import GatewayError, run

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")

    def say(address: str) -> None:
        print(f"gateway on {address} for {', '.join(config.triton_urls)}; stop it with Ctrl-C", flush=True)

    try:
        run(config, say)
    except GatewayError as error:
        raise GatewayUsageError(str(error)) from error
    return 0
