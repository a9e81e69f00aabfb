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
    groups [groups, 16]      in prefill: what every `TILE_ROWS` token rows meet (`tile_listing`)

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
GROUP_RECORD = 16
TILE_ROWS = 128
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
    groups: int = 0

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
    def groups_at(self) -> int:
        return self.tokens_at + TOKEN_RECORD * self.tokens

    @property
    def size(self) -> int:
        return self.groups_at + GROUP_RECORD * self.groups


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
    `most_groups` is how many groups the tile with the most of them has.
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
    most_groups: int = 0


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
        self._arrays: list[IntArray] = []
        self._turn = 0
        if data is None:
            data = torch.zeros(self.capacity.size, dtype=torch.int32, device=device)
            pinned = device.type == "cuda"
            self._ring = [
                torch.zeros(self.capacity.size, dtype=torch.int32, pin_memory=pinned) for _ in range(ring)
            ]
            self._arrays = [host.numpy() for host in self._ring]
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

    def place(self, host: IntArray) -> None:
        """Write the next list to `host`, int32 [capacity.size]."""
        self._arrays, self._turn = [host], 0

    def next_host(self) -> IntArray:
        """The next host copy to fill, int32 [capacity.size]."""
        self._turn = (self._turn + 1) % len(self._arrays)
        return self._arrays[self._turn]

    def send(self) -> None:
        """Take the host copy that `next_host` gave last to the device, unless its owner does."""
        if not self._placed:
            self.data.copy_(self._ring[self._turn], non_blocking=True)
