"""Attention and the fused small kernels on a CUDA device against float64 or their torch twins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from attention_cases import expected_attention, make_attention_case
from fused_cases import make_rope_case

from lorax_kernels import fused_reference, paged_attention, rms_norm, rope_and_cache, silu_mul, write_kv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
BATCHES = {
    "one token": ((1,), (1,)),
    "decode": ((1,) * 5, (5, 33, 16, 257, 1000)),
    "long decode": ((1,) * 3, (9000, 2, 4097)),
    "many decodes": ((1,) * 200, tuple(range(1, 401, 2))),
    "fresh prefill": ((7, 400, 129), (7, 400, 129)),
    "prefill over a prefix": ((5, 1, 333), (20, 16, 1600)),
    "mixed": ((1, 1, 120, 3), (64, 2000, 120, 90)),
}


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(got).all()
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", list(BATCHES))
def test_paged_attention(name: str, window: int | None, dtype: torch.dtype) -> None:
    case = make_attention_case(*BATCHES[name], heads=(8, 2), head_dim=128, dtype=dtype, device="cuda")
    got = paged_attention(case.q, case.k_cache, case.v_cache, case.batch("cuda"), case.scale, window)
    close(got, expected_attention(case, window), dtype)


@pytest.mark.parametrize("heads", [(9, 3), (32, 8), (16, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
def test_any_grouping_of_heads_and_width(heads: tuple[int, int], dim: int) -> None:
    case = make_attention_case((1, 1, 90), (1400, 30, 190), heads=heads, head_dim=dim, dtype=torch.bfloat16,
                               device="cuda")  # fmt: skip
    got = paged_attention(case.q, case.k_cache, case.v_cache, case.batch("cuda"), case.scale)
    close(got, expected_attention(case), torch.bfloat16)


def test_attention_in_a_graph_follows_the_context_lengths_in_memory() -> None:
    case = make_attention_case(
        (1,) * 6, (3000, 40, 600, 1, 128, 700), heads=(8, 2), dtype=torch.bfloat16, device="cuda"
    )
    batch = case.batch("cuda")
    want = paged_attention(case.q, case.k_cache, case.v_cache, batch, case.scale)
    lengths = batch.context_lens.clone()
    batch.context_lens.fill_(5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = paged_attention(case.q, case.k_cache, case.v_cache, batch, case.scale)
    for _ in range(3):
        batch.context_lens.copy_(lengths)
        graph.replay()
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


def test_write_kv() -> None:
    k, v = (torch.randn(50, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    caches = [torch.zeros(10, 16, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.randperm(160, device="cuda")[:50]
    slots[7] = -1
    write_kv(k, v, *caches, slots)
    kept = slots >= 0
    for cache, rows in zip(caches, (k, v), strict=True):
        assert torch.equal(cache.view(160, 8, 128)[slots[kept]], rows[kept])
        assert int((cache.view(160, -1).abs().sum(1) > 0).sum()) == 49


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fused_small_kernels(dtype: torch.dtype) -> None:
    x, residual = (torch.randn(70, 4096, device="cuda", dtype=dtype) for _ in range(2))
    weight = torch.rand(4096, device="cuda", dtype=dtype) + 0.5
    for given in (None, residual):
        got, want = rms_norm(x, weight, 1e-5, given), fused_reference.rms_norm(x, weight, 1e-5, given)
        torch.testing.assert_close(got, want, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
    torch.testing.assert_close(silu_mul(x), fused_reference.silu_mul(x), atol=2e-2, rtol=2e-2)
    for qk_norm in (False, True):
        case = make_rope_case((32, 8), 128, qk_norm, tokens=30, dtype=dtype, device="cuda")
        for one, other in zip(
            case.run(rope_and_cache), case.run(fused_reference.rope_and_cache), strict=True
        ):
            torch.testing.assert_close(one, other, atol=3e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
        case.check_planes(rope_and_cache)
