"""Work lists and tiles of a single adapter or prompt are made directly, and are what the general way makes."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorax_kernels import GRAPH_MAX_TOKENS, LoraBatch, WorkBuffer, pages_for_rank
from lorax_kernels.work_listing import build_work_of_one

MAX_PAGES = pages_for_rank(256)
SLOT = 2


@st.composite
def single_adapters(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Token slots of a step of which some rows have the adapter in `SLOT`, and its rank."""
    count = draw(
        st.one_of(st.integers(1, 20), st.sampled_from([16, 17, 33, 64, 65, 128, 129, 256, 257, 321]))
    )
    bare = draw(st.one_of(st.just(0), st.integers(1, 60)))
    slots = np.full(count + bare, -1, dtype=np.int32)
    if draw(st.booleans()):
        begin = draw(st.integers(0, bare))  # a prompt among bare rows
        slots[begin : begin + count] = SLOT
    else:
        slots[np.random.default_rng(draw(st.integers(0, 99))).permutation(slots.size)[:count]] = SLOT
    return slots, draw(st.integers(1, 256))


def arena(rank: int) -> tuple[np.ndarray, np.ndarray]:
    pages = np.full((SLOT + 2, MAX_PAGES), -1, dtype=np.int32)
    pages[0, :1] = 99
    pages[SLOT, : pages_for_rank(rank)] = np.random.default_rng(rank).permutation(90)[: pages_for_rank(rank)]
    return pages, np.array([5, 0, rank, 0], dtype=np.int32)


def assert_same(got: LoraBatch | None, want: LoraBatch | None) -> None:
    assert got is not None
    assert want is not None
    assert (got.num_tokens, got.segments) == (want.num_tokens, want.segments)
    assert got.rows.dtype == want.rows.dtype
    np.testing.assert_array_equal(got.rows, want.rows)
    assert (got.work is None) == (want.work is None)
    if got.work is not None and want.work is not None:
        assert torch.equal(got.work.data, want.work.data)
        assert astuple(got.work)[1:] == astuple(want.work)[1:]


@settings(max_examples=120, deadline=None)
@given(single_adapters(), st.integers(0, 40))
@example((np.full(1, SLOT, dtype=np.int32), 1), 0)
@example((np.full(129, SLOT, dtype=np.int32), 256), 0)
@example((np.full(321, SLOT, dtype=np.int32), 20), 0)
def test_one_adapter_listed_directly_is_to_the_bit_what_sorting_makes(
    case: tuple[np.ndarray, int], room: int
) -> None:
    slots, rank = case
    tables = arena(rank)
    size = min(slots.size + room, GRAPH_MAX_TOKENS)
    made = []
    for build in (LoraBatch.build, LoraBatch._of_many):
        buffer = WorkBuffer(size, MAX_PAGES, "cpu", ring=1)
        buffer.next_host().fill(-7)  # whatever a list before left there
        made.append(build(slots, *tables, "cpu", buffer))
    assert_same(*made)
    assert made[0].work.data[0] > 0


@settings(max_examples=80, deadline=None)
@given(single_adapters())
@example((np.full(257, SLOT, dtype=np.int32), 33))
def test_a_list_in_memory_of_its_own_is_the_same_too(case: tuple[np.ndarray, int]) -> None:
    """Also beyond decode, where blocks are larger and units have two pages."""
    slots, rank = case
    got = LoraBatch.build(slots, *arena(rank), "cpu")
    want = LoraBatch._of_many(slots, *arena(rank), "cpu", None)
    assert_same(got, want)
    assert got is not None
    pages = arena(rank)[0][SLOT, : pages_for_rank(rank)]
    got.work = build_work_of_one(got.num_tokens, got.rows, pages, "cpu", None)
    assert_same(got, want.with_work() if want else None)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, GRAPH_MAX_TOKENS), st.integers(0, 200), st.integers(0, 256))
@example(17, 0, 12)
@example(1, 3, 0)
def test_the_first_rows_of_an_adapter_are_the_same_without_being_looked_for(
    count: int, bare: int, rank: int
) -> None:
    size = min(count + bare, GRAPH_MAX_TOKENS)
    slots = np.full(size, -1, dtype=np.int32)
    slots[:count] = SLOT
    buffers = [WorkBuffer(size, MAX_PAGES, "cpu") for _ in range(2)]
    assert_same(
        LoraBatch.build_first_rows(count, SLOT, *arena(rank), "cpu", buffers[0]),
        LoraBatch._of_many(slots, *arena(rank), "cpu", buffers[1]),
    )


def test_other_slots_on_a_row_are_never_overlooked() -> None:
    tables = arena(12)
    for slots in ([SLOT, 0], [0, SLOT, -1], [1, SLOT], [SLOT, 3], [0, 1], [3, 1]):
        buffers = [WorkBuffer(4, MAX_PAGES, "cpu") for _ in range(2)]
        array = np.array(slots, dtype=np.int32)
        assert_same(
            LoraBatch.build(array, *tables, "cpu", buffers[0]),
            LoraBatch._of_many(array, *tables, "cpu", buffers[1]),
        )


@pytest.mark.parametrize("rank", [8, 8 * MAX_PAGES + 1])
def test_a_single_adapter_without_the_pages_for_its_rank_is_refused(rank: int) -> None:
    pages = np.full((1, MAX_PAGES), 4, dtype=np.int32)
    pages[0, 0] = -1 if rank == 8 else 4
    with pytest.raises(ValueError, match="slot_pages"):
        LoraBatch.build(np.zeros(3, np.int32), pages, np.array([rank], np.int32), "cpu")


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(1, 600),
    st.integers(0, 300),
    st.integers(1, 20),
    st.sampled_from([4, 16, 64]),
)
def test_tiles_of_one_prompt_are_those_of_the_general_order(
    sequence: int, count: int, cached: int, group: int, block_m: int
) -> None:
    list_tiles = pytest.importorskip("lorax_kernels.attention_triton").list_tiles
    got = list_tiles([(sequence, 3, count, cached + count)], group, block_m)
    # A second prompt of a single row sees fewer keys than any row of the first, so its tiles come last.
    both = list_tiles([(sequence, 3, count, cached + count), (7, 0, 1, 1)], group, block_m)
    want = both[both[:, 0] != 7]
    assert got.dtype == want.dtype
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, want)
