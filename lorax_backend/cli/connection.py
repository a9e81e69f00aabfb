"""Flags of the commands that talk to a running server over gRPC, and the client they lead to."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorax_triton import Client

DEFAULT_URL = "localhost:8001"


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """--url and --timeout."""
    parser.add_argument(
        "--url", default=DEFAULT_URL, help=f"Triton's gRPC address; grpcs:// for TLS [{DEFAULT_URL}]"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="longest wait for the server [300]"
    )


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """What names an adapter beside its id."""
    parser.add_argument(
        "--adapter-source",
        choices=("hub", "local", "s3", "pbase"),
        help="where the adapter is looked up [the server's default]",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the adapter")


def add_token_flag(parser: argparse.ArgumentParser) -> None:
    """--api-token, for adapters that not everybody may read."""
    parser.add_argument("--api-token", help="token for a private adapter [the server's own]")


def connect(parsed: argparse.Namespace, admin_key: str | None = None) -> Client:
    """A client for the server that the flags name.

    Raises:
        ValueError: the address or the time limit makes no sense.
    """
    from lorax_triton import Client

    return Client(parsed.url, timeout=parsed.timeout, admin_key=admin_key, connect_timeout=5.0)
