"""The LoRA work list in device memory: which row blocks meet which pages. One int32 buffer, one copy a step.

Sections, in this order (capacities in `WorkCapacity`):

    header [8]               row blocks, units, rows, log2 of units rounded up, row blocks of one row, their units,
                             bare blocks, 0
    blocks [blocks, 8]       first position in `rows`, rows, first position in `pages`, pages, first token row,
                             first page, second page (or the first again), 0; after the row blocks, in decode, bare
                             blocks: rows without an adapter, with no pages
    units  [units, 8]        first page, first position in `rows`, rows, ordinal of the first page, first token row,
                             first position in `pages`, pages of the adapter, 0
    rows   [rows]            token rows grouped by adapter; then, in decode, those without one
    pages  [pages]           page numbers, adapter by adapter
    tokens [tokens, 4]       of every token row, in decode: its position in `rows` or -1, first position in `pages`,
                             pages (0 if it has no adapter), 0

A row block is at most `block_rows` rows of one adapter; a unit is a row block times one group of its adapter's pages.
Blocks of a single row, and their units, come first: kernels treat them as matrix-vector products.
A record repeats what its list entries say, because a program that follows indices through memory waits at each of them.
Kernels take their loop bounds from the header, so that a captured graph runs any batch whose token count fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

HEADER = 8
RECORD = 8
TOKEN_RECORD = 4
DECODE_MAX_TOKENS = 256
"""Up to this many token rows a batch counts as decode: small row blocks, one page a unit."""
GRAPH_MAX_TOKENS = 512
"""Token rows of the largest `WorkBuffer`. Only decode's kernels take their loop bounds from the device, so a buffer is
cut as for decode also beyond `DECODE_MAX_TOKENS`."""

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class WorkCapacity:
    """Entries each section has room for, and where the sections begin."""

    rows: int
    blocks: int
    units: int
    pages: int
    tokens: int

    @property
    def blocks_at(self) -> int:
        return HEADER

    @property
    def units_at(self) -> int:
        return self.blocks_at + RECORD * self.blocks

    @property
    def rows_at(self) -> int:
        return self.units_at + RECORD * self.units

    @property
    def pages_at(self) -> int:
        return self.rows_at + self.rows

    @property
    def tokens_at(self) -> int:
        return self.pages_at + self.pages

    @property
    def size(self) -> int:
        return self.tokens_at + TOKEN_RECORD * self.tokens


@dataclass(frozen=True, slots=True)
class WorkShape:
    """How a batch of this many tokens is cut: rows in a block, pages in a unit."""

    block_rows: int
    unit_pages: int

    @classmethod
    def for_tokens(cls, num_tokens: int) -> WorkShape:
        return cls(16, 1) if num_tokens <= DECODE_MAX_TOKENS else cls(64, 2)

    @property
    def decode(self) -> bool:
        return self.unit_pages == 1


@dataclass(frozen=True, slots=True)
class LoraWork:
    """A work list on the device and the static facts that kernels are launched by.

    `max_pages` bounds the pages of any adapter in the list; with `fixed`, the list lives in a `WorkBuffer` and only
    capacities may be used for grids. Otherwise `num_blocks`, `num_bare` and `num_units` are this batch's own.
    """

    data: torch.Tensor
    capacity: WorkCapacity
    shape: WorkShape
    num_tokens: int
    max_pages: int
    num_blocks: int
    num_bare: int
    num_units: int
    fixed: bool


class WorkBuffer:
    """Device memory of fixed address for the work lists of steps of `num_tokens` rows, up to `GRAPH_MAX_TOKENS`.

    Args:
        num_tokens: token rows of the padded batch.
        max_pages: pages of the largest adapter admitted.
        ring: host copies kept, at least the number of steps that may be in flight, so that none is overwritten
            while the device still reads it.
        data: int32 [`capacity_for(...).size`] on the device, part of somebody else's memory. That one calls `place`
            before every list with the part of the host's memory to fill, and takes it to the device.
    """

    def __init__(
        self,
        num_tokens: int,
        max_pages: int,
        device: torch.device | str,
        ring: int = 4,
        data: torch.Tensor | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.shape = WorkShape.for_tokens(min(num_tokens, DECODE_MAX_TOKENS))
        self.max_pages = max_pages
        self.capacity = self.capacity_for(num_tokens, max_pages)
        device = torch.device(device)
        self._placed = data is not None
        self._ring: list[torch.Tensor] = []
        self._next = 0
        if data is None:
            data = torch.zeros(self.capacity.size, dtype=torch.int32, device=device)
            pinned = device.type == "cuda"
            self._ring = [
                torch.zeros(self.capacity.size, dtype=torch.int32, pin_memory=pinned) for _ in range(ring)
            ]
        self.data = data

    @staticmethod
    def capacity_for(num_tokens: int, max_pages: int) -> WorkCapacity:
        """Room for any list of this many rows."""
        if num_tokens > GRAPH_MAX_TOKENS:
            raise ValueError(
                f"num_tokens: {num_tokens} is more than a work buffer holds ({GRAPH_MAX_TOKENS})"
            )
        pairs = num_tokens * max_pages
        return WorkCapacity(num_tokens, num_tokens, pairs, pairs, num_tokens)

    def place(self, host: torch.Tensor) -> None:
        """Write the next list to `host`, int32 [capacity.size]."""
        self._ring, self._next = [host], 0

    def host(self) -> torch.Tensor:
        """The next host copy to fill."""
        buffer = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        return buffer

    def send(self, host: torch.Tensor) -> None:
        """Take a filled host copy to the device, unless its owner does."""
        if not self._placed:
            self.data.copy_(host, non_blocking=True)


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
    bare_rows, bare = _bare_blocks(num_tokens, rows, shape)
    if buffer is not None:
        capacity, host, data = buffer.capacity, buffer.host(), buffer.data
    else:
        tokens = num_tokens if shape.decode else 0
        listed = rows.size + bare_rows.size
        capacity = WorkCapacity(listed, blocks.shape[0] + bare.shape[0], units.shape[0], pages.size, tokens)
        host = torch.empty(capacity.size, dtype=torch.int32, pin_memory=torch.device(device).type == "cuda")
        data = torch.empty_like(host, device=device)
    by_token = np.zeros((capacity.tokens, TOKEN_RECORD), dtype=np.int32)
    if capacity.tokens:
        by_token[:, 0] = -1
        by_token[rows, 0] = np.arange(rows.size)
        by_token[rows, 1] = np.repeat(page_starts, counts)
        by_token[rows, 2] = np.repeat(num_pages, counts)
    flat = host.numpy()
    flat[:HEADER] = 0
    flat[:7] = (
        blocks.shape[0], units.shape[0], rows.size, max(0, units.shape[0] - 1).bit_length(), num_single,
        int(block_units[:num_single].sum()), bare.shape[0],
    )  # fmt: skip
    for at, part in (
        (capacity.rows_at, rows),
        (capacity.rows_at + rows.size, bare_rows),
        (capacity.blocks_at, blocks),
        (capacity.blocks_at + blocks.size, bare),
        (capacity.units_at, units),
        (capacity.pages_at, pages),
        (capacity.tokens_at, by_token),
    ):
        flat[at : at + part.size] = part.reshape(-1)
    if buffer is not None:
        buffer.send(host)
    else:
        data.copy_(host, non_blocking=True)
    return LoraWork(
        data=data,
        capacity=capacity,
        shape=shape,
        num_tokens=num_tokens,
        max_pages=buffer.max_pages if buffer else int(num_pages.max(initial=0)),
        num_blocks=blocks.shape[0],
        num_bare=bare.shape[0],
        num_units=units.shape[0],
        fixed=buffer is not None,
    )


def _bare_blocks(num_tokens: int, rows: IntArray, shape: WorkShape) -> tuple[IntArray, IntArray]:
    """Rows that are not among `rows`, and records of their blocks; none in prefill, whose kernels do not look."""
    if not shape.decode or rows.size == num_tokens:
        return np.zeros(0, dtype=np.int32), np.zeros((0, RECORD), dtype=np.int32)
    without = np.ones(num_tokens, dtype=bool)
    without[rows] = False
    bare_rows = np.flatnonzero(without).astype(np.int32)
    begins = np.arange(0, bare_rows.size, shape.block_rows)
    records = np.zeros((begins.size, RECORD), dtype=np.int32)
    records[:, 0] = rows.size + begins
    records[:, 1] = np.minimum(shape.block_rows, bare_rows.size - begins)
    records[:, 4] = bare_rows[begins]
    return bare_rows, records
