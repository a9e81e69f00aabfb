"""What one step's kernels need to know, built once on the host and read by every layer.

`LoraBatch` says which token rows belong to which adapter pages; `AttentionBatch` says where every sequence's keys and
values lie. Both cost numpy work in the number of tokens of the step, never in the number of configured adapter slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from lorax_kernels.layout import PAGE_RANK
from lorax_kernels.work_listing import build_work, build_work_of_one
from lorax_kernels.worklist import LoraWork, WorkBuffer

IntArray = npt.NDArray[np.int32]
_TOO_FEW_PAGES = "slot_pages: an adapter slot in use has fewer pages than its rank needs"


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """Positions [start, start + count) of `LoraBatch.rows`: the rows of one adapter, whose weights are `pages`."""

    slot: int
    start: int
    count: int
    pages: tuple[int, ...]


@dataclass(eq=False)
class LoraBatch:
    """The token rows of a step that have an adapter, grouped by adapter.

    `rows` int32 [R] are indices of token rows; rows without an adapter are in no segment. `work` is the same as a
    device work list for the Triton kernels, absent on the CPU path.
    """

    num_tokens: int
    rows: IntArray
    segments: tuple[LoraSegment, ...]
    work: LoraWork | None = None

    @classmethod
    def build(
        cls,
        token_slots: IntArray,
        slot_pages: IntArray,
        slot_ranks: IntArray,
        device: torch.device | str,
        buffer: WorkBuffer | None = None,
    ) -> LoraBatch | None:
        """Group the rows of a step by adapter.

        Args:
            token_slots: int32 [T], adapter slot of every token row, -1 for none.
            slot_pages: int32 [slots, max_pages], page numbers of every slot in rank order, -1 beyond the last.
            slot_ranks: int32 [slots], true rank of the adapter in every slot.
            device: where the work list goes; the CPU gets none.
            buffer: fixed device memory for the work list (CUDA graphs); a new one is made if not given.

        Returns:
            None if no row has an adapter. With `buffer`, a batch without rows is returned instead, because a captured
            graph reads the buffer whatever it holds.

        Raises:
            ValueError: a slot in use has a rank but not the pages for it.
        """
        token_slots = np.asarray(token_slots)
        slot = int(token_slots.max(initial=-1))
        if slot >= 0 and slot_ranks[slot] > 0:
            rows = np.flatnonzero(token_slots == slot)
            if rows.size == np.count_nonzero(token_slots >= 0):
                pages = _pages_of(slot, slot_pages, slot_ranks)
                return cls._of_one(token_slots.size, rows.astype(np.int32), (slot, pages), device, buffer)
        return cls._of_many(token_slots, slot_pages, slot_ranks, device, buffer)

    @classmethod
    def build_first_rows(
        cls,
        count: int,
        slot: int,
        slot_pages: IntArray,
        slot_ranks: IntArray,
        device: torch.device | str,
        buffer: WorkBuffer,
    ) -> LoraBatch:
        """`build` of a step of `buffer.num_tokens` rows of which the first `count`, at least one, have the adapter in
        `slot`, and no other has one. Nothing is looked for then.

        Raises:
            ValueError: as `build`.
        """
        if slot < 0 or slot_ranks[slot] <= 0:
            nobody = np.full(buffer.num_tokens, -1, dtype=np.int32)
            batch = cls._of_many(nobody, slot_pages, slot_ranks, device, buffer)
            assert batch is not None
            return batch
        rows = np.arange(count, dtype=np.int32)
        pages = _pages_of(slot, slot_pages, slot_ranks)
        return cls._of_one(buffer.num_tokens, rows, (slot, pages), device, buffer)

    @classmethod
    def _of_one(
        cls,
        num_tokens: int,
        rows: IntArray,
        adapter: tuple[int, IntArray],
        device: torch.device | str,
        buffer: WorkBuffer | None,
    ) -> LoraBatch:
        """What `_of_many` makes of `rows` of a single adapter (its slot and pages), in a fifth of the time: a prompt
        that finds the engine idle waits for all of it."""
        slot, pages = adapter
        batch = cls(num_tokens, rows, (LoraSegment(slot, 0, rows.size, tuple(pages.tolist())),))
        if buffer is not None or torch.device(device).type != "cpu":
            batch.work = build_work_of_one(num_tokens, rows, pages, device, buffer)
        return batch

    @classmethod
    def _of_many(
        cls,
        token_slots: IntArray,
        slot_pages: IntArray,
        slot_ranks: IntArray,
        device: torch.device | str,
        buffer: WorkBuffer | None,
    ) -> LoraBatch | None:
        """`build` for any number of adapters."""
        rows = np.flatnonzero(token_slots >= 0)
        if rows.size:
            rows = rows[slot_ranks[token_slots[rows]] > 0]
        if not rows.size and buffer is None:
            return None
        rows = rows[np.argsort(token_slots[rows], kind="stable")].astype(np.int32)
        slots_of_rows = token_slots[rows]
        starts = np.flatnonzero(np.diff(slots_of_rows, prepend=-1)).astype(np.int32)
        slots = slots_of_rows[starts]
        counts = np.diff(starts, append=np.int32(rows.size)).astype(np.int32)
        num_pages = -(-slot_ranks[slots] // PAGE_RANK)
        pages = slot_pages[slots]
        listed = np.arange(pages.shape[1]) < num_pages[:, None]
        if num_pages.size and (int(num_pages.max()) > pages.shape[1] or bool((pages[listed] < 0).any())):
            raise ValueError(_TOO_FEW_PAGES)
        segments = tuple(
            LoraSegment(int(slot), int(start), int(count), tuple(page_list[:n].tolist()))
            for slot, start, count, n, page_list in zip(slots, starts, counts, num_pages, pages, strict=True)
        )
        batch = cls(int(token_slots.size), rows, segments)
        if torch.device(device).type != "cpu" or buffer is not None:
            batch.work = build_work(
                batch.num_tokens, rows, starts, counts, num_pages, pages[listed], device, buffer
            )
        return batch

    def with_work(self, device: torch.device | str = "cpu") -> LoraBatch:
        """Make the work list on any device, also the CPU, where only Triton's interpreter reads it."""
        counts = np.array([s.count for s in self.segments], dtype=np.int32)
        starts = np.array([s.start for s in self.segments], dtype=np.int32)
        num_pages = np.array([len(s.pages) for s in self.segments], dtype=np.int32)
        pages = np.array([p for s in self.segments for p in s.pages], dtype=np.int32)
        self.work = build_work(self.num_tokens, self.rows, starts, counts, num_pages, pages, device, None)
        return self

    @property
    def num_adapters(self) -> int:
        """Distinct adapters in the batch."""
        return len(self.segments)

    @property
    def max_pages(self) -> int:
        """Pages of the adapter with the highest rank in the batch."""
        return max((len(s.pages) for s in self.segments), default=0)

    @cached_property
    def row_index(self) -> torch.Tensor:
        """`rows` as an int64 CPU tensor."""
        return torch.from_numpy(self.rows.astype(np.int64))

    @cached_property
    def token_ranges(self) -> tuple[tuple[int, int], ...] | None:
        """(first token row, count) of every segment, or None if some segment's rows are not consecutive tokens."""
        ranges = []
        for s in self.segments:
            first, last = int(self.rows[s.start]), int(self.rows[s.start + s.count - 1])
            if last - first + 1 != s.count:
                return None
            ranges.append((first, s.count))
        return tuple(ranges)


