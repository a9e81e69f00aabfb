"""Tables of block sizes as the programs that search them write them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="a table names its version")
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "perf"))

from tuned_tables import shipped, write_table


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)], ids=["a table is known", "none is"])
def test_what_another_program_has_found_stays(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    write_table(tmp_path, "prefill", "a command", {"configs": {"8x8": {}}})
    (file,) = tmp_path.iterdir()
    assert file.name == f"prefill_sm{capability[0]}{capability[1]}.json"
    made, known = json.loads(file.read_text()), shipped("prefill")
    assert made["configs"] == {"8x8": {}}
    assert (made["device"], made["command"]) == ("a card", "a command")
    assert bool(known) == (capability == (9, 0))
    for section in ("silu", "delta", "silu+delta"):
        assert made.get(section) == known.get(section)
