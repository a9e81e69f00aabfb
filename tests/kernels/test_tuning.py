"""Where the kernels' configurations come from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lorax_kernels import tuning
from lorax_kernels.configs import DEFAULT, DEFAULT_NODE, LoraConfig
from lorax_kernels.tuning import gemm_config, lora_config, node_config, prefill_config


@pytest.fixture(autouse=True)
def _fresh_configs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kind in ("LORA", "ATTENTION", "NODE", "GEMM", "PREFILL"):
        monkeypatch.delenv(tuning.OVERRIDE.format(kind=kind), raising=False)
    tuning.forget_configs()
    yield
    tuning.forget_configs()


def test_a_device_without_a_table_gets_the_defaults() -> None:
    assert lora_config(32, True) == DEFAULT
    assert node_config() == DEFAULT_NODE
    assert gemm_config(1, 6144, 4096).kernel == "blas"
    assert prefill_config(8192, 4096, 4096).kernel == "blas"


def test_a_table_goes_by_the_next_larger_batch_and_the_environment_goes_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = {1: {"row_n": 64}, 32: {"row_n": 128, "stages": 4, "of another version": 1}}
    monkeypatch.setattr(tuning, "_table", lambda device, kind: table)
    assert [lora_config(n, True, 0).row_n for n in (1, 2, 32, 200)] == [64, 128, 128, 128]
    tuning.forget_configs()
    monkeypatch.setenv("LORAX_LORA_CONFIG", '{"row_n": 256, "overlap": "product_first"}')
    assert lora_config(2, True, 0) == LoraConfig(row_n=256, stages=4, overlap="product_first")


def test_products_go_by_the_nearest_width_and_a_vocabulary_by_its_own_entries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = {"2048": {1: {"block_n": 4}}, "4096": {1: {"block_n": 8}, 16: {"block_n": 64}}}
    tables = {"configs": entries, "head": {"4096": {16: {"block_n": 128}}}}
    monkeypatch.setattr(tuning, "_gemm_table", lambda device: tables)
    asked = [(1, 1024), (1, 2880), (1, 2912), (2, 8192), (32, 4096), (32, 2048)]
    assert [gemm_config(rows, 3 * width, width, 0).block_n for rows, width in asked] == [4, 4, 8, 64, 64, 4]
    assert gemm_config(1, 4096, 14336, 0).block_n == 8, "by the smaller of both sizes"
    assert gemm_config(1, 32000, 2048, 0).block_n == 4
    assert gemm_config(1, 32768, 2048, 0).block_n == 128
    del tables["head"]
    tuning.forget_configs()
    assert gemm_config(1, 32768, 2048, 0).block_n == 4


def test_a_shapes_own_entry_goes_before_that_of_the_width_unless_it_is_for_more_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widths = {"4096": {2: {"block_n": 16}, 32: {"block_n": 128}}}
    shapes = {"6144x4096": {24: {"block_n": 32}, 32: {"block_n": 64}}, "128256x4096": {2: {"block_n": 256}}}
    tables = {"configs": widths, "head": {"4096": {2: {"block_n": 8}}}, "shapes": shapes}
    monkeypatch.setattr(tuning, "_gemm_table", lambda device: tables)
    assert [gemm_config(rows, 6144, 4096, 0).block_n for rows in (1, 2, 3, 24, 25)] == [16, 16, 32, 32, 64]
    assert [gemm_config(rows, 4096, 6144, 0).block_n for rows in (2, 3)] == [16, 128]
    assert gemm_config(2, 128256, 4096, 0).block_n == 256


def test_products_of_many_rows_are_ours_only_where_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"kernel": "triton", "block_m": 64}
    tables = {
        (False, False): {"4096x512": {2048: entry, 8192: entry | {"block_m": 256}}},
        (True, False): {"8192x512": {2048: entry}},
        (False, True): {"4096x512": {512: {"delta": True, "stages": 3}}},
        (True, True): {},
    }
    monkeypatch.setattr(tuning, "_prefill_table", lambda device, silu, delta: tables[silu, delta])
    asked = [(rows, columns, 512, 0) for columns in (4096, 8192) for rows in (2047, 2048, 8191, 9000)]
    assert [prefill_config(*each).block_m for each in asked] == [128, 64, 64, 256] + [128] * 4
    assert [prefill_config(*each).kernel for each in asked[::4]] == ["blas", "blas"]
    assert prefill_config(4096, 8192, 512, 0, silu=True).kernel == "triton"
    assert prefill_config(4096, 4096, 512, 0, silu=True).kernel == "blas"
    with_adapters = [prefill_config(rows, 4096, 512, 0, delta=True) for rows in (511, 512)]
    assert [(config.delta, config.stages, config.parts) for config in with_adapters] == [
        (False, 4, 4),
        (True, 3, 4),
    ]
    assert not prefill_config(512, 4096, 512, 0, silu=True, delta=True).delta
    assert tuning.prefill_rows(0) == [512, 2048, 8192]
    tuning.forget_configs()
    monkeypatch.setenv("LORAX_PREFILL_CONFIG", '{"kernel": "triton"}')
    assert prefill_config(300, 64, 512, 0).block_n == 2 * prefill_config(300, 64, 512, 0, silu=True).block_n


@pytest.mark.parametrize("capability", [(9, 0), (1, 0)])
def test_the_tables_that_come_with_the_kernels_can_be_read(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    tuned = capability == (9, 0)
    tuning._gemm_table.cache_clear()
    for rows, columns in ((1, 6144), (8, 128256), (32, 6144)):
        assert (gemm_config(rows, columns, 4096, 0).kernel == "triton") == tuned
    tuning._gemm_table.cache_clear()


@pytest.mark.parametrize("text", ["pdl=true", '["pdl"]', '{"pld": true}'])
def test_an_environment_that_cannot_be_meant_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAX_LORA_CONFIG", text)
    with pytest.raises(ValueError, match=r"LORAX_LORA_CONFIG: .* is no JSON"):
        lora_config(1, True)
