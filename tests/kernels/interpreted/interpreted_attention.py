"""Attention kernels in the interpreter, against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_cases import expected_attention, make_attention_case

from lorax_kernels import attention_triton

BATCHES = {
    "decode": ((1, 1, 1), (5, 33, 16)),
    "one token": ((1,), (1,)),
    "split decode": ((1,) * 3, (700, 2, 300)),
    "fresh prefill": ((7, 40), (7, 40)),
    "prefill over a prefix": ((5, 1, 33), (20, 16, 160)),
    "mixed": ((1, 1, 12, 3), (64, 200, 12, 90)),
}


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("name", list(BATCHES))
def test_attention_sees_exactly_its_own_past(name: str, window: int | None) -> None:
    case = make_attention_case(*BATCHES[name], seed=len(name))
    got = attention_triton.paged_attention(
        case.q, case.k_cache, case.v_cache, case.batch(), case.scale, window
    )
    torch.testing.assert_close(got.double(), expected_attention(case, window), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "dim"),
    [((4, 4), 32), ((9, 3), 64), ((8, 1), 80), ((32, 1), 128), ((4, 2), 256), ((3, 3), 96)],
    ids=str,
)
def test_any_grouping_of_heads_and_width(heads: tuple[int, int], dim: int) -> None:
    case = make_attention_case((1, 1, 9), (140, 30, 29), heads=heads, head_dim=dim)
    got = attention_triton.paged_attention(case.q, case.k_cache, case.v_cache, case.batch(), case.scale)
    torch.testing.assert_close(got.double(), expected_attention(case), atol=2e-5, rtol=1e-5)


def test_queries_may_be_a_slice_of_a_wider_row() -> None:
    case = make_attention_case((1, 9), (40, 29))
    wide = torch.cat((case.q, torch.full_like(case.q, float("nan"))), 1)[:, : case.q.shape[1]]
    got = attention_triton.paged_attention(wide, case.k_cache, case.v_cache, case.batch(), case.scale)
    torch.testing.assert_close(got.double(), expected_attention(case), atol=2e-5, rtol=1e-5)


def test_split_decode_twice_gives_the_same() -> None:
    case = make_attention_case((1, 1), (600, 900))
    runs = [
        attention_triton.paged_attention(case.q, case.k_cache, case.v_cache, case.batch(), case.scale)
        for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_float16() -> None:
    case = make_attention_case((1, 30), (300, 45), dtype=torch.float16)
    got = attention_triton.paged_attention(case.q, case.k_cache, case.v_cache, case.batch(), case.scale)
    torch.testing.assert_close(got.double(), expected_attention(case), atol=3e-3, rtol=3e-3)


def test_write_kv_stores_rows_and_skips_padding() -> None:
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    k_cache, v_cache = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    attention_triton.write_kv(k, v, k_cache, v_cache, torch.tensor([11, -1, 0, 6]))
    assert torch.equal(k_cache.view(12, 2, 8)[[11, 0, 6]], k[[0, 2, 3]])
    assert torch.equal(v_cache.view(12, 2, 8)[[11, 0, 6]], v[[0, 2, 3]])
    assert int((k_cache.view(12, -1).abs().sum(1) > 0).sum()) == 3
