"""What products of many rows walk: in the chain of its tile every row meets every page of its adapter once."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorax_kernels import LoraBatch, pages_for_rank
from lorax_kernels.tile_listing import list_tiles
from lorax_kernels.worklist import GROUP_RECORD, TILE_ROWS, LoraWork

MAX_PAGES = 32


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Ranks, and the adapter slots of more than 256 rows: prompts, and perhaps decodes before them."""
    ranks = draw(st.lists(st.sampled_from([1, 3, 8, 12, 16, 64, 96, 256]), min_size=1, max_size=6))
    slot = st.integers(-1, len(ranks) - 1)
    decodes = draw(st.lists(slot, max_size=150))
    prompts = draw(st.lists(st.tuples(slot, st.integers(1, 300)), min_size=1, max_size=6))
    slots = decodes + [one for one, count in prompts for _ in range(count)]
    slots += [draw(slot)] * max(0, 257 - len(slots))
    return np.array(slots, np.int32), np.array(ranks, np.int32)


def work_of(slots: np.ndarray, ranks: np.ndarray) -> tuple[LoraBatch, LoraWork, np.ndarray] | None:
    pages = np.full((ranks.size, MAX_PAGES), -1, np.int32)
    numbers = np.random.default_rng(0).permutation(400)
    for slot, count in enumerate(map(pages_for_rank, ranks.tolist())):
        pages[slot, :count], numbers = numbers[:count], numbers[count:]
    batch = LoraBatch.build(slots, pages, ranks, "cpu")
    if batch is None:
        return None
    batch.with_work()
    assert batch.work is not None
    return batch, batch.work, pages


@settings(max_examples=80, deadline=None)
@given(steps())
@example((np.zeros(257, np.int32), np.array([256], np.int32)))
@example((np.arange(1000, dtype=np.int32) % 3, np.array([16, 3, 12], np.int32)))
def test_every_row_of_a_tile_meets_every_page_of_its_adapter_once(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    slots, ranks = case
    made = work_of(slots, ranks)
    if made is None:
        assert (slots < 0).all()
        return
    batch, work, pages = made
    at = work.capacity
    groups = work.data.numpy()[at.groups_at :].reshape(-1, GROUP_RECORD)
    met, walked = [], []
    for tile in range(-(-slots.size // TILE_ROWS)):
        group, length = tile, 0
        while groups[group, 4] > 0:
            length += 1
            walked.append(group)
            for page, first, stop, shift, ordinal in groups[group, :10].reshape(5, 2).T:
                assert stop == first == 0 or tile * TILE_ROWS <= first < stop <= (tile + 1) * TILE_ROWS
                for row in range(first, stop):
                    assert batch.rows[row + shift] == row
                    met.append((row, int(ordinal), int(page)))
            group = int(groups[group, 10])
            if not group:
                break
        assert length <= work.most_groups
    assert len(set(walked)) == len(walked)
    assert sorted(met) == [
        (row, ordinal, int(pages[slot, ordinal]))
        for row, slot in enumerate(slots.tolist())
        if slot >= 0
        for ordinal in range(pages_for_rank(int(ranks[slot])))
    ]


def test_a_tile_has_as_many_groups_as_pairs_of_pages() -> None:
    rows = np.arange(0, 300, dtype=np.int32)
    starts = np.array([0, 140], np.int32)
    records, most = list_tiles(300, rows, starts, np.array([3, 2], np.int32), np.arange(5, dtype=np.int32))
    # 3 pages; 3 pages of the first adapter's last rows and 2 of the second's; 2 pages.
    assert most == 3
    assert len(records) == 3 + 1 + 2


def test_decode_has_no_tiles() -> None:
    made = work_of(np.zeros(256, np.int32), np.array([16], np.int32))
    assert made is not None
    assert made[1].capacity.groups == made[1].most_groups == 0
