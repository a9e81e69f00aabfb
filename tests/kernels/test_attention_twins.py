"""The torch twins of the attention kernels against float64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import expected_attention, make_attention_case

from lorax_kernels import paged_attention, write_kv

BATCHES = {
    "decode": ((1, 1, 1), (5, 33, 16)),
    "one token": ((1,), (1,)),
    "long and short": ((1,) * 5, (300, 2, 17, 290, 128)),
    "fresh prefill": ((7, 40), (7, 40)),
    "prefill over a prefix": ((5, 1, 33), (20, 16, 160)),
    "mixed": ((1, 1, 12, 3), (64, 200, 12, 90)),
}


@pytest.mark.parametrize("consecutive", [False, True], ids=["scattered", "consecutive"])
@pytest.mark.parametrize("window", [None, 1, 20, 150])
@pytest.mark.parametrize("name", list(BATCHES))
def test_paged_attention_sees_exactly_its_own_past(name: str, window: int | None, consecutive: bool) -> None:
    case = make_attention_case(*BATCHES[name], consecutive=consecutive, seed=len(name))
    got = paged_attention(case.q, case.k_cache, case.v_cache, case.batch(), case.scale, window)
    torch.testing.assert_close(got.double(), expected_attention(case, window), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 1)], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_any_grouping_of_heads_and_width(heads: tuple[int, int], dim: int) -> None:
    case = make_attention_case((1, 1, 9), (140, 30, 29), heads=heads, head_dim=dim)
    got = paged_attention(case.q, case.k_cache, case.v_cache, case.batch(), case.scale)
    torch.testing.assert_close(got.double(), expected_attention(case), atol=2e-5, rtol=1e-5)


def test_a_plan_made_for_one_layer_serves_the_next() -> None:
    case = make_attention_case((1, 1, 4), (200, 20, 30))
    batch = case.batch()
    first = paged_attention(case.q, case.k_cache, case.v_cache, batch, case.scale)
    again = paged_attention(case.q, case.k_cache, case.v_cache, batch, case.scale)
    assert torch.equal(first, again)


def test_write_kv_stores_rows_and_skips_padding() -> None:
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    k_cache, v_cache = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    write_kv(k, v, k_cache, v_cache, torch.tensor([11, -1, 0, 6]))
    assert torch.equal(k_cache.view(12, 2, 8)[[11, 0, 6]], k[[0, 2, 3]])
    assert torch.equal(v_cache.view(12, 2, 8)[[11, 0, 6]], v[[0, 2, 3]])
    assert int((k_cache.view(12, -1).abs().sum(1) > 0).sum()) == 3
