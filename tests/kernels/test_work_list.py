"""The work list that the kernels walk: every row meets every page of its adapter exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_kernels import LoraBatch, WorkBuffer, pages_for_rank
from lorax_kernels.worklist import HEADER, RECORD, TOKEN_RECORD, LoraWork


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ranks = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    tokens = draw(
        st.lists(st.integers(-1, len(ranks) - 1), min_size=1, max_size=draw(st.sampled_from([5, 60, 400])))
    )
    pages, free = np.full((len(ranks), 5), -1, np.int32), 0
    for slot, rank in enumerate(ranks):
        count = pages_for_rank(rank)
        pages[slot, :count] = np.arange(free, free + count)
        free += count
    return np.array(tokens, np.int32), pages, np.array(ranks, np.int32)


def pairs_of(work: LoraWork) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(token row, page) pairs of the units, and of the blocks."""
    data, at = work.data.numpy(), work.capacity
    num_blocks, num_units = int(data[0]), int(data[1])
    units = data[at.units_at :][: RECORD * num_units].reshape(-1, RECORD)
    blocks = data[at.blocks_at :][: RECORD * num_blocks].reshape(-1, RECORD)
    rows, pages = data[at.rows_at : at.pages_at], data[at.pages_at :]
    in_units, in_blocks = [], []
    for page, first, count, ordinal, row, page_at, num_pages, _ in units:
        assert row == rows[first]
        assert page == pages[page_at + ordinal]
        group = pages[page_at + ordinal : page_at + min(ordinal + work.shape.unit_pages, num_pages)]
        in_units += [(int(r), int(p)) for r in rows[first : first + count] for p in group]
    for first, count, page_at, num_pages, row, page0, page1, _ in blocks:
        assert 1 <= count <= work.shape.block_rows
        assert row == rows[first]
        assert (page0, page1) == (pages[page_at], pages[page_at + (num_pages > 1)])
        in_blocks += [
            (int(r), int(p)) for r in rows[first : first + count] for p in pages[page_at:][:num_pages]
        ]
    if work.shape.decode:
        tokens = data[at.tokens_at :].reshape(-1, TOKEN_RECORD)
        listed = np.flatnonzero(tokens[:, 2])
        assert (rows[tokens[listed, 0]] == listed).all()
        assert (np.delete(tokens, listed, 0) == [-1, 0, 0, 0]).all()
        in_tokens = [(int(r), int(p)) for r in listed for p in pages[tokens[r, 1] :][: tokens[r, 2]]]
        assert sorted(in_tokens) == sorted(in_blocks)
    single = blocks[:, 1] == 1
    assert int(data[4]) == int(single.sum())
    assert single[: int(data[4])].all()
    assert (units[: int(data[5]), 2] == 1).all()
    return sorted(in_units), sorted(in_blocks)


def expected(tokens: np.ndarray, pages: np.ndarray, ranks: np.ndarray) -> list[tuple[int, int]]:
    return sorted(
        (row, int(pages[slot, j]))
        for row, slot in enumerate(tokens.tolist())
        if slot >= 0
        for j in range(pages_for_rank(int(ranks[slot])))
    )


@settings(max_examples=60, deadline=None)
@given(batches())
def test_every_row_meets_every_page_of_its_adapter_once(
    case: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    batch = LoraBatch.build(*case, "cpu")
    if batch is None:
        assert expected(*case) == []
        return
    batch.with_work()
    assert batch.work is not None
    assert pairs_of(batch.work) == (expected(*case), expected(*case))


@settings(max_examples=60, deadline=None)
@given(st.lists(batches().filter(lambda case: case[0].size <= 60), min_size=1, max_size=4))
def test_a_fixed_buffer_holds_one_batch_after_another(
    cases: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> None:
    buffer = WorkBuffer(60, 5, "cpu")
    for case in cases:
        batch = LoraBatch.build(*case, "cpu", buffer)
        assert batch is not None
        assert batch.work is not None
        assert batch.work.data.data_ptr() == buffer.data.data_ptr()
        assert pairs_of(batch.work) == (expected(*case), expected(*case))


def test_a_buffer_larger_than_any_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="num_tokens: 4000"):
        WorkBuffer(4000, 8, "cpu")


def test_a_buffer_for_more_rows_than_decode_has_is_still_cut_as_for_decode() -> None:
    buffer = WorkBuffer(500, 2, "cpu")
    slots = np.zeros(500, np.int32)
    batch = LoraBatch.build(slots, np.array([[3, 4]], np.int32), np.array([12], np.int32), "cpu", buffer)
    assert batch is not None
    assert batch.work is not None
    assert batch.work.shape.decode
    assert (batch.work.num_blocks, batch.work.num_units) == (32, 64)


def test_the_header_comes_before_everything() -> None:
    assert WorkBuffer(4, 2, "cpu").capacity.blocks_at == HEADER
