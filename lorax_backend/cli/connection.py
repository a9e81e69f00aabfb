"""Flags of the commands that talk to a running server over gRPC, and the client they lead to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorax_triton import Client

DEFAULT_URL = "localhost:8001"


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """--url and --timeout, and those of TLS."""
    parser.add_argument(
        "--url", default=DEFAULT_URL, help=f"Triton's gRPC address; grpcs:// for TLS [{DEFAULT_URL}]"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="longest wait for the server [300]"
    )

    add_tls_flags(parser)


def add_tls_flags(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """What a grpcs:// address needs beside the usual authorities."""
    add = parser.add_argument
    add(f"--{prefix}ca-file", metavar="PEM", help="grpcs://: authorities to trust [the usual ones]")
    add(f"--{prefix}cert-file", metavar="PEM", help="grpcs://: certificate to show to the server")
    add(f"--{prefix}key-file", metavar="PEM", help="grpcs://: key of that certificate")
    add(
        f"--{prefix}server-name",
        metavar="HOST",
        help="grpcs://: host name to expect in the server's certificate [the address's]",
    )


def check_tls_flags(
    parsed: argparse.Namespace, urls: tuple[str, ...], prefix: str = ""
) -> dict[str, str | None]:
    """The files and the name that the flags of `add_tls_flags` give: `ca_file`, `cert_file`, `key_file`, `server_name`.

    Raises:
        ValueError: they make no sense, or a file cannot be read.
    """
    words = ("ca-file", "cert-file", "key-file", "server-name")
    flags = {word: f"--{prefix}{word}" for word in words}
    values = {word: getattr(parsed, flags[word][2:].replace("-", "_")) for word in words}
    given = [flags[word] for word in words if values[word]]
    if given and not any(url.startswith("grpcs://") for url in urls):
        raise ValueError(f"{given[0]}: is for encrypted connections; write the address as grpcs://host:port")
    if bool(values["cert-file"]) != bool(values["key-file"]):
        raise ValueError(f"{flags['cert-file']} and {flags['key-file']} need each other")
    for word in words[:3]:
        if not values[word]:
            continue
        try:
            content = Path(values[word]).read_bytes()
        except OSError as error:
            raise ValueError(f"{flags[word]} {values[word]}: cannot be read: {error.strerror}") from None
        if b"-----BEGIN " not in content:
            raise ValueError(f"{flags[word]} {values[word]}: is no PEM file")
    return {word.replace("-", "_"): values[word] or None for word in words}


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
        ValueError: the address, the time limit or a flag of TLS makes no sense.
    """
    from lorax_triton import Client, Tls

    files = check_tls_flags(parsed, (parsed.url,))
    tls = Tls(files["ca_file"], files["key_file"], files["cert_file"], files["server_name"])
    encrypted = tls if parsed.url.startswith("grpcs://") else None
    return Client(parsed.url, timeout=parsed.timeout, admin_key=admin_key, connect_timeout=5.0, tls=encrypted)
