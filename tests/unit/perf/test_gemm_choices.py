"""What the search of configurations for few rows tries, and the table it writes; nothing is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels' package needs it")

import gemm_choices as program
from gemm_chain import MODELS, shapes_of
from gemm_table import Table

from lorax_kernels.configs import DEFAULT_GEMM, GemmConfig
from lorax_kernels.sizes import cdiv

SMS = 132


@pytest.mark.parametrize("rows", [2, 32])
@pytest.mark.parametrize("model", list(MODELS))
def test_what_is_tried_for_one_weight_loads_all_multiprocessors_alike(model: str, rows: int) -> None:
    best = program.choices(rows)[:3]
    for site, (columns, width) in shapes_of(model).items():
        tried = program.site_choices(rows, site, (columns, width), SMS, best)
        assert tried[:4] == [*best, DEFAULT_GEMM]
        assert len(set(tried)) == len(tried)
        new = tried[4:]
        assert new
        assert all(config.exact for config in new)
        if site == "gate_up":
            assert {config.split_k for config in new} == {1}
            continue
        for config in new:
            assert program.imbalance(columns, width, config, SMS) < 1.11
            assert cdiv(columns, config.block_n) * config.split_k >= 0.9 * SMS
            assert width >= 2 * config.split_k * config.block_k


def test_an_uneven_load_is_what_the_busiest_multiprocessor_reads() -> None:
    config = GemmConfig(block_n=128, block_k=128, split_k=8, exact=True)
    assert program.imbalance(128 * 4, 1024, config, 16) == 2 / 2
    assert program.imbalance(128 * 3, 1024, config, 16) == 2 / 1.5
    longer = GemmConfig(block_n=128, block_k=256, split_k=3, exact=True)
    assert program.imbalance(128, 1024, longer, 2) == pytest.approx(2 * 256 * 2 / 1024), (
        "two parts, not three"
    )


def test_a_single_row_is_tried_with_what_is_best_for_all_and_its_own_list() -> None:
    own = program.choices(1)
    assert program.site_choices(1, "o", (64, 64), SMS, own[2:3]) == [own[2], *own[:2], *own[3:-1]]


def test_a_table_keeps_what_was_not_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a device")
    before = Table()
    before.write(tmp_path, "as it was")
    written = tmp_path / "gemm_sm90.json"
    known = json.loads(written.read_text())
    table = Table()
    table.put("shapes", "96x64", 32, GemmConfig(kernel="triton", exact=True))
    table.put("shapes", "640x64", 2, DEFAULT_GEMM)
    table.drop("shapes", "640x64", 2)
    table.put("configs", "2048", 1, DEFAULT_GEMM)
    table.write(tmp_path, "again")
    now = json.loads(written.read_text())
    assert now["command"] == "again"
    assert now["shapes"].pop("96x64")["32"]["exact"]
    assert now["configs"]["2048"].pop("1")["kernel"] == "blas"
    del known["configs"]["2048"]["1"]
    assert [now[part] for part in ("configs", "head", "shapes")] == [
        known[part] for part in ("configs", "head", "shapes")
    ]
