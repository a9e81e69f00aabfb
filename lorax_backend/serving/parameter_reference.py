"""The tables of docs/parameters.md, generated from the schema.

`python -m lorax_backend.serving.parameter_reference docs/parameters.md` writes them anew between the file's markers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lorax_backend.generated_text import with_part
from lorax_backend.serving.schema import PARAMETERS, Parameter

_BEGIN = "<!-- parameters: begin (written by lorax_backend/serving/parameter_reference.py) -->"
_END = "<!-- parameters: end -->"
_TYPES = {
    "bool": "bool", "int": "integer", "float": "number", "text": "text", "texts": "list of texts",
    "ids": "list of integers", "object": "JSON object", "objects": "JSON list of objects", "any": "any",
}  # fmt: skip


def parameter_tables() -> str:
    """Markdown: one table of the parameters served, one of those refused by name."""
    served = [
        "| name | also | type | range | default | meaning |", "|---|---|---|---|---|---|",
        *(_row(parameter) for parameter in PARAMETERS if parameter.neutral is None),
    ]  # fmt: skip
    refused = [
        "| name | also | accepted values |", "|---|---|---|",
        *(_refused_row(parameter) for parameter in PARAMETERS if parameter.neutral is not None),
    ]  # fmt: skip
    return "\n".join([*served, "", "Known, but not served yet; any other value is an error that names the field:", "",
                      *refused])  # fmt: skip


def with_tables(text: str) -> str:
    """The document with its tables written anew.

    Raises:
        ValueError: the markers are missing.
    """
    return with_part(text, _BEGIN, _END, parameter_tables())


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _row(parameter: Parameter) -> str:
    cells = (
        f"`{parameter.name}`", _names(parameter.aliases), _TYPES[parameter.kind], parameter.range_text,
        parameter.default, parameter.doc,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _refused_row(parameter: Parameter) -> str:
    accepted = [repr(value).lower() if isinstance(value, bool) else str(value) for value in parameter.neutral or ()
                if value not in (None, "", {}, [])]  # fmt: skip
    if parameter.name == "response_format":
        accepted.append('{"type": "text"}')
    return f"| `{parameter.name}` | {_names(parameter.aliases)} | {', '.join(accepted) or 'none'} |"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
