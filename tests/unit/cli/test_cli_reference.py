"""The documentation's tables of options agree with the program."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from lorax_backend.cli.main import build_parser
from lorax_backend.cli.reference import options_table, with_table
from lorax_backend.config import ServerConfig

ROOT = Path(__file__).resolve().parents[3]


def test_the_table_of_options_is_the_generators_output() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert with_table(text) == text, "run: python -m lorax_backend.cli.reference docs/configuration.md"


def test_the_table_has_a_row_for_every_option() -> None:
    table = options_table()
    assert all(f"`{field.name.upper()}`" in table for field in fields(ServerConfig))


def test_a_text_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="options: begin"):
        with_table("nothing to fill in")


@pytest.mark.parametrize("document", ["README.md", "docs/configuration.md", "CONTRIBUTING.md"])
def test_every_flag_a_document_names_exists(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) | {"--url", "--json"}
    named = set()
    for line in (ROOT / document).read_text().splitlines():
        if "lorax-triton" in line or line.startswith("| `--"):
            named |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line.partition("lorax-triton")[2] or line))
    assert named - known == set()
