"""`lorax-triton adapters`: what a running server keeps of which adapter, and changing it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorax_backend.cli.connection import add_adapter_flags, add_connection_flags, add_token_flag, connect
from lorax_backend.cli.display import byte_size

if TYPE_CHECKING:
    from lorax_triton import Client

# Column title, key of the server's answer, and how to write the value. Only columns that some row has are shown.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("ADAPTER", "id", str),
    ("SOURCE", "source", str),
    ("REVISION", "revision", lambda value: str(value)[:12]),
    ("STATUS", "status", str),
    ("TIER", "tier", str),
    ("RANK", "rank", str),
    ("SIZE", "bytes", byte_size),
    ("USERS", "users", str),
    ("HITS", "hits", str),
    ("LAST USED", "last_used_s", lambda seconds: f"{age(seconds)} ago"),
    ("PINNED", "pinned", str),
)
_TIERS = ("device", "host", "disk")


def add_adapters_words(words: argparse._SubParsersAction[Any]) -> None:
    """Add `adapters` with its own words to the command line."""
    adapters = words.add_parser(
        "adapters",
        help="list, preload, pin, unload, reload and purge the adapters of a running server",
        allow_abbrev=False,
    )
    actions = adapters.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = actions.add_parser(name, help=help, allow_abbrev=False)
        _add_common_flags(parser)
        return parser

    add("list", "show every adapter the server knows")
    for name, help in (
        ("preload", "load an adapter before its first request"),
        ("pin", "keep an adapter where it is, however long nobody uses it"),
        ("unpin", "let the server evict a pinned adapter again"),
        ("unload", "take an adapter out of the server's memory; its files stay"),
        ("reload", "use new weights from now on; requests in flight keep the old"),
    ):
        parser = add(name, help)
        parser.add_argument("adapter_id", metavar="ADAPTER", help="hub id, id@revision, folder or URI")
        add_adapter_flags(parser)
        if name in ("preload", "reload"):
            add_token_flag(parser)
            parser.add_argument("--no-wait", action="store_true", help="do not wait until it is there")
        if name == "preload":
            parser.add_argument("--tier", choices=_TIERS, default="device", help="how near [device]")
            parser.add_argument("--pin", action="store_true", help="keep it there")
    purge = add("purge", "delete downloaded files of adapters that nobody uses")
    which = purge.add_mutually_exclusive_group(required=True)
    which.add_argument("adapter_id", metavar="ADAPTER", nargs="?", help="the adapter whose files go")
    which.add_argument("--all", action="store_true", help="files of all adapters that are not in use")
    _add_alias_words(actions)


def _add_alias_words(actions: argparse._SubParsersAction[Any]) -> None:
    alias = actions.add_parser("alias", help="names that stand for adapters", allow_abbrev=False)
    verbs = alias.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_common_flags(verbs.add_parser("list", help="show all names", allow_abbrev=False))
    put = verbs.add_parser("set", help="let a name stand for adapters", allow_abbrev=False)
    put.add_argument("name", metavar="NAME")
    put.add_argument(
        "targets", metavar="ADAPTER[=WEIGHT]", nargs="+", help="of several, each request draws one by weight"
    )
    _add_common_flags(put)
    drop = verbs.add_parser("delete", help="forget a name", allow_abbrev=False)
    drop.add_argument("name", metavar="NAME")
    _add_common_flags(drop)


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    add_connection_flags(parser)
    parser.add_argument("--admin-key", help="the server's admin_api_key [environment: LORAX_ADMIN_KEY]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_adapters(parsed: argparse.Namespace) -> int:
    """Do what the command line asks; its exit status."""
    from lorax_triton import LoraxError

    try:
        with connect(parsed, parsed.admin_key) as client:
            print(_run(client, parsed))
    except (LoraxError, ValueError) as error:
        print(f"lorax-triton: {error}", file=sys.stderr)
        return 1
    return 0


def _run(client: Client, parsed: argparse.Namespace) -> str:
    if parsed.action == "list":
        found = client.adapters.list()
        return _as_json(found) if parsed.json else adapters_table(found)
    answer = _run_alias(client, parsed) if parsed.action == "alias" else _run_action(client, parsed)
    if parsed.json:
        return _as_json(answer)
    if parsed.action == "alias" and parsed.verb == "list":
        return "\n".join(f"{name}  {_alias_text(target)}" for name, target in answer.items()) or "no aliases"
    subject = getattr(parsed, "adapter_id", None) or getattr(parsed, "name", None) or "adapters"
    if parsed.action == "alias" and parsed.verb == "set":
        return f"{subject}  {_alias_text(answer['targets'])}"
    return f"{subject}: {_answer_text(answer) or 'done'}"


def _run_action(client: Client, parsed: argparse.Namespace) -> dict[str, Any]:
    adapters, name = client.adapters, parsed.adapter_id
    if parsed.action == "purge":
        return adapters.purge(name)
    where = {"adapter_source": parsed.adapter_source, "revision": parsed.revision}
    if parsed.action == "pin":
        return adapters.pin(name, **where)
    if parsed.action == "unpin":
        return adapters.unpin(name, **where)
    if parsed.action == "unload":
        return adapters.unload(name, **where)
    wait = {"wait": not parsed.no_wait, "timeout": parsed.timeout}
    if parsed.action == "reload":
        return adapters.reload(name, **where, api_token=parsed.api_token, **wait)
    return adapters.preload(
        name, **where, api_token=parsed.api_token, tier=parsed.tier, pin=parsed.pin, **wait
    )


def _run_alias(client: Client, parsed: argparse.Namespace) -> dict[str, Any]:
    if parsed.verb == "list":
        return client.adapters.aliases()
    if parsed.verb == "delete":
        return {"status": "deleted" if client.adapters.delete_alias(parsed.name) else "no such alias"}
    return client.adapters.set_alias(parsed.name, read_targets(parsed.targets))


def read_targets(texts: Sequence[str]) -> str | dict[str, float]:
    """What an alias stands for: "adapter", or several "adapter=weight"; a weight not given is 1.

    Raises:
        ValueError: an adapter is named twice.
    """
    targets: dict[str, float] = {}
    for text in texts:
        name, separator, weight = text.rpartition("=")
        try:
            adapter_id, value = (name, float(weight)) if separator else (text, 1.0)
        except ValueError:
            adapter_id, value = text, 1.0
        if adapter_id in targets:
            raise ValueError(f"{adapter_id} is named twice")
        targets[adapter_id] = value
    return next(iter(targets)) if len(targets) == 1 else targets


def adapters_table(adapters: Sequence[Mapping[str, Any]]) -> str:
    """Adapters in aligned columns, with the error of each that failed below it."""
    if not adapters:
        return "no adapters"
    columns = [
        column
        for column in _COLUMNS
        if any(row.get(column[1]) or row.get(column[1]) == 0 for row in adapters)
    ]
    cells = [[title for title, _, _ in columns]]
    cells += [
        ["" if row.get(key) is None else write(row[key]) for _, key, write in columns] for row in adapters
    ]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    shown = lines[:1]
    for line, row in zip(lines[1:], adapters, strict=True):
        shown.append(line)
        if row.get("error"):
            error = row["error"]
            shown.append(f"  {error['error'] if isinstance(error, Mapping) and 'error' in error else error}")
    return "\n".join(shown)


def age(seconds: float) -> str:
    """Seconds as people read them: 90 -> '2 min'."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _answer_text(answer: Mapping[str, Any]) -> str:
    """An answer on one line: its status, then what it tells of the adapter."""
    status = str(answer.get("status", ""))
    facts = [
        f"{name} {byte_size(answer[name]) if name == 'bytes' else answer[name]}"
        for name in ("tier", "rank", "bytes", "pinned")
        if answer.get(name)
    ]
    return ", ".join(part for part in (status, *facts) if part)


def _alias_text(targets: Sequence[Mapping[str, Any]]) -> str:
    names = [
        f"{target['adapter_id']}@{target['revision']}"
        if target.get("revision")
        else str(target["adapter_id"])
        for target in targets
    ]
    if len(names) == 1:
        return names[0]
    return ", ".join(f"{name} ({target['weight']:g})" for name, target in zip(names, targets, strict=True))


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