def _pages_of(slot: int, slot_pages: IntArray, slot_ranks: IntArray) -> IntArray:
    """The pages of the adapter in a slot."""
    count = -(-int(slot_ranks[slot]) // PAGE_RANK)
    pages = slot_pages[slot, :count]
    if pages.size < count or pages.min() < 0:
        raise ValueError(_TOO_FEW_PAGES)
    return pages


@dataclass(frozen=True, slots=True)
class FixedAttention:
    """Where a captured graph finds its work: how many decodes and prompt tiles a step has is data on the device.

    `decode_contexts` int32 [D]: context lengths of the leading sequences that have one row each, 0 for the others,
    which the decode kernel then skips. `tiles` int32 [tiles, 2]: sequence and first packed row of every tile of the
    other sequences (`attention_triton.list_tiles`); tiles that a step does not need name a sequence without rows.
    """

    decode_contexts: torch.Tensor
    tiles: torch.Tensor


@dataclass(eq=False)
class AttentionBatch:
    """Where the queries of a step and the keys and values they see lie. S sequences, T token rows.

    Device tensors: `query_start` int32 [S+1] (rows of sequence i are [query_start[i], query_start[i+1])),
    `context_lens` int32 [S] (tokens in the cache, this step's included), `block_tables` int32 [S, max_blocks],
    `slot_mapping` int64 [T] (block * block_size + offset where a row's key and value go; -1: nowhere). The first
    `num_decodes` sequences have one row each. `query_start_host`, `context_lens_host` and `block_tables_host` are the
    same numbers for host-side decisions. With `fixed`, the host's numbers are capacities only, and the device tensors
    may change between runs of the same launches.
    """

    query_start: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    max_query: int
    max_context: int
    query_start_host: IntArray
    context_lens_host: IntArray
    block_tables_host: IntArray
    cache: dict[object, object] = field(default_factory=dict, repr=False)
    """Plans a backend makes once and reuses in every layer."""
    fixed: FixedAttention | None = None

    @classmethod
    def build(
        cls,
        query_start: IntArray,
        context_lens: IntArray,
        block_tables: IntArray,
        slot_mapping: npt.NDArray[np.int64],
        device: torch.device | str,
    ) -> AttentionBatch:
        """Take the host arrays of a step to the device; see the class for shapes and dtypes."""
        counts = np.diff(query_start)
        longer = np.flatnonzero(counts != 1)
        device = torch.device(device)

        def put(array: npt.NDArray[np.generic]) -> torch.Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            if device.type == "cuda":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor

        return cls(
            query_start=put(query_start.astype(np.int32, copy=False)),
            context_lens=put(context_lens.astype(np.int32, copy=False)),
            block_tables=put(block_tables.astype(np.int32, copy=False)),
            slot_mapping=put(slot_mapping.astype(np.int64, copy=False)),
            num_decodes=int(longer[0]) if longer.size else int(counts.size),
            max_query=int(counts.max(initial=0)),
            max_context=int(context_lens.max(initial=0)),
            query_start_host=query_start,
            context_lens_host=context_lens,
            block_tables_host=block_tables,
        )

    @property
    def num_sequences(self) -> int:
        return int(self.context_lens_host.size)

    def prefills(self) -> Iterator[tuple[int, int, int, int]]:
        """(sequence, first row, rows, context length) of every sequence after the decodes."""
        for i in range(self.num_decodes, self.num_sequences):
            first = int(self.query_start_host[i])
            yield i, first, int(self.query_start_host[i + 1]) - first, int(self.context_lens_host[i])
