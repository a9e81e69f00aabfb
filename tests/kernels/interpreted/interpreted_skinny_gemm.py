"""Products of few rows in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from lorax_kernels.skinny_gemm import linear, share, skinny_linear
from lorax_kernels.tuning import GemmConfig

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(block_n=16, block_k=128, stages=1),
        GemmConfig(block_n=32, block_k=64, stages=2),
        GemmConfig(block_n=64, block_k=64, split_k=4),
    ],
    ids=["narrow", "two stages", "split"],
)
@pytest.mark.parametrize("rows", [1, 7, 17])
def test_few_rows_equal_float64(rows: int, config: GemmConfig, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, 592), (104, 592), (104,)))
    for given in (None, bias):
        got = skinny_linear(x, weight, given, config)
        want = torch.nn.functional.linear(
            x.double(), weight.double(), None if given is None else given.double()
        )
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight = torch.randn(16, 256), torch.randn(64, 256)
    config = GemmConfig(block_k=64)
    whole = skinny_linear(x, weight, None, config)
    assert torch.equal(skinny_linear(x[3:5], weight, None, config), whole[3:5])


def test_rows_may_lie_apart() -> None:
    x, weight = torch.randn(4, 512), torch.randn(32, 256)
    for rows in (1, 4):
        apart = x[:rows, 256:]
        got = skinny_linear(apart, weight, None, GemmConfig(block_k=64))
        torch.testing.assert_close(got, apart @ weight.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        ((33, 32), (16, 32)),
        ((0, 32), (16, 32)),
        ((2, 32), (16, 48)),
        ((2, 24), (16, 24)),
        ((2, 3, 32), (16, 32)),
    ],
    ids=["many rows", "no rows", "other width", "odd width", "three dimensions"],
)
def test_what_does_not_fit_is_refused(x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="skinny_linear: x"):
        skinny_linear(torch.zeros(x), torch.zeros(weight))


def test_without_a_table_products_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorax_kernels.skinny_gemm.skinny_linear", None)
    x, weight = torch.randn(2, 32), torch.randn(16, 32)
    assert torch.equal(linear(x, weight), x @ weight.T)


def test_small_layers_get_narrower_programs_or_splits() -> None:
    plain, split = GemmConfig(block_n=64), GemmConfig(block_n=64, split_k=4)
    assert share(4096, 28672, plain, 132) == (64, 1)
    assert share(4096, 4096, plain, 132) == (32, 1)
    assert share(14336, 4096, split, 132) == (64, 2)
    assert share(512, 16, split, 132) == (16, 1)
