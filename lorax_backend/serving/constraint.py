"""The form an answer must have: read from the fields that LoRAX, OpenAI and vLLM know, in one place.

`read_constraint` is the seam: a request with a constraint is understood and checked here, and refused by name as long
as no engine can keep it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorax_backend.errors import UnsupportedError, ValidationError
from lorax_backend.serving.given import Given, at
from lorax_backend.serving.schema import load_json, shorten

ANY_OBJECT: dict[str, Any] = {"type": "object"}
_FORMATS = ("text", "json_object", "json_schema")


@dataclass(frozen=True, slots=True)
class Constraint:
    """`kind` is json_schema, regex, choice or grammar; `value` the schema (a dict), the text, or the texts."""

    kind: str
    value: Any
    field: str


def read_constraint(given: Given) -> None:
    """Check the fields that constrain the answer; problems go to `given`, what is well-formed as unsupported."""
    found = []
    for reader in (_response_format, _schema, _guided, _tool_choice):
        try:
            found.append(reader(given))
        except ValidationError as error:
            given.problems.append(error)
    constraints = [constraint for constraint in found if constraint is not None]
    if len(constraints) > 1:
        given.report(
            f"{' and '.join(item.field for item in constraints)}: both constrain the answer; give one"
        )
    elif constraints:
        given.problems.append(
            UnsupportedError(
                f"{constraints[0].field}: constrained output is not supported by this server; leave it out"
            )
        )


def _response_format(given: Given) -> Constraint | None:
    """LoRAX's {type, schema} and OpenAI's {type, json_schema: {schema}}; type text asks for nothing."""
    fields = given.values.get("response_format")
    if not fields:
        return None
    label = given.label("response_format")
    kind = fields.get("type")
    if kind not in _FORMATS:
        raise ValidationError(f"{at(label, '.type')}: {shorten(kind)} is not one of {', '.join(_FORMATS)}")
    if kind == "text":
        return None
    nested = fields.get("json_schema")
    if nested is not None and not isinstance(nested, dict):
        raise ValidationError(
            f"{at(label, '.json_schema')}: expected an object with a schema, got {shorten(nested)}"
        )
    schema = fields.get("schema") if fields.get("schema") is not None else (nested or {}).get("schema")
    return Constraint("json_schema", _checked_schema(schema, at(label, ".schema")), label)


def _schema(given: Given) -> Constraint | None:
    schema = given.values.get("schema")
    if schema is None:
        return None
    label = given.label("schema")
    return Constraint("json_schema", _checked_schema(schema, label), label)


def _checked_schema(schema: Any, label: str) -> dict[str, Any]:
    if schema is None or schema is True:
        return ANY_OBJECT
    parsed = load_json(schema, label) if isinstance(schema, str) else schema
    if not isinstance(parsed, dict):
        raise ValidationError(f"{label}: expected a JSON schema, an object, got {shorten(parsed)}")
    return parsed


def _guided(given: Given) -> Constraint | None:
    names = {"regex": "guided_regex", "choice": "guided_choice", "grammar": "guided_grammar"}
    found = [
        Constraint(kind, given.values[name], given.label(name))
        for kind, name in names.items()
        if given.values.get(name)
    ]
    if len(found) > 1:
        raise ValidationError(
            f"{' and '.join(item.field for item in found)}: both constrain the answer; give one"
        )
    return found[0] if found else None


def _tool_choice(given: Given) -> Constraint | None:
    """ "auto" and "none" ask for nothing; "required", a name, or OpenAI's object force a call."""
    choice = given.values.get("tool_choice")
    if choice in (None, "", "auto", "none"):
        return None
    label = given.label("tool_choice")
    if not isinstance(choice, str | dict):
        raise ValidationError(f"{label}: expected a text or an object, got {shorten(choice)}")
    if not given.values.get("tools"):
        raise ValidationError(f"{label}: {shorten(choice)} needs tools to choose from")
    return Constraint("choice", choice, label)
