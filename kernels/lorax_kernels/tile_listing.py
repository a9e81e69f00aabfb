"""Which pages the tiles of a product with many rows meet: the last section of prefill's work lists.

A part is a run of consecutive token rows of one adapter inside one tile of `TILE_ROWS` rows, times one of the adapter's
pages. The parts of a tile, two by two, are its groups, each a record of int32 [`GROUP_RECORD`]:

    page [2], first token row [2], last + 1 [2], row of h less token row [2], which page of its adapter [2],
    the tile's next group or 0, 0, 0, 0, 0, 0

A tile's first group has the tile's own number, those that follow come after all the first. A place that is not needed,
and both of a tile without adapters, are zeros, which no row lies in.
"""

from __future__ import annotations

import numpy as np

from lorax_kernels.sizes import cdiv
from lorax_kernels.worklist import GROUP_RECORD, TILE_ROWS, IntArray


def list_tiles(
    num_tokens: int, rows: IntArray, starts: IntArray, num_pages: IntArray, pages: IntArray
) -> tuple[IntArray, int]:
    """The groups [n, GROUP_RECORD] of a step, and how many the tile with the most of them has.

    Args:
        rows: token rows grouped by adapter, ascending for each.
        starts: where in `rows` each adapter's begin.
        num_pages: of each adapter.
        pages: of all adapters, one after the other.
    """
    tiles = cdiv(num_tokens, TILE_ROWS)
    if not rows.size:
        return np.zeros((tiles, GROUP_RECORD), dtype=np.int32), 0
    begins = (np.diff(rows, prepend=-2) != 1) | (rows % TILE_ROWS == 0)
    begins[starts] = True
    at = np.flatnonzero(begins)
    lengths = np.diff(at, append=rows.size)
    owner = np.searchsorted(starts, at, side="right") - 1
    order = np.argsort(rows[at] // TILE_ROWS, kind="stable")
    counts = num_pages[owner[order]]
    run = np.repeat(order, counts)
    ordinal = np.arange(run.size) - np.repeat(np.cumsum(counts) - counts, counts)
    first = rows[at[run]]
    tile = first // TILE_ROWS
    in_tile = np.bincount(tile, minlength=tiles)
    place = np.arange(run.size) - (np.cumsum(in_tile) - in_tile)[tile]
    pair, side = place // 2, place % 2
    groups_of = (in_tile + 1) // 2
    further = np.maximum(groups_of - 1, 0)
    group = np.where(pair == 0, tile, tiles - 1 + (np.cumsum(further) - further)[tile] + pair)
    records = np.zeros((tiles + int(further.sum()), GROUP_RECORD), dtype=np.int32)
    page_starts = np.cumsum(num_pages) - num_pages
    records[group, side] = pages[page_starts[owner[run]] + ordinal]
    records[group, 2 + side] = first
    records[group, 4 + side] = first + lengths[run]
    records[group, 6 + side] = at[run] - first
    records[group, 8 + side] = ordinal
    follows = (side == 0) & (pair > 0)
    records[np.where(pair == 1, tile, group - 1)[follows], 10] = group[follows]
    return records, int(groups_of.max())
