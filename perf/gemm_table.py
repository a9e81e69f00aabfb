"""The table `gemm_smXX.json` as `kernels_gemm.py` writes it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuned_tables import header, shipped

from lorax_kernels.configs import GemmConfig
from lorax_kernels.tuning import table_path


class Table:
    """The table of this device that comes with the kernels, and what is put into it."""

    def __init__(self) -> None:
        self._parts = shipped("gemm")

    def put(self, part: str, key: str, rows: int, config: GemmConfig) -> None:
        self._parts.setdefault(part, {}).setdefault(key, {})[str(rows)] = asdict(config)

    def drop(self, part: str, key: str, rows: int) -> None:
        sizes = self._parts.get(part, {}).get(key, {})
        sizes.pop(str(rows), None)

    def write(self, folder: Path, command: str) -> None:
        """As `lorax_kernels.tuning` reads it."""
        table: dict[str, Any] = dict(header(command))
        for part in ("configs", "head", "shapes"):
            keys = self._parts.get(part, {})
            table[part] = {
                key: dict(sorted(keys[key].items(), key=lambda entry: int(entry[0])))
                for key in sorted(keys, key=lambda key: [int(size) for size in key.split("x")])
                if keys[key]
            }
        lines = re.sub(
            r"{\s+([^{}]+?)\s+}", lambda e: "{" + " ".join(e[1].split()) + "}", json.dumps(table, indent=1)
        )
        (folder / table_path("gemm").name).write_text(lines + "\n")
