"""Launches of a fixed grid, as in a captured graph, that find the step's attention in memory alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_cases import expected_attention, fill_fixed, fixed_batch, make_attention_case

from lorax_kernels import attention_triton

STEPS = {
    "one fresh prompt": ((30,), (30,)),
    "decodes only": ((1, 1, 1), (5, 200, 16)),
    "chunk over a prefix": ((9,), (70,)),
    "mixed": ((1, 1, 12, 3, 1), (64, 200, 12, 90, 40)),
    "as many sequences as fit": ((1,) * 6, (3, 33, 16, 17, 1, 60)),
}


@pytest.mark.parametrize("window", [None, 20])
def test_one_set_of_launches_serves_steps_of_every_kind(window: int | None) -> None:
    rows, heads, group = 32, (6, 2), 3
    batch = fixed_batch(rows, sequences=6, tiles=rows * group // 64 + 6, width=20)
    for name, (queries, contexts) in STEPS.items():
        case = make_attention_case(queries, contexts, heads=heads, seed=len(name))
        block_m = attention_triton.tile_rows(6, 64, torch.float32, None)
        fill_fixed(batch, case, attention_triton.list_tiles(case.batch().prefills(), group, block_m))
        used = case.q.shape[0]
        q = torch.full((rows, *case.q.shape[1:]), float("nan"))  # rows of nobody must not matter
        q[:used] = case.q
        got = attention_triton.paged_attention(q, case.k_cache, case.v_cache, batch, case.scale, window)
        torch.testing.assert_close(
            got[:used].double(), expected_attention(case, window), atol=2e-5, rtol=1e-5, msg=name
        )


def test_tiles_are_never_more_than_the_rows_and_sequences_allow() -> None:
    group, block_m = 3, 64
    for queries in ((32,), (1, 31), (2,) * 16, (10, 1, 21), (22, 10)):
        case = make_attention_case(queries, queries, heads=(6, 2))
        listed = attention_triton.list_tiles(case.batch().prefills(), group, block_m)
        assert len(listed) <= 32 * group // block_m + len(queries)
