"""Prometheus text: fetching it, merging pages of several servers, and LoRAX's JSON form of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{.*\})? ([^ ]+)(?: -?\d+)?$")
_COMMENT = re.compile(r"^# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) ?(.*)$")


async def http_get(url: str, timeout: float) -> str:
    """The body of a page within this deployment. No redirects, no encryption.

    Raises:
        OSError: nobody answers there.
        ValueError: the answer is not a page.
        TimeoutError: it took longer than `timeout` seconds.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url}: expected http://host:port/metrics")
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        try:
            path = parts.path or "/metrics"
            # HTTP/1.0: the answer comes in one piece and ends with the connection.
            writer.write(f"GET {path} HTTP/1.0\r\nHost: {parts.netloc}\r\n\r\n".encode())
            await writer.drain()
            answer = await reader.read(-1)
        finally:
            writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        raise ValueError(f"{url} answered {head[:60]!r}")
    return body.decode(errors="replace")


def label_samples(page: str, label: str, value: str) -> str:
    """The page with a label added to every sample."""
    escaped = value.replace("\\", r"\\").replace('"', r"\"")
    lines = []
    for line in page.splitlines():
        sample = _SAMPLE.match(line)
        if sample:
            name, labels, rest = sample[1], sample[2], line[sample.end(2) if sample[2] else sample.end(1) :]
            inner = labels[1:-1].rstrip(",") + "," if labels and labels != "{}" else ""
            line = f'{name}{{{inner}{label}="{escaped}"}}{rest}'
        lines.append(line)
    return "\n".join(lines) + "\n"


def _families(pages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Metrics by name, each with its comments, type and samples (name, labels, value)."""
    families: dict[str, dict[str, Any]] = {}
    for page in pages:
        for line in page.splitlines():
            comment, sample = _COMMENT.match(line), _SAMPLE.match(line)
            if comment:
                kind, name, text = comment.groups()
                family = families.setdefault(name, {"HELP": None, "TYPE": None, "samples": []})
                family[kind] = family[kind] or text
            elif sample:
                name = _family_of(sample[1], families)
                family = families.setdefault(name, {"HELP": None, "TYPE": None, "samples": []})
                family["samples"].append((sample[1], sample[2] or "", sample[3]))
    return families


def _family_of(name: str, families: dict[str, dict[str, Any]]) -> str:
    for suffix in ("_bucket", "_sum", "_count"):
        base = name.removesuffix(suffix)
        if base != name and families.get(base, {}).get("TYPE") in ("histogram", "summary"):
            return base
    return name


def merge(pages: Sequence[str]) -> str:
    """One page out of several: a metric that stands in more than one is declared once."""
    lines = []
    for name, family in _families(pages).items():
        lines += [f"# {kind} {name} {family[kind]}" for kind in ("HELP", "TYPE") if family[kind] is not None]
        lines += [f"{sample}{labels} {value}" for sample, labels, value in family["samples"]]
    return "\n".join(lines) + "\n"


def to_json(page: str) -> dict[str, Any]:
    """LoRAX's JSON form: {name: {"type", "data": [{"key", "value"}]}}; the key is the sample with its labels, or
    `sum` or `count`. Values that JSON cannot hold are null."""
    result: dict[str, Any] = {}
    for name, family in _families([page]).items():
        data = []
        for sample, labels, value in family["samples"]:
            bare = sample.removeprefix(name + "_") if sample != name and not labels else ""
            data.append(
                {"key": bare if bare in ("sum", "count") else sample + labels, "value": _number(value)}
            )
        result[name] = {"type": family["TYPE"] or "untyped", "data": data}
    return result


def _number(text: str) -> float | None:
    value = float(text)
    return value if value == value and abs(value) != float("inf") else None
