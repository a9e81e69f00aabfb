"""Decode steps as CUDA graphs: the whole forward pass in one launch.

A graph is captured for each padded number of sequences, once for steps in which some row has an adapter and once for
steps in which none has, and for nothing else: which adapters, of which ranks, on which rows, is data that the kernels
read from a work list in device memory. A step copies its inputs into fixed buffers and replays the next larger graph;
rows beyond the step's own see no context and store nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from lorax_backend.model.batch import BatchBuilder
from lorax_backend.model.decoder import Decoder, LoraBatches
from lorax_backend.model.kv_cache import KvCache
from lorax_backend.model.recorder import GraphRecorder, Recorded
from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence
from lorax_kernels import PAGE_RANK, AttentionBatch, LoraBatch, WorkBuffer

_COPIES = 4  # host buffers in turn: more than the steps that can be in flight
_PREFILL_WARM_UP_TOKENS = (1, 17, 200, 300)


def graph_sizes(max_num_seqs: int, limit: int = 256) -> tuple[int, ...]:
    """Padded batch sizes: close together where padding would cost most of a step, 32 apart at the end."""
    largest = min(max_num_seqs, limit)
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, limit + 1, 32)]
    return tuple(sorted({size for size in sizes if size < largest} | {largest}))


@dataclass(slots=True)
class _Inputs:
    """Device buffers of fixed address, parts of one int32 tensor, and the host buffers copied to it.

    Sections: ids, pending (the slot whose last drawn token replaces the id, -1 for none), positions, contexts, each
    [rows]; slot_mapping and slots int64 [rows]; block tables [rows, max_blocks] last, so that a step copies no more of
    them than it has rows.
    """

    rows: int
    max_blocks: int
    device: torch.device
    data: torch.Tensor = field(init=False)
    _hosts: list[torch.Tensor] = field(init=False)
    _turn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        size = self.rows * (8 + self.max_blocks)  # an int64 counts as two
        self.data = torch.zeros(size, dtype=torch.int32, device=self.device)
        pinned = self.device.type == "cuda"
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(_COPIES)]

    def part(self, data: torch.Tensor, index: int, count: int) -> torch.Tensor:
        """The first `count` rows of a section: 0 ids, 1 pending, 2 positions, 3 contexts, 4 slot_mapping, 5 slots, 6
        block tables."""
        rows = self.rows
        if index < 4:
            return data[index * rows : index * rows + count]
        if index < 6:
            begin = 4 * rows + (index - 4) * 2 * rows
            return data[begin : begin + 2 * count].view(torch.int64)
        return data[8 * rows : 8 * rows + count * self.max_blocks].view(count, self.max_blocks)

    def next_host(self) -> torch.Tensor:
        self._turn = (self._turn + 1) % _COPIES
        return self._hosts[self._turn]

    def send(self, host: torch.Tensor, count: int) -> None:
        """Copy everything up to the tables of the first `count` rows."""
        used = self.rows * 8 + count * self.max_blocks
        self.data[:used].copy_(host[:used], non_blocking=True)


class DecodeGraphs:
    """Captures decode steps at construction and replays them.

    Args:
        decoder: the model; its forward pass must not depend on values that lie on the device.
        cache: the KV cache the graphs will read and write.
        builder: supplies block tables and adapter tables.
        last_token: int64 [slots] on the device, the token drawn last for each slot.
        sizes: padded batch sizes, see `graph_sizes`.
        recorder: makes the graphs.
        report: told of the progress.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        builder: BatchBuilder,
        last_token: torch.Tensor,
        sizes: Sequence[int],
        recorder: GraphRecorder,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.sizes = tuple(sorted(sizes))
        self._decoder, self._cache, self._builder, self._last_token = decoder, cache, builder, last_token
        self._inputs = _Inputs(self.sizes[-1], builder.max_blocks, builder.device)
        max_pages = builder.arena.max_pages_per_slot
        self._work = {size: WorkBuffer(size, max_pages, builder.device, _COPIES) for size in self.sizes}
        self._graphs: dict[tuple[int, bool], Recorded] = {}
        self._warm_up_prefill()
        for done, size in enumerate(reversed(self.sizes)):
            report(f"capturing decode graphs, {done + 1} of {len(self.sizes)}")
            for with_lora in (True, False):
                self._graphs[size, with_lora] = self._record(size, with_lora, recorder)

    def accepts(self, batch: ScheduledBatch) -> bool:
        """True if every sequence decodes one token, and there are not too many."""
        return len(batch.sequences) <= self.sizes[-1] and all(
            item.count == 1
            and item.sample
            and (item.start >= item.seq.prompt_len or not item.seq.sampling.prompt_logprobs)
            for item in batch.sequences
        )

    def replay(self, items: list[ScheduledSequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run one step.

        Returns:
            Of every item: hidden [n, hidden] before the last norm, logits [n, vocab] without adapters of lm_head, and
            runner slots int64 [n]. They are overwritten by the next replay.
        """
        count = len(items)
        size = next(s for s in self.sizes if s >= count)
        self._send(items, size)
        adapter_slots = np.full(size, -1, dtype=np.int32)
        adapter_slots[:count] = [item.seq.adapter_slot for item in items]
        with_lora = bool((adapter_slots >= 0).any())
        if with_lora:
            self._list_work(adapter_slots, size)
        recorded = self._graphs[size, with_lora]
        recorded.replay()
        hidden, logits = recorded.outputs
        slots = self._inputs.part(self._inputs.data, 5, count)
        return hidden[:count], logits[:count], slots

    def _send(self, items: list[ScheduledSequence], size: int) -> None:
        builder, inputs, count = self._builder, self._inputs, len(items)
        host = inputs.next_host()
        ids, pending, positions, contexts, slot_mapping, slots, tables = (
            inputs.part(host, index, size).numpy() for index in range(7)
        )
        starts = np.array([item.start for item in items], dtype=np.int32)
        known = [
            item.seq.token_ids[item.start] if item.start < len(item.seq.token_ids) else -1 for item in items
        ]
        ids[:count] = known
        slots[:count] = [item.seq.slot for item in items]
        pending[:count] = np.where(ids[:count] < 0, slots[:count], -1)
        builder.check_ids(ids[:count][pending[:count] < 0])
        np.maximum(ids[:count], 0, out=ids[:count])
        positions[:count] = starts
        contexts[:count] = starts + 1
        blocks = builder.block_tables(
            [item.seq for item in items], -(-int(starts.max() + 1) // builder.block_size)
        )
        tables[:count, : blocks.shape[1]] = blocks
        place = starts // builder.block_size
        slot_mapping[:count] = blocks[np.arange(count), place].astype(np.int64) * builder.block_size \
            + starts % builder.block_size  # fmt: skip
        ids[count:], pending[count:], positions[count:], contexts[count:] = 0, -1, 0, 0
        slot_mapping[count:], slots[count:] = -1, 0
        inputs.send(host, count)

    def _list_work(self, adapter_slots: npt.NDArray[np.int32], size: int) -> LoraBatch:
        arena = self._builder.arena
        batch = LoraBatch.build(
            adapter_slots, arena.slot_pages, arena.slot_ranks, self._builder.device, self._work[size]
        )
        assert batch is not None
        return batch

    def _record(self, size: int, with_lora: bool, recorder: GraphRecorder) -> Recorded:
        data, inputs = self._inputs.data, self._inputs
        self._send_nothing(size)
        lora = (
            LoraBatches(*[self._list_work(np.full(size, -1, dtype=np.int32), size)] * 4)
            if with_lora
            else LoraBatches()
        )
        device = data.device
        attention = AttentionBatch(
            query_start=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_lens=inputs.part(data, 3, size),
            block_tables=inputs.part(data, 6, size),
            slot_mapping=inputs.part(data, 4, size),
            num_decodes=size,
            max_query=1,
            max_context=self._builder.max_blocks * self._builder.block_size,
            query_start_host=np.arange(size + 1, dtype=np.int32),
            context_lens_host=np.zeros(size, dtype=np.int32),
            block_tables_host=np.zeros((size, 1), dtype=np.int32),
        )

        def forward() -> tuple[torch.Tensor, torch.Tensor]:
            pending = inputs.part(data, 1, size)
            drawn = self._last_token.index_select(0, pending.clamp_min(0)).to(torch.int32)
            ids = torch.where(pending >= 0, drawn, inputs.part(data, 0, size))
            hidden = self._decoder.forward(ids, inputs.part(data, 2, size), attention, lora, self._cache)
            return hidden, self._decoder.logits(hidden, None)

        return recorder.record(forward)

    def _send_nothing(self, size: int) -> None:
        host = self._inputs.next_host()
        for index, value in ((0, 0), (1, -1), (2, 0), (3, 0), (4, -1), (5, 0), (6, 0)):
            self._inputs.part(host, index, size).fill_(value)
        self._inputs.send(host, size)

    def _warm_up_prefill(self) -> None:
        """Compile the kernels of steps that are not graphs, so that no request waits for a compiler."""
        builder = self._builder
        for tokens in _PREFILL_WARM_UP_TOKENS:
            starts = np.array([0, tokens], dtype=np.int32)
            attention = AttentionBatch.build(
                starts,
                np.array([tokens], dtype=np.int32),
                np.zeros((1, builder.max_blocks), dtype=np.int32),
                np.full(tokens, -1, dtype=np.int64),
                builder.device,
            )
            ids = torch.zeros(tokens, dtype=torch.int32, device=builder.device)
            work = LoraBatch.build(
                np.zeros(tokens, dtype=np.int32),
                np.zeros((1, builder.arena.max_pages_per_slot), dtype=np.int32),
                np.full(1, PAGE_RANK * min(2, builder.arena.max_pages_per_slot), dtype=np.int32),
                builder.device,
            )
            hidden = self._decoder.forward(
                ids, ids, attention, LoraBatches(work, work, work, work), self._cache
            )
            self._decoder.logits(hidden, work)
