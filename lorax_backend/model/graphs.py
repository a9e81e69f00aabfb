"""Decode steps as CUDA graphs: the whole forward pass in one launch.

A graph is captured for each padded number of sequences, once for steps in which some row has an adapter and once for
steps in which none has, and for nothing else: which adapters, of which ranks, on which rows, is data that the kernels
read from a work list in device memory. A step copies its inputs into fixed buffers and replays the next larger graph;
rows beyond the step's own see no context and store nothing. The graph also draws the tokens, if the step's inputs say
that the argmax of every row is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from lorax_backend.model.batch import BatchBuilder
from lorax_backend.model.decoder import Decoder, LoraBatches
from lorax_backend.model.graph_inputs import GraphInputs, HostCopy, Section
from lorax_backend.model.greedy import Drawing, GreedyDrawer
from lorax_backend.model.kv_cache import KvCache
from lorax_backend.model.recorder import GraphRecorder, Recorded
from lorax_backend.model.warm_up import warm_up_prefill
from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence
from lorax_kernels import AttentionBatch, LoraBatch
from lorax_kernels.greedy import NOTHING, newest_ids


def graph_sizes(max_num_seqs: int, limit: int = 256) -> tuple[int, ...]:
    """Padded batch sizes: close together where padding would cost most of a step, 32 apart at the end."""
    largest = min(max_num_seqs, limit)
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, limit + 1, 32)]
    return tuple(sorted({size for size in sizes if size < largest} | {largest}))


def _sections(rows: int, max_blocks: int) -> dict[str, Section]:
    """What a graph of `rows` rows reads: control, see `lorax_kernels.greedy`; pending, the slot whose last drawn token
    replaces the id, -1 for none; slot_mapping and slots, -1 for rows of nobody, which have no context either."""
    return {
        "control": Section((2,), NOTHING),
        "ids": Section((rows,)),
        "pending": Section((rows,), -1),
        "positions": Section((rows,)),
        "contexts": Section((rows,)),
        "slot_mapping": Section((rows,), -1, wide=True),
        "slots": Section((rows,), -1, wide=True),
        "tables": Section((rows, max_blocks)),
    }


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
        sections = {size: _sections(size, builder.max_blocks) for size in self.sizes}
        self._inputs = GraphInputs(sections, max_pages, builder.device)
        self._slots = {size: self._inputs.part("slots", size) for size in self.sizes}
        self._listed: tuple[bytes, ...] = ()
        self._last_work: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        self._graphs: dict[tuple[int, bool], Recorded] = {}
        report("warming up")
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
        self._inputs.send(host, count, with_lora)
        recorded = self._graphs[size, with_lora]
        recorded.replay()
        hidden, logits = recorded.outputs
        return hidden[:count], logits[:count], self._slots[size][:count]

    def _fill(self, host: HostCopy, items: list[ScheduledSequence], drawing: Drawing) -> None:
        builder, count, parts = self._builder, len(items), host.parts
        ids, pending, slots = parts["ids"], parts["pending"], parts["slots"]
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
        parts["slot_mapping"][:count] = blocks[np.arange(count), place].astype(np.int64) * builder.block_size \
            + starts % builder.block_size  # fmt: skip

    def _repeat_work(self, host: HostCopy, adapter_slots: npt.NDArray[np.int32], size: int) -> None:
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
        host.tables.fill(0)
        nobody = self._list_work(np.full(size, -1, dtype=np.int32), size)
        inputs.send(host, size, with_work=True)
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
