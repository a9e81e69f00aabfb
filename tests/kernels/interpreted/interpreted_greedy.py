"""Greedy drawing and the ids of tokens not yet known, as Triton kernels in the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from greedy_cases import check_drawing

from lorax_kernels import dispatch
from lorax_kernels.greedy import NOTHING, GreedyMemory, draw_greedy, newest_ids, num_splits


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_uses_triton", lambda tensor: True)


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"),
    [
        (1, 128_256, torch.float16),
        (44, 384, torch.float32),
        (8, 4099, torch.float32),
        (3, 6000, torch.float16),
    ],
)
def test_drawing_gives_the_lowest_best_id_and_its_log_probability(
    rows: int, vocab: int, dtype: torch.dtype
) -> None:
    check_drawing(rows, vocab, dtype, "cpu")


def test_a_row_is_shared_by_more_programs_the_fewer_rows_there_are() -> None:
    assert [num_splits(rows, 128_256) for rows in (1, 8, 32, 128, 256, 1000)] == [128, 64, 16, 4, 2, 1]
    assert num_splits(1, 384) == 1


def test_a_step_that_draws_elsewhere_leaves_everything_as_it_is() -> None:
    last_token = torch.tensor([5, 6, 7])
    memory = GreedyMemory(last_token, 3, 100, turns=2)
    draw_greedy(torch.randn(3, 100), torch.tensor([NOTHING, 1], dtype=torch.int32), torch.arange(3), memory)
    assert last_token.tolist() == [5, 6, 7]
    assert not memory.ids.any()


def test_pending_ids_are_those_drawn_last() -> None:
    last_token = torch.tensor([50, 51, 52])
    for rows in (1, 4, 300):
        ids = torch.arange(rows, dtype=torch.int32) + 100
        pending = (torch.arange(rows, dtype=torch.int32) % 4) - 1
        want = [100 + row if row % 4 == 0 else 49 + row % 4 for row in range(rows)]
        got = newest_ids(ids, pending, last_token)
        assert got.dtype == torch.int32
        assert got.tolist() == want
