"""Products of few rows in the interpreter, against float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel_settings import configured

from lorax_kernels import fused_triton, skinny_gemm
from lorax_kernels.configs import GemmConfig
from lorax_kernels.skinny_gemm import begin_linear, linear, linear_silu, share, skinny_linear

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


CONFIGS = {
    "narrow": GemmConfig(block_n=16, block_k=128, stages=1),
    "two stages": GemmConfig(block_n=32, block_k=64, stages=2),
    "split": GemmConfig(block_n=64, block_k=64, split_k=4),
    "swapped": GemmConfig(block_n=64, block_k=128, swap=True),
    "exact": GemmConfig(block_n=32, block_k=128, split_k=3, exact=True),
    "swapped split": GemmConfig(block_n=64, block_k=32, split_k=4, swap=True),
}


@pytest.fixture
def _split(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table that splits K, and multiprocessors enough for that."""
    monkeypatch.setattr(skinny_gemm, "_num_sms", lambda index: 20)
    with configured(monkeypatch, gemm={"kernel": "triton", "block_n": 16, "block_k": 64, "split_k": 4}):
        yield


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
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


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("rows", [1, 7, 17])
def test_silu_in_the_product_is_silu_after_it(rows: int, config: GemmConfig, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, 592), (104, 592), (104,)))
    weight = weight / 24  # or SiLU would overflow
    for given in (None, bias):
        apart = skinny_linear(x, weight, given, replace(config, split_k=1))
        got = skinny_linear(x, weight, given, config, silu=True)
        assert torch.equal(got, fused_triton.silu_mul(apart))


@pytest.mark.usefixtures("_split")
def test_a_product_that_is_split_leaves_silu_to_others() -> None:
    x, wide, narrow = torch.randn(7, 1024), torch.randn(640, 1024) / 32, torch.randn(64, 1024)
    assert linear_silu(x, narrow) is None
    for rows in (1, 7):
        whole = linear_silu(x[:rows], wide)
        assert whole is not None
        assert torch.equal(whole, fused_triton.silu_mul(linear(x[:rows], wide)))


@pytest.mark.usefixtures("_split")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_norm_sums_the_planes_of_a_split_product(dtype: torch.dtype) -> None:
    x, weight, before = (torch.randn(*shape).to(dtype) for shape in ((7, 1024), (72, 1024), (7, 72)))
    planes = begin_linear(x, weight)
    assert planes.shape == (4, 7, 72)
    scale = torch.randn(72).to(dtype)
    got = fused_triton.rms_norm(before, scale, 1e-5, planes)
    want = fused_triton.rms_norm(before, scale, 1e-5, linear(x, weight))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert begin_linear(x, weight, torch.randn(72).to(dtype)).dim() == 2, "a bias is added before rounding"
    assert begin_linear(x[:1], weight).shape == (1, 72)
    with pytest.raises(ValueError, match="planes"):
        fused_triton.rms_norm(before, scale, 1e-5, planes.half())


@pytest.mark.usefixtures("_split")
def test_a_configuration_that_is_given_goes_before_the_table() -> None:
    x, weight = torch.randn(2, 256), torch.randn(64, 256) / 16
    exact = GemmConfig(kernel="triton", block_n=64, block_k=64, split_k=2, exact=True, swap=True)
    assert begin_linear(x, weight).dim() == 3
    assert begin_linear(x, weight, None, exact).shape == (2, 2, 64)
    assert begin_linear(x, weight, None, replace(exact, fuse_sum=False)).shape == (2, 64)
    assert linear_silu(x, weight, None, exact) is None
    assert linear_silu(x, weight, None, replace(exact, split_k=1)) is not None
    assert torch.equal(linear(x, weight, None, GemmConfig()), x @ weight.T)


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


def test_an_exact_share_is_not_changed_by_the_multiprocessors() -> None:
    exact = GemmConfig(block_n=64, block_k=128, split_k=6, exact=True)
    for width, columns, splits in ((2048, 3072, 6), (4096, 28672, 6), (512, 16, 4)):
        assert share(width, columns, exact, 132) == (64, splits)
