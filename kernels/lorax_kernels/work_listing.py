"""Making work lists on the host (`worklist` says what is in them): numpy in the number of rows and pages of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lorax_kernels.tile_listing import list_tiles
from lorax_kernels.worklist import (
    GROUP_RECORD,
    HEADER,
    RECORD,
    TOKEN_RECORD,
    IntArray,
    LoraWork,
    WorkBuffer,
    WorkCapacity,
    WorkShape,
)

_FIRST = np.zeros(1, dtype=np.int32)
_NO_GROUPS = np.zeros((0, GROUP_RECORD), dtype=np.int32), 0


def build_work(
    num_tokens: int,
    rows: IntArray,
    starts: IntArray,
    counts: IntArray,
    num_pages: IntArray,
    pages: IntArray,
    device: torch.device | str,
    buffer: WorkBuffer | None,
) -> LoraWork:
    """Cut segments (`starts`, `counts` into `rows`; `num_pages` of the flat list `pages`) into blocks and units."""
    shape = buffer.shape if buffer else WorkShape.for_tokens(num_tokens)
    segment_blocks = -(-counts // shape.block_rows)
    block_segment = np.repeat(np.arange(counts.size), segment_blocks)
    block_index = np.arange(block_segment.size) - np.repeat(
        np.cumsum(segment_blocks) - segment_blocks, segment_blocks
    )
    page_starts = np.cumsum(num_pages) - num_pages
    blocks = np.zeros((block_segment.size, RECORD), dtype=np.int32)
    blocks[:, 0] = starts[block_segment] + block_index * shape.block_rows
    blocks[:, 1] = np.minimum(shape.block_rows, counts[block_segment] - block_index * shape.block_rows)
    blocks[:, 2] = page_starts[block_segment]
    blocks[:, 3] = num_pages[block_segment]
    blocks[:, 4] = rows[blocks[:, 0]]
    blocks[:, 5] = pages[blocks[:, 2]]
    blocks[:, 6] = pages[blocks[:, 2] + (blocks[:, 3] > 1)]
    single = blocks[:, 1] == 1
    blocks = blocks[np.argsort(~single, kind="stable")]
    num_single = int(single.sum())
    block_units = -(-blocks[:, 3] // shape.unit_pages)
    units = np.zeros((int(block_units.sum()), RECORD), dtype=np.int32)
    unit_block = np.repeat(np.arange(blocks.shape[0]), block_units)
    ordinal = np.arange(unit_block.size) - np.repeat(np.cumsum(block_units) - block_units, block_units)
    units[:, 1:3] = blocks[unit_block, 0:2]
    units[:, 3] = ordinal * shape.unit_pages
    units[:, 4] = blocks[unit_block, 4]
    units[:, 5:7] = blocks[unit_block, 2:4]
    units[:, 0] = pages[units[:, 5] + units[:, 3]]
    bare_rows = _bare_rows(num_tokens, rows, shape)
    bare = _bare_blocks(rows.size, bare_rows, shape)
    groups, most_groups = _groups(shape, num_tokens, rows, starts, num_pages, pages)
    needed = WorkCapacity(
        rows.size + bare_rows.size, blocks.shape[0] + bare.shape[0], units.shape[0], pages.size,
        num_tokens if shape.decode else 0, groups.shape[0],
    )  # fmt: skip
    memory = _memory_for(needed, device, buffer)
    capacity, flat = memory.capacity, memory.flat
    by_token = np.zeros((capacity.tokens, TOKEN_RECORD), dtype=np.int32)
    if capacity.tokens:
        by_token[:, 0] = -1
        by_token[rows, 0] = np.arange(rows.size)
        by_token[rows, 1] = np.repeat(page_starts, counts)
        by_token[rows, 2] = np.repeat(num_pages, counts)
    for at, part in (
        (capacity.rows_at, rows),
        (capacity.rows_at + rows.size, bare_rows),
        (capacity.blocks_at, blocks),
        (capacity.blocks_at + blocks.size, bare),
        (capacity.units_at, units),
        (capacity.pages_at, pages),
        (capacity.tokens_at, by_token),
        (capacity.groups_at, groups),
    ):
        flat[at : at + part.size] = part.reshape(-1)
    counted = blocks.shape[0], units.shape[0], num_single, int(block_units[:num_single].sum()), bare.shape[0]
    return _sent(memory, counted, num_tokens, rows.size, int(num_pages.max(initial=0)), most_groups)


def build_work_of_one(
    num_tokens: int, rows: IntArray, pages: IntArray, device: torch.device | str, buffer: WorkBuffer | None
) -> LoraWork:
    """What `build_work` makes of a single segment, without sorting and searching: `rows` [n >= 1], ascending, of the
    adapter in `pages` [p >= 1]."""
    shape = buffer.shape if buffer else WorkShape.for_tokens(num_tokens)
    count, num_pages, step = rows.size, pages.size, shape.block_rows
    num_blocks, block_units = -(-count // step), -(-num_pages // shape.unit_pages)
    in_last = count - (num_blocks - 1) * step
    begins = np.arange(0, count, step)
    in_front = int(rows[-1]) == count - 1
    if in_last == 1:
        begins = np.roll(begins, 1)  # blocks of a single row come first
    if in_front and shape.decode:
        bare_rows = np.arange(count, num_tokens, dtype=np.int32)
    else:
        bare_rows = _bare_rows(num_tokens, rows, shape)
    num_bare = -(-bare_rows.size // step)
    groups, most_groups = _groups(shape, num_tokens, rows, _FIRST, np.array([num_pages]), pages)
    needed = WorkCapacity(
        count + bare_rows.size, num_blocks + num_bare, num_blocks * block_units, num_pages,
        num_tokens if shape.decode else 0, groups.shape[0],
    )  # fmt: skip
    memory = _memory_for(needed, device, buffer)
    at, flat = memory.capacity, memory.flat
    records = flat[at.blocks_at :][: RECORD * num_blocks].reshape(num_blocks, RECORD)
    records[:] = 0, step, 0, num_pages, 0, int(pages[0]), int(pages[int(num_pages > 1)]), 0
    records[:, 0] = begins
    records[:, 4] = rows[begins]
    records[0 if in_last == 1 else -1, 1] = in_last
    units = flat[at.units_at :][: RECORD * num_blocks * block_units].reshape(num_blocks, block_units, RECORD)
    units[:, :, 1:3] = records[:, None, 0:2]
    units[:, :, 4] = records[:, 4:5]
    units[:, :, 5:] = 0, num_pages, 0
    units[:, :, 3] = np.arange(0, num_pages, shape.unit_pages)
    units[:, :, 0] = pages[:: shape.unit_pages]
    flat[at.rows_at : at.rows_at + count] = rows
    flat[at.pages_at : at.pages_at + num_pages] = pages
    if num_bare:
        bare = _bare_blocks(count, bare_rows, shape).reshape(-1)
        flat[at.rows_at + count :][: bare_rows.size] = bare_rows
        flat[at.blocks_at + RECORD * num_blocks :][: bare.size] = bare
    if at.tokens:
        tokens = flat[at.tokens_at :][: TOKEN_RECORD * at.tokens].reshape(at.tokens, TOKEN_RECORD)
        if count < at.tokens:
            tokens[:] = -1, 0, 0, 0
        mine = slice(count) if in_front else rows
        tokens[mine] = 0, 0, num_pages, 0
        tokens[mine, 0] = np.arange(count)
    if groups.size:
        flat[at.groups_at :][: groups.size] = groups.reshape(-1)
    single = int(in_last == 1)
    counted = num_blocks, num_blocks * block_units, single, single * block_units, num_bare
    return _sent(memory, counted, num_tokens, count, num_pages, most_groups)


@dataclass(frozen=True, slots=True)
class _Memory:
    """Where a list is written on the host, `flat`, and read on the device."""

    flat: IntArray
    data: torch.Tensor
    capacity: WorkCapacity
    buffer: WorkBuffer | None
    host: torch.Tensor | None = None
    """`flat` as a tensor, if there is no buffer."""


def _memory_for(needed: WorkCapacity, device: torch.device | str, buffer: WorkBuffer | None) -> _Memory:
    if buffer is not None:
        return _Memory(buffer.next_host(), buffer.data, buffer.capacity, buffer)
    host = torch.empty(needed.size, dtype=torch.int32, pin_memory=torch.device(device).type == "cuda")
    return _Memory(host.numpy(), torch.empty_like(host, device=device), needed, None, host)


def _sent(
    memory: _Memory,
    counted: tuple[int, int, int, int, int],
    num_tokens: int,
    num_rows: int,
    max_pages: int,
    most_groups: int,
) -> LoraWork:
    """Complete a list and take it to the device. `counted`: row blocks, units, blocks of one row, their units, bare
    blocks."""
    num_blocks, num_units, num_single, single_units, num_bare = counted
    buffer = memory.buffer
    bits = max(0, num_units - 1).bit_length()
    memory.flat[:HEADER] = (
        num_blocks, num_units, num_rows, bits, num_single, single_units, num_bare, 0
    )  # fmt: skip
    if buffer is not None:
        buffer.send()
    elif memory.host is not None:
        memory.data.copy_(memory.host, non_blocking=True)
    return LoraWork(
        data=memory.data,
        capacity=memory.capacity,
        shape=buffer.shape if buffer else WorkShape.for_tokens(num_tokens),
        num_tokens=num_tokens,
        max_pages=buffer.max_pages if buffer else max_pages,
        num_blocks=num_blocks,
        num_bare=num_bare,
        num_units=num_units,
        fixed=buffer is not None,
        most_groups=most_groups,
    )


def _groups(
    shape: WorkShape, num_tokens: int, rows: IntArray, starts: IntArray, num_pages: IntArray, pages: IntArray
) -> tuple[IntArray, int]:
    """What products of many rows read; none in decode, which has others."""
    return _NO_GROUPS if shape.decode else list_tiles(num_tokens, rows, starts, num_pages, pages)


def _bare_rows(num_tokens: int, rows: IntArray, shape: WorkShape) -> IntArray:
    """Rows that are not among `rows`; none in prefill, whose kernels do not look."""
    if not shape.decode or rows.size == num_tokens:
        return np.zeros(0, dtype=np.int32)
    without = np.ones(num_tokens, dtype=bool)
    without[rows] = False
    return np.flatnonzero(without).astype(np.int32)


def _bare_blocks(at: int, bare_rows: IntArray, shape: WorkShape) -> IntArray:
    """Records of the blocks of rows without an adapter, which follow the `at` rows of the others."""
    begins = np.arange(0, bare_rows.size, shape.block_rows)
    records = np.zeros((begins.size, RECORD), dtype=np.int32)
    records[:, 0] = at + begins
    records[:, 1] = np.minimum(shape.block_rows, bare_rows.size - begins)
    records[:, 4] = bare_rows[begins]
    return records
