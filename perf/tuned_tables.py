"""The tables of `lorax_kernels/tuned` as the programs that search them write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from lorax_kernels.tuning import table_path


def shipped(kind: str) -> dict[str, Any]:
    """The table of this device that comes with the kernels; empty if there is none."""
    path = table_path(kind)
    table: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return table


def header(command: str) -> dict[str, str]:
    """What and which versions a table is of."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": command,
    }


def write_table(folder: Path, kind: str, command: str, sections: Mapping[str, Any]) -> None:
    """Write a table to `folder`: these sections, and as they come with the kernels those that another program finds."""
    table = {**shipped(kind), **header(command), **sections}
    (folder / table_path(kind).name).write_text(json.dumps(table, indent=1) + "\n")
