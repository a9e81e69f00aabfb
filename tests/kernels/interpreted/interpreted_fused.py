"""The fused small kernels in the interpreter, against their torch twins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fused_cases import make_rope_case

from lorax_kernels import fused_reference, fused_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 576])
def test_rms_norm_with_and_without_residual(width: int, dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(n, width).to(dtype) for n in (3, 3, 1))
    for given in (None, residual):
        got = fused_triton.rms_norm(x, weight[0], 1e-5, given)
        want = fused_reference.rms_norm(x, weight[0], 1e-5, given)
        torch.testing.assert_close(got, want, atol=2e-3 if dtype == torch.float16 else 1e-6, rtol=1e-3)


@pytest.mark.parametrize("width", [100, 1536])
def test_silu_mul(width: int) -> None:
    x = torch.randn(3, 2 * width)
    torch.testing.assert_close(fused_triton.silu_mul(x), fused_reference.silu_mul(x))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [((4, 4), 32), ((9, 3), 64), ((8, 1), 80)], ids=str)
def test_rope_and_cache(heads: tuple[int, int], dim: int, qk_norm: bool) -> None:
    case = make_rope_case(heads, dim, qk_norm)
    want = case.run(fused_reference.rope_and_cache)
    got = case.run(fused_triton.rope_and_cache)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rope_sums_the_planes_of_a_split_product(qk_norm: bool, dtype: torch.dtype) -> None:
    make_rope_case((9, 3), 64, qk_norm, dtype=dtype).check_planes(fused_triton.rope_and_cache)
