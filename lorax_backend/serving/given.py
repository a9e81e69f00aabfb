"""What a caller sent, merged from its three sources and converted to the types of `schema`.

Precedence: input tensor, then the `sampling_parameters` JSON, then request parameter. Problems are collected, so that
all of a request's are reported together.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from lorax_backend.errors import UnsupportedError, ValidationError
from lorax_backend.serving.schema import (
    BY_NAME,
    CONSTRAINT_PARAMETERS,
    PROMPT_PARAMETERS,
    Parameter,
    load_json,
    shorten,
)

SAMPLING_JSON = "sampling_parameters"
# Keys that clients and gateways send along and that ask for nothing.
_HARMLESS = frozenset(
    {"model", "user", "id", "request_id", "metadata", "service_tier", "store", "headers", "authorization"}
    | {"traceparent", "tracestate", "timeout", "sequence_id", "sequence_start", "sequence_end"}
    | {
        "binary_data_output",
        "host",
        "accept",
        "connection",
        "cookie",
        "te",
        "origin",
        "referer",
        "via",
        "forwarded",
    }
)
_PROMPT_NAMES = frozenset(parameter.name for parameter in PROMPT_PARAMETERS)


def at(label: str, place: str) -> str:
    """A place inside a field, such as `.ids` or `[3]`, after the field's name and before where it was given."""
    name, separator, where = label.partition(" (in ")
    return f"{name}{place}{separator}{where}"


@dataclass(slots=True)
class RawRequest:
    """A request as it arrived.

    `fields` holds the input tensors given, by name, as plain values: str, bool, int, float or lists of them.
    `parameters` holds Triton's request parameters. None values count as not given.
    """

    request_id: str
    fields: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Given:
    """Values by canonical name, and the problems met on the way."""

    values: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    problems: list[ValidationError] = field(default_factory=list)

    def report(self, message: str) -> None:
        self.problems.append(ValidationError(message))

    def label(self, name: str) -> str:
        """The field's name as the caller wrote it."""
        return self.labels.get(name, name)

    def raise_problems(self) -> None:
        if not self.problems:
            return
        kind = (
            UnsupportedError
            if all(isinstance(p, UnsupportedError) for p in self.problems)
            else ValidationError
        )
        raise kind("; ".join(problem.message for problem in self.problems))


def collect(raw: RawRequest) -> Given:
    """Merge the three sources by precedence and convert every value."""
    given = Given()
    _take(given, {k: v for k, v in raw.fields.items() if k != SAMPLING_JSON}, "")
    text = raw.fields.get(SAMPLING_JSON, raw.parameters.get(SAMPLING_JSON))
    if text is not None and text != "":
        try:
            parsed = load_json(text, SAMPLING_JSON) if isinstance(text, str) else text
        except ValidationError as error:
            given.problems.append(error)
        else:
            if isinstance(parsed, dict):
                _take(given, parsed, f" (in {SAMPLING_JSON})")
            else:
                given.report(f"{SAMPLING_JSON}: expected a JSON object, got {shorten(parsed)}")
    _take(given, {k: v for k, v in raw.parameters.items() if k != SAMPLING_JSON and not _is_foreign(k)}, "")
    return given


def _is_foreign(name: str) -> bool:
    """Request parameters that the server or a proxy added: forwarded headers and Triton's own."""
    header = "-" in name and name.replace("-", "_") not in BY_NAME
    return header or name.startswith("triton_")


def _take(given: Given, source: dict[str, Any], where: str) -> None:
    """Add the values of one source for the names that no source before it gave."""
    taken: dict[str, tuple[str, Any]] = {}
    for name, value in source.items():
        parameter = BY_NAME.get(name)
        if parameter is None:
            if name not in _HARMLESS:
                given.report(_unknown(name, where))
            continue
        if value is None:
            continue
        if where and parameter.name in _PROMPT_NAMES:
            given.report(f"{name}{where}: not a sampling parameter; send it as an input tensor")
            continue
        if parameter.name in given.labels:  # a source before this one gave it
            continue
        if parameter.name in taken and taken[parameter.name][1] != value and parameter.neutral is None:
            given.report(
                f"{name}{where}: also given as {taken[parameter.name][0]} with another value; give one"
            )
            continue
        taken[parameter.name] = (name, value)
        _convert(given, parameter, value, f"{name}{where}")
    for name, (used, _) in taken.items():
        given.labels.setdefault(name, f"{used}{where}")


def _convert(given: Given, parameter: Parameter, value: Any, label: str) -> None:
    try:
        if parameter in CONSTRAINT_PARAMETERS and value == "":
            return
        if parameter.name == "logprobs" and isinstance(value, bool):
            if not value:
                return
            value = 0  # the OpenAI chat API asks with true
        if parameter.name == "return_k_alternatives" and value == 0:
            return
        result = parameter.read(value, label)
    except ValidationError as error:
        given.problems.append(error)
    else:
        given.values[parameter.name] = result


def _unknown(name: str, where: str) -> str:
    near = difflib.get_close_matches(name.lower(), list(BY_NAME), n=1)
    return f"{shorten(name)}{where}: unknown parameter" + (f"; did you mean {near[0]}?" if near else "")
