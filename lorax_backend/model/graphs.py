"""Decode steps as CUDA graphs: the whole forward pass in one launch.

A graph is captured for each padded number of sequences, once for steps in which some row has an adapter and once for
steps in which none has, and for nothing else: which adapters, of which ranks, on which rows, is data that the kernels
read from a work list in device memory. A step copies its inputs into fixed buffers and replays the next larger graph;
rows beyond the step's own see no context and store nothing. The graph also draws the tokens, if the step's inputs say
that the argmax of every row is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lorax_backend.model.batch import BatchBuilder
from lorax_backend.model.decoder import Decoder, LoraBatches
from lorax_backend.model.greedy import Drawing, GreedyDrawer
from lorax_backend.model.kv_cache import KvCache
from lorax_backend.model.recorder import GraphRecorder, Recorded
from lorax_backend.model.warm_up import warm_up_prefill
from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence
from lorax_kernels import AttentionBatch, LoraBatch, WorkBuffer
from lorax_kernels.greedy import NOTHING, newest_ids

_COPIES = 4  # host buffers in turn: more than the steps that can be in flight


def graph_sizes(max_num_seqs: int, limit: int = 256) -> tuple[int, ...]:
    """Padded batch sizes: close together where padding would cost most of a step, 32 apart at the end."""
    largest = min(max_num_seqs, limit)
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, limit + 1, 32)]
    return tuple(sorted({size for size in sizes if size < largest} | {largest}))


@dataclass(frozen=True, slots=True)
class _Section:
    """A piece of the inputs: `length` integers from `begin` on."""

    begin: int
    length: int

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[self.begin : self.begin + self.length]


def _sections(rows: int, max_blocks: int, work: int) -> dict[str, _Section]:
    lengths = {
        "control": 2, "ids": rows, "pending": rows, "positions": rows, "contexts": rows, "slot_mapping": 2 * rows,
        "slots": 2 * rows, "tables": rows * max_blocks, "work": work,
    }  # fmt: skip
    # Each section begins on 16 bytes, for which the kernels have been compiled already.
    ends = np.cumsum([-(-length // 4) * 4 for length in lengths.values()]).tolist()
    return {
        name: _Section(begin, length)
        for (name, length), begin in zip(lengths.items(), [0, *ends[:-1]], strict=True)
    }


@dataclass(frozen=True, slots=True)
class _Host:
    """One of the host's copies of the inputs, for one padded size: its sections in numpy, and the work list's."""

    memory: torch.Tensor
    parts: dict[str, npt.NDArray[np.int32]]
    slot_mapping: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    tables: npt.NDArray[np.int32]
    work: torch.Tensor


class _Inputs:
    """What the graphs read: sections of one int32 tensor of fixed address, and the host copies sent to it in turn.

    Sections, for R rows: control [2], see `lorax_kernels.greedy`; ids, pending (the slot whose last drawn token
    replaces the id, -1 for none), positions, contexts, each [R]; slot_mapping and slots int64 [R], -1 for rows of
    nobody; block tables [R, max_blocks]; and the adapters' work list, last. They lie closer together for smaller R, so
    that one copy takes no more than the step's own rows need.
    """

    def __init__(self, sizes: Sequence[int], max_blocks: int, max_pages: int, device: torch.device) -> None:
        self._max_blocks = max_blocks
        self._at = {
            size: _sections(size, max_blocks, WorkBuffer.capacity_for(size, max_pages).size) for size in sizes
        }
        length = max(at["work"].begin + at["work"].length for at in self._at.values())
        self._data = torch.zeros(length, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._memories = [torch.zeros(length, dtype=torch.int32, pin_memory=pinned) for _ in range(_COPIES)]
        self._hosts: dict[tuple[int, int], _Host] = {}
        self._turn = 0
        self.work = {
            size: WorkBuffer(size, max_pages, device, data=self.part("work", size)) for size in sizes
        }

    def part(self, name: str, size: int) -> torch.Tensor:
        """A section on the device, for one padded size."""
        part = self._at[size][name].of(self._data)
        if name in ("slot_mapping", "slots"):
            return part.view(torch.int64)
        return part.view(size, self._max_blocks) if name == "tables" else part

    def next_host(self, size: int) -> _Host:
        """A host copy to fill; the work list of this size goes there too."""
        self._turn = (self._turn + 1) % _COPIES
        host = self._hosts.get((self._turn, size))
        if host is None:
            host = self._hosts[self._turn, size] = self._host(self._memories[self._turn], size)
        self.work[size].place(host.work)
        return host

    def _host(self, memory: torch.Tensor, size: int) -> _Host:
        at = self._at[size]
        parts = {name: at[name].of(memory).numpy() for name in at}
        return _Host(
            memory,
            parts,
            parts["slot_mapping"].view(np.int64),
            parts["slots"].view(np.int64),
            parts["tables"].reshape(size, self._max_blocks),
            at["work"].of(memory),
        )

    def send(self, host: _Host, size: int, count: int, with_work: bool) -> None:
        """Copy everything up to the tables of the first `count` rows, or up to the end of the work list."""
        at = self._at[size]
        used = at["tables"].begin + count * self._max_blocks
        if with_work:
            used = at["work"].begin + at["work"].length
        self._data[:used].copy_(host.memory[:used], non_blocking=True)


class DecodeGraphs:
    """Captures decode steps at construction and replays them.

    Args:
        decoder: the model; its forward pass must not depend on values that lie on the device.
        cache: the KV cache the graphs will read and write.
        builder: supplies block tables and adapter tables.
        drawer: draws the tokens of steps that are greedy throughout; knows the token drawn last for each slot.
        sizes: padded batch sizes, see `graph_sizes`.
        recorder: makes the graphs.
        report: told of the progress.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        builder: BatchBuilder,
        drawer: GreedyDrawer,
        sizes: Sequence[int],
        recorder: GraphRecorder,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.sizes = tuple(sorted(sizes))
        self._decoder, self._cache, self._builder, self._drawer = decoder, cache, builder, drawer
        max_pages = builder.arena.max_pages_per_slot
        self._inputs = _Inputs(self.sizes, builder.max_blocks, max_pages, builder.device)
        self._slots = {size: self._inputs.part("slots", size) for size in self.sizes}
        self._listed: tuple[bytes, ...] = ()
        self._last_work: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        self._graphs: dict[tuple[int, bool], Recorded] = {}
        warm_up_prefill(decoder, builder, cache)
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

    def replay(
        self, items: list[ScheduledSequence], drawing: Drawing
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run one step, and draw its tokens as `drawing` says.

        Returns:
            Of every item: hidden [n, hidden] before the last norm, logits [n, vocab] without adapters of lm_head, and
            runner slots int64 [n]. They are overwritten by the next replay.
        """
        count = len(items)
        size = next(s for s in self.sizes if s >= count)
        host = self._inputs.next_host(size)
        self._fill(host, items, drawing)
        adapter_slots = np.full(size, -1, dtype=np.int32)
        adapter_slots[:count] = [item.seq.adapter_slot for item in items]
        with_lora = bool((adapter_slots >= 0).any())
        if with_lora:
            self._repeat_work(host, adapter_slots, size)
        self._inputs.send(host, size, count, with_lora)
        recorded = self._graphs[size, with_lora]
        recorded.replay()
        hidden, logits = recorded.outputs
        return hidden[:count], logits[:count], self._slots[size][:count]

    def _fill(self, host: _Host, items: list[ScheduledSequence], drawing: Drawing) -> None:
        builder, count, parts = self._builder, len(items), host.parts
        ids, pending, slots = parts["ids"], parts["pending"], host.slots
        parts["control"][:] = drawing.mode, drawing.turn
        starts = np.array([item.start for item in items], dtype=np.int32)
        known = [
            item.seq.token_ids[item.start] if item.start < len(item.seq.token_ids) else -1 for item in items
        ]
        ids[:count] = known
        slots[:count] = [item.seq.slot for item in items]
        pending[:count] = np.where(ids[:count] < 0, slots[:count], -1)
        builder.check_ids(ids[:count][pending[:count] < 0])
        np.maximum(ids[:count], 0, out=ids[:count])
        parts["positions"][:count] = starts
        parts["contexts"][:count] = starts + 1
        blocks = builder.block_tables(
            [item.seq for item in items], -(-int(starts.max() + 1) // builder.block_size)
        )
        host.tables[:count, : blocks.shape[1]] = blocks
        place = starts // builder.block_size
        host.slot_mapping[:count] = blocks[np.arange(count), place].astype(np.int64) * builder.block_size \
            + starts % builder.block_size  # fmt: skip
        self._fill_rest(host, count)

    @staticmethod
    def _fill_rest(host: _Host, count: int) -> None:
        """The rows from `count` on are nobody's."""
        for name, value in (("ids", 0), ("pending", -1), ("positions", 0), ("contexts", 0)):
            host.parts[name][count:] = value
        host.slot_mapping[count:], host.slots[count:] = -1, -1

    def _repeat_work(self, host: _Host, adapter_slots: npt.NDArray[np.int32], size: int) -> None:
        """List the adapters' work, or take the last list again: from one decode step to the next it hardly changes, and
        making it takes longer than the rest of a step's launch."""
        arena = self._builder.arena
        tables = arena.slot_ranks[adapter_slots], arena.slot_pages[adapter_slots]
        listed = (adapter_slots.tobytes(), *(table.tobytes() for table in tables))
        if listed == self._listed:
            host.parts["work"][:] = self._last_work
            return
        self._list_work(adapter_slots, size)
        self._listed, self._last_work = listed, host.parts["work"].copy()

    def _list_work(self, adapter_slots: npt.NDArray[np.int32], size: int) -> LoraBatch:
        arena = self._builder.arena
        batch = LoraBatch.build(
            adapter_slots, arena.slot_pages, arena.slot_ranks, self._builder.device, self._inputs.work[size]
        )
        assert batch is not None
        return batch

    def _record(self, size: int, with_lora: bool, recorder: GraphRecorder) -> Recorded:
        inputs = self._inputs
        host = inputs.next_host(size)
        host.parts["control"][:] = NOTHING, 0
        host.tables.fill(0)
        self._fill_rest(host, 0)
        nobody = self._list_work(np.full(size, -1, dtype=np.int32), size)
        inputs.send(host, size, size, with_work=True)
        lora = LoraBatches(*[nobody] * 4) if with_lora else LoraBatches()
        device = self._builder.device
        attention = AttentionBatch(
            query_start=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_lens=inputs.part("contexts", size),
            block_tables=inputs.part("tables", size),
            slot_mapping=inputs.part("slot_mapping", size),
            num_decodes=size,
            max_query=1,
            max_context=self._builder.max_blocks * self._builder.block_size,
            query_start_host=np.arange(size + 1, dtype=np.int32),
            context_lens_host=np.zeros(size, dtype=np.int32),
            block_tables_host=np.zeros((size, 1), dtype=np.int32),
        )

        def forward() -> tuple[torch.Tensor, torch.Tensor]:
            ids = newest_ids(inputs.part("ids", size), inputs.part("pending", size), self._drawer.last_token)
            positions = inputs.part("positions", size)
            hidden, logits = self._decoder.forward_with_logits(ids, positions, attention, lora, self._cache)
            self._drawer.draw(logits, inputs.part("control", size), inputs.part("slots", size))
            return hidden, logits

        return recorder.record(forward)
