"""Metrics of a server: fetched from Triton's metrics port, as text or as an object. Standard library only."""

from __future__ import annotations

import re
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from lorax_triton.errors import LoraxError, ServerConnectionError, ValidationError, parse_error

DEFAULT_METRICS_PORT = 8002
FORMATS = ("prometheus", "json")

# name{label="value",...} number [timestamp]
_SAMPLE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)\s*(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?$")
_LABEL = re.compile(r'\s*([A-Za-z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_ESCAPES = {"n": "\n", "\\": "\\", '"': '"'}
# Samples of a histogram or summary carry their family's name with one of these.
_SUFFIXES = ("_bucket", "_sum", "_count")


def metrics_address(target: str, metrics_url: str | None) -> str:
    """Where to fetch metrics: `metrics_url`, or port 8002 of the host of the gRPC address `target`.

    Raises:
        ValueError: `metrics_url` is no http address.
    """
    if metrics_url is None:
        host = "localhost" if target.startswith("unix:") else target.rpartition(":")[0]
        return f"http://{host}:{DEFAULT_METRICS_PORT}/metrics"
    parts = urllib.parse.urlsplit(metrics_url if "://" in metrics_url else f"http://{metrics_url}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"metrics_url {metrics_url!r}: give http://host:{DEFAULT_METRICS_PORT}/metrics")
    return urllib.parse.urlunsplit(parts._replace(path=parts.path if parts.path.strip("/") else "/metrics"))


def fetch_metrics(url: str, format: str, timeout: float | None) -> str | dict[str, Any]:
    """The metrics behind `url`, as the server's text or as `parse_prometheus` gives them.

    Args:
        url: http address of the metrics.
        format: "prometheus" or "json".
        timeout: longest wait in seconds; None waits for ever.

    Raises:
        ValidationError: there is no such format.
        ServerConnectionError: nothing answers there.
        LoraxError: the answer is an error, or no metrics.
    """
    if format not in FORMATS:
        raise ValidationError(f"`format={format}` must be one of {', '.join(FORMATS)}")
    request = urllib.request.Request(url, headers={"Accept": "text/plain"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(500).decode(errors="replace").strip() or error.reason
        raise parse_error(error.code, {"error": f"{url}: {said}"}) from None
    except OSError as problem:
        reason = getattr(problem, "reason", problem)
        raise ServerConnectionError(
            f"No metrics at {url}: {reason}; `metrics_url` names another place"
        ) from None
    return text if format == "prometheus" else parse_prometheus(text)


def parse_prometheus(text: str) -> dict[str, Any]:
    """Metrics in Prometheus' text format as an object: family -> `type`, `help` and `samples`.

    Each sample has `labels` (name -> text) and `value` (a float, which may be infinite or no number); those of
    histograms and summaries also have `name`, which tells buckets, sums and counts apart.

    Raises:
        LoraxError: a line is none of that format.
    """
    families: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("#"):
            _read_comment(line, families)
        elif line:
            _read_sample(line, families)
    return families


def _read_comment(line: str, families: dict[str, dict[str, Any]]) -> None:
    words = line.split(None, 3)
    if len(words) >= 3 and words[1] in ("TYPE", "HELP"):
        value = words[3] if len(words) > 3 else ""
        _family(families, words[2])[words[1].lower()] = value


def _read_sample(line: str, families: dict[str, dict[str, Any]]) -> None:
    match = _SAMPLE.match(line)
    try:
        value = float(match["value"] if match else "")
    except ValueError:
        match = None
    if match is None:
        raise LoraxError(f"The server's metrics cannot be read at {line[:200]!r}")
    name = match["name"]
    sample: dict[str, Any] = {
        "labels": {key: _unescape(value) for key, value in _LABEL.findall(match["labels"] or "")},
        "value": value,
    }
    family = name
    for suffix in _SUFFIXES:
        stem = name.removesuffix(suffix)
        if stem != name and families.get(stem, {}).get("type") in ("histogram", "summary"):
            family = stem
    if families.get(family, {}).get("type") in ("histogram", "summary"):
        sample["name"] = name
    _family(families, family)["samples"].append(sample)


def _family(families: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return families.setdefault(name, {"type": "untyped", "help": "", "samples": []})


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[0]), text)
