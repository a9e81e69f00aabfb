"""The table of options in docs/configuration.md, generated from ServerConfig.

`python -m lorax_backend.cli.reference docs/configuration.md` writes it anew between the file's two markers.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from lorax_backend.config import ServerConfig
from lorax_backend.generated_text import with_part

BEGIN = "<!-- options: begin (written by lorax_backend/cli/reference.py) -->"
END = "<!-- options: end -->"


def options_table() -> str:
    """A Markdown table with a row for every option."""
    lines = ["| flag | environment | default | meaning |", "|---|---|---|---|"]
    for field in fields(ServerConfig):
        flag = "--" + field.name.replace("_", "-")
        default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        shown = f"`{default}`" if default else "empty"
        meaning = field.metadata["help"]
        choices = ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
        if choices:
            meaning += f"; one of {choices}"
        lines.append(f"| `{flag}` | `{field.name.upper()}` | {shown} | {meaning} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """`text` with what stands between its two markers replaced by the table.

    Raises:
        ValueError: a marker is missing.
    """
    return with_part(text, BEGIN, END, options_table())


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text()))
