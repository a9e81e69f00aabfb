"""Products of many rows in the interpreter, against float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel_settings import configured

from lorax_kernels import dispatch, prefill_gemm
from lorax_kernels.configs import PrefillConfig
from lorax_kernels.fused_reference import silu_mul
from lorax_kernels.prefill_gemm import chosen, prefill_linear, prefill_linear_silu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
SMALL = PrefillConfig(block_m=16, block_n=32, block_k=32, group=2)
CONFIGS = {
    "from tile to tile": SMALL,
    "a program a tile": replace(SMALL, programs=0, flatten=False, group=8),
    "in two parts": replace(SMALL, block_m=32, parts=2),
}


def make(rows: int, columns: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, width).to(dtype), (torch.randn(columns, width) * width**-0.5).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize(("rows", "columns", "width"), [(64, 96, 64), (37, 72, 88)])
def test_many_rows_equal_float64(
    rows: int, columns: int, width: int, config: str, dtype: torch.dtype
) -> None:
    x, weight = make(rows, columns, width, dtype)
    bias = torch.randn(columns).to(dtype)
    for given in (None, bias):
        got = prefill_linear(x, weight, given, CONFIGS[config])
        want = torch.nn.functional.linear(
            x.double(), weight.double(), None if given is None else given.double()
        )
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize(("rows", "inner", "width"), [(64, 96, 64), (37, 72, 88)])
def test_silu_and_multiplication_are_done_on_the_way(
    rows: int, inner: int, width: int, config: str, dtype: torch.dtype
) -> None:
    x, weight = make(rows, 2 * inner, width, dtype)
    got = prefill_linear_silu(x, weight, CONFIGS[config])
    want = silu_mul(x.double() @ weight.double().T)
    assert got.dtype == dtype
    assert got.shape == (rows, inner)
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("silu", [False, True], ids=["alone", "silu"])
def test_a_row_does_not_depend_on_the_others_or_on_the_tiles(silu: bool) -> None:
    x, weight = make(40, 64, 64, torch.float32)

    def call(rows: torch.Tensor, config: PrefillConfig) -> torch.Tensor:
        return (
            prefill_linear_silu(rows, weight, config) if silu else prefill_linear(rows, weight, None, config)
        )

    whole = call(x, SMALL)
    assert torch.equal(call(x[24:29], SMALL), whole[24:29])
    assert torch.equal(call(x, replace(SMALL, group=1, programs=0)), whole)


def test_rows_may_lie_apart() -> None:
    x, weight = make(20, 32, 128, torch.float32)
    apart, half = x[:, 64:], weight[:, 64:].contiguous()
    torch.testing.assert_close(prefill_linear(apart, half, None, SMALL), apart @ half.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("x", "weight"),
    [((0, 32), (16, 32)), ((2, 32), (16, 48)), ((2, 20), (16, 20)), ((2, 32), (12, 32)), ((2, 3, 32), (16, 32))],
    ids=["no rows", "other width", "odd width", "odd columns", "three dimensions"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prefill_linear: x"):
        prefill_linear(torch.zeros(x), torch.zeros(weight), None, SMALL)
    with pytest.raises(ValueError, match="prefill_linear_silu: x"):
        prefill_linear_silu(torch.zeros(x), torch.zeros(weight), SMALL)


@pytest.fixture
def _by_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_uses_triton", lambda tensor: True)
    with configured(monkeypatch, prefill={"kernel": "triton", "block_m": 64, "block_n": 64}):
        yield


@pytest.mark.usefixtures("_by_environment")
@pytest.mark.parametrize(("rows", "ours"), [(255, False), (256, True)])
def test_a_table_decides_for_many_rows(rows: int, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for name in ("prefill_linear", "prefill_linear_silu"):
        plain = getattr(prefill_gemm, name)

        def noted(
            *args: object, name: str = name, plain: Callable[..., torch.Tensor] = plain
        ) -> torch.Tensor:
            made.append(name)
            return plain(*args)

        monkeypatch.setattr(prefill_gemm, name, noted)
    x, weight = make(rows, 128, 64, torch.float16)
    want = x.double() @ weight.double().T
    torch.testing.assert_close(dispatch.linear(x, weight).double(), want, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(
        dispatch.linear_silu_mul(x, weight).double(), silu_mul(want), atol=1e-2, rtol=1e-2
    )
    assert made == (["prefill_linear", "prefill_linear_silu"] if ours else [])


def test_without_a_table_products_are_the_librarys() -> None:
    x, weight = make(512, 64, 64, torch.float16)
    assert chosen(x, weight) is None
    assert chosen(x, weight, silu=True) is None
