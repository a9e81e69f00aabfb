"""The `lorax-triton` program: `serve`, `gateway`, `chat`, `adapters` and `info`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from lorax_backend.cli.adapters import add_adapters_words, run_adapters
from lorax_backend.cli.chat import add_chat_words, run_chat
from lorax_backend.cli.control import ServerUnreachableError, ask, info_rows, stats_rows
from lorax_backend.cli.display import open_display, table
from lorax_backend.cli.gateway import GatewayUsageError, add_gateway_flags, run_gateway
from lorax_backend.cli.options import Parser, add_serve_flags, read_serve_options


def build_parser() -> Parser:
    """The command line with all its words and flags."""
    parser = Parser(
        prog="lorax-triton", description="Serve one base model with many LoRA adapters on Triton."
    )
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD", parser_class=Parser)
    serve = words.add_parser(
        "serve",
        help="start a server",
        usage="lorax-triton serve [--model-id MODEL] [options]",
        description="Fetch the model, start a tritonserver that serves it, and stop it on Ctrl-C.",
        allow_abbrev=False,
    )
    add_serve_flags(serve)
    gateway = words.add_parser(
        "gateway",
        help="start an HTTP gateway in front of running servers",
        description="LoRAX's REST routes and OpenAI's over HTTP, in front of one or more Triton servers.",
        allow_abbrev=False,
    )
    add_gateway_flags(gateway)
    add_chat_words(words)
    add_adapters_words(words)
    info = words.add_parser("info", help="show what a running server is and does", allow_abbrev=False)
    info.add_argument(
        "--url", default="http://localhost:8000", help="Triton's HTTP address [http://localhost:8000]"
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 fine, 1 failed, 2 wrong usage, 128 + signal if interrupted early."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    words = {"serve": _serve, "gateway": _gateway, "chat": run_chat, "adapters": run_adapters, "info": _info}
    return words[parsed.word](parsed)


def _gateway(parsed: argparse.Namespace) -> int:
    try:
        return run_gateway(parsed)
    except GatewayUsageError as error:
        return _fail(str(error))


def _serve(parsed: argparse.Namespace) -> int:
    from lorax_backend.cli.serve import Interrupted, ServeError, serve

    try:
        options = read_serve_options(parsed)
    except ValueError as error:
        return _fail(str(error), code=2)
    try:
        return serve(options, open_display())
    except ServeError as error:
        return _fail(str(error))
    except Interrupted as signal:
        print(f"stopped by {signal}", file=sys.stderr)
        return signal.exit_code


def _info(parsed: argparse.Namespace) -> int:
    url = parsed.url if "://" in parsed.url else f"http://{parsed.url}"
    try:
        info = ask(url, "info")
        stats = ask(url, "stats")
    except ServerUnreachableError as error:
        return _fail(str(error))
    print(
        _as_json(info, stats)
        if parsed.json
        else f"{table(url, info_rows(info))}\n\n{table('now', stats_rows(stats))}"
    )
    return 0


def _as_json(info: dict[str, Any], stats: dict[str, Any]) -> str:
    return json.dumps({"info": info, "stats": stats}, indent=2)


def _fail(message: str, code: int = 1) -> int:
    print(f"lorax-triton: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
