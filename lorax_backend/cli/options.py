"""Command line flags of `serve`: one for every field of ServerConfig, and those of the process itself.

The flag of a field is its name with dashes; a flag that is given wins over the environment variable of the
same name. Flags are collected as text and read by `load_config`, the one place that knows types and choices.
"""

from __future__ import annotations

import argparse
import difflib
import socket
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, NoReturn

from lorax_backend.cli.gateway import add_shared_flags, read_gateway_config
from lorax_backend.config import ServerConfig, load_config
from lorax_backend.gateway.config import DEFAULT_PORT, GatewayConfig

_PREFIX = "config_"
# LoRAX's other names of the same options.
_ALIASES = {"hub_cache": "--huggingface-hub-cache"}
# Flags of LoRAX's launcher that this server does not have, so that the error can say so.
_LORAX_ONLY = """
    adapter-cycle-time-s adapter-id adapter-source backend compile compile-batch-size
    compile-max-batch-size compile-max-rank disable-custom-kernels disable-sgmv
    download-only eager eager-prefill embedding-dim env json-output master-addr master-port
    max-batch-prefill-tokens max-batch-total-tokens max-best-of max-waiting-tokens
    memory-wiggle-room merge-adapter-weights ngrok ngrok-authtoken ngrok-edge num-shard
    otlp-endpoint predibase-api-token preloaded-adapter-ids preloaded-adapter-source quantize
    shard-uds-path sharded source speculation-max-batch-size speculative-tokens
    tokenizer-config-path trust-remote-code waiting-served-ratio watermark-delta watermark-gamma
    weights-cache-override
"""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `serve` was asked for. `parameters` holds only the ServerConfig fields given as flags, as text."""

    config: ServerConfig
    parameters: dict[str, str]
    hostname: str
    port: int
    gateway: GatewayConfig | None
    triton_http_port: int
    grpc_port: int
    metrics_port: int
    drain_timeout_s: int
    verbose: bool

    @property
    def ports(self) -> dict[str, int]:
        """The ports that will be listened on, by flag."""
        ports = {
            "--triton-http-port": self.triton_http_port,
            "--grpc-port": self.grpc_port,
            "--metrics-port": self.metrics_port,
        }
        return ports if self.gateway is None else ports | {"--port": self.port}


class Parser(argparse.ArgumentParser):
    """Reports unknown flags with the nearest known one, and LoRAX's own as not supported."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        parsed, unknown = super().parse_known_args(args, namespace)
        # What follows an unknown flag is its value; only stray words at the front are worth a complaint of their own.
        flags = [text for text in unknown if text.startswith("--")] or unknown
        if flags:
            self.error("; ".join(self._explain(text) for text in flags))
        return parsed, []

    def _explain(self, text: str) -> str:
        name = text.split("=", 1)[0]
        if not name.startswith("--"):
            return f"unexpected argument {text!r}"
        if name.removeprefix("--") in _LORAX_ONLY.split():
            return f"{name} is an option of LoRAX that this server does not have"
        near = difflib.get_close_matches(name, [*self._option_string_actions], n=1)
        return f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nSee `{self.prog} --help`.\n")


def _help(field: Field[Any]) -> str:
    text = str(field.metadata["help"])
    default = "on" if field.default is True else "off" if field.default is False else field.default
    shown = "" if default == "" else f" [{default}]"
    return (text + shown).replace("%", "%%")


def _add_config_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "model and engine",
        "Each is also an environment variable in capitals (MAX_TOTAL_TOKENS); the flag wins. "
        "What is on is turned off by --no-FLAG or --FLAG false.",
    )
    for field in fields(ServerConfig):
        flag = "--" + field.name.replace("_", "-")
        names = [flag] + ([_ALIASES[field.name]] if field.name in _ALIASES else [])
        dest = _PREFIX + field.name
        if field.type == "bool":
            group.add_argument(
                *names, dest=dest, nargs="?", const="true", metavar="true|false", help=_help(field)
            )
            group.add_argument(
                "--no-" + flag[2:], dest=dest, action="store_const", const="false", help=argparse.SUPPRESS
            )
        else:
            kind = {"int": "N", "float": "X"}.get(str(field.type), "TEXT")
            metavar = "|".join(field.metadata["choices"]) or kind
            group.add_argument(*names, dest=dest, metavar=metavar, help=_help(field))


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (1 to 65535)")
    return int(text)


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag of `serve` to `parser`."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--hostname", default="0.0.0.0", metavar="ADDRESS", help="address to listen on [0.0.0.0]"
    )
    group.add_argument(
        "--triton-http-port", type=_port, default=8000, metavar="N", help="Triton's HTTP [8000]"
    )
    group.add_argument("--grpc-port", type=_port, default=8001, metavar="N", help="Triton's gRPC [8001]")
    group.add_argument(
        "--metrics-port", type=_port, default=8002, metavar="N", help="Prometheus metrics [8002]"
    )
    group.add_argument(
        "--port",
        type=_port,
        default=DEFAULT_PORT,
        metavar="N",
        help=f"HTTP gateway: LoRAX's routes and OpenAI's [{DEFAULT_PORT}]",
    )
    group.add_argument("--no-gateway", action="store_true", help="serve Triton alone")
    group.add_argument(
        "--drain-timeout-s",
        type=int,
        default=90,
        metavar="N",
        help="longest wait for running requests at the end [90]",
    )
    group.add_argument("--verbose", action="store_true", help="show all of tritonserver's log")
    add_shared_flags(parser)
    _add_config_flags(parser)


def read_serve_options(arguments: argparse.Namespace) -> ServeOptions:
    """Check the flags together with the environment.

    Raises:
        ValueError: naming every option that cannot be read, or ports given twice.
    """
    given = {
        name.removeprefix(_PREFIX): value
        for name, value in vars(arguments).items()
        if name.startswith(_PREFIX) and value is not None
    }
    config = load_config(given)
    options = ServeOptions(
        config=config,
        parameters=given,
        hostname=arguments.hostname,
        port=arguments.port,
        gateway=None if arguments.no_gateway else _gateway(arguments, config),
        triton_http_port=arguments.triton_http_port,
        grpc_port=arguments.grpc_port,
        metrics_port=arguments.metrics_port,
        drain_timeout_s=arguments.drain_timeout_s,
        verbose=arguments.verbose,
    )
    if len(set(options.ports.values())) < len(options.ports):
        raise ValueError(f"{', '.join(options.ports)} must be different ports")
    return options


def _gateway(arguments: argparse.Namespace, config: ServerConfig) -> GatewayConfig:
    """The gateway in front of this very server."""
    host = "127.0.0.1" if arguments.hostname in ("0.0.0.0", "::") else arguments.hostname
    return read_gateway_config(
        arguments,
        triton_urls=(f"{host}:{arguments.grpc_port}",),
        metrics_urls=(f"http://{host}:{arguments.metrics_port}/metrics",),
        host=arguments.hostname,
        port=arguments.port,
        # Where the gateway checks administrators itself, the server need not know each of them.
        backend_admin_key=config.admin_api_key,
    )


def taken_ports(options: ServeOptions) -> list[str]:
    """Which of the server's ports cannot be listened on, each as '--grpc-port 8001: reason'."""
    problems = []
    for flag, port in options.ports.items():
        family = socket.AF_INET6 if ":" in options.hostname else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A port in TIME_WAIT is free for a server; only a listener makes this fail.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.hostname, port))
            except OSError as error:
                problems.append(f"{flag} {port}: {error.strerror or error}")
    return problems
