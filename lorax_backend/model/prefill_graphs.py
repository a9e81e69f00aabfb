"""Small steps with prompt tokens as CUDA graphs: prefills, chunks over a cached context, and these mixed with decodes.

Launching the kernels of such a step one by one takes the host longer than the device takes to run them. A graph is
recorded for each padded number of token rows, with and without adapters, and for nothing else: how the rows are shared
out among sequences, what they see and which adapters they have is data in device memory (`GraphInputs`). The attention
kernels are launched for as many decodes and prompt tiles as the rows could be; those a step lacks find no context, or
a sequence without rows, and end at once. The adapters' kernels are those of decode, whose loops are bounded by the
work list. Rows beyond the step's own have no sequence, store nothing, and nobody reads what becomes of them.

The graph ends with the hidden rows. The language model head runs outside, on the rows that sample, because its output
for every row that could sample would take more memory than all the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lorax_backend.model.batch import BatchBuilder, Outputs
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.decoder import Decoder, LoraBatches
from lorax_backend.model.graph_inputs import GraphInputs, HostCopy, Section
from lorax_backend.model.greedy import NOT_HERE, Drawing
from lorax_backend.model.kv_cache import KvCache
from lorax_backend.model.recorder import GraphRecorder, Recorded
from lorax_backend.model.step_arrays import StepArrays
from lorax_kernels import GRAPH_MAX_TOKENS, AttentionBatch, FixedAttention, LoraBatch
from lorax_kernels.greedy import NOTHING, newest_ids

_SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512)
_MIB = 1 << 20
# A graph's launches split a decode's context over few programs, since there may be as many decodes as rows. Beyond this
# many tokens that takes longer than the launches it saves.
_MAX_DECODE_CONTEXT = 8192


def most_prefill_tokens(option: int, on_cuda: bool, graphs: bool) -> int:
    """What the option `prefill_graph_tokens` means, where -1 leaves it to us."""
    return option if option != -1 else GRAPH_MAX_TOKENS * (on_cuda and graphs)


def prefill_graph_sizes(largest: int) -> tuple[int, ...]:
    """Padded numbers of token rows up to `largest`, which is one of them; none for 0.

    Raises:
        ValueError: naming the option `prefill_graph_tokens`, if `largest` is out of range.
    """
    if not 0 <= largest <= GRAPH_MAX_TOKENS:
        raise ValueError(
            f"prefill_graph_tokens is {largest}; it must be 0 (off) to {GRAPH_MAX_TOKENS}, or -1 for the default"
        )
    return (*(size for size in _SIZES if size < largest), largest) if largest else ()


def prefill_graph_bytes(config: ModelConfig, largest: int, itemsize: int, max_pages: int) -> int:
    """Device memory that recordings up to `largest` token rows take, at most.

    Args:
        itemsize: bytes of an activation.
        max_pages: pages of the largest adapter.
    """
    sizes = prefill_graph_sizes(largest)
    row = 4 * config.hidden_size + 3 * (config.q_size + 2 * config.kv_size) + 3 * config.intermediate_size
    planes = 8 * 3 * 8 * max_pages * 4  # splits, slices, ranks of a page, bytes of float32
    kept = 2 * sum(sizes) * config.hidden_size * itemsize
    return largest * (2 * row * itemsize + planes) + kept + 2 * len(sizes) * 4 * _MIB


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the launches for one padded size have room for. `block_m` are the packed rows of a tile."""

    rows: int
    sequences: int
    tiles: int
    block_m: int

    def sections(self, max_blocks: int) -> dict[str, Section]:
        """What a graph reads: of its rows, the ids, pending (the slot whose last drawn token replaces the id, -1 for
        none), positions and slot_mapping; of its sequences, what the attention kernels ask; of what follows the graph,
        the places in `Outputs`. The last sequence is nobody's: it has no rows and no context."""
        rows, sequences = self.rows, self.sequences
        return {
            "control": Section((2,), NOTHING),
            "sampled_slots": Section((sequences,), wide=True),
            "logit_rows": Section((sequences,), wide=True),
            "ids": Section((rows,)),
            "pending": Section((rows,), -1),
            "positions": Section((rows,)),
            "slot_mapping": Section((rows,), -1, wide=True),
            "query_start": Section((sequences + 2,)),
            "contexts": Section((sequences + 1,)),
            "decode_contexts": Section((sequences,)),
            "tiles": Section((self.tiles, 2), (sequences, 0)),
            "tables": Section((sequences + 1, max_blocks)),
        }


class PrefillGraphs:
    """Records small steps at construction and replays them.

    Args:
        decoder: the model; its forward pass must not depend on values that lie on the device.
        cache: the KV cache the recordings will read and write.
        builder: makes steps, and knows the adapters' tables.
        last_token: int64 [slots] on the device, the token drawn last for each slot.
        sizes: padded numbers of token rows, see `prefill_graph_sizes`.
        recorder: makes the recordings.
        report: told of the progress.

    Raises:
        RuntimeError: a step cannot be recorded.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        builder: BatchBuilder,
        last_token: torch.Tensor,
        sizes: tuple[int, ...],
        recorder: GraphRecorder,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        # Imported here, because Triton is not installed everywhere that graphs are not used.
        from lorax_kernels.attention_triton import list_tiles

        self.sizes = tuple(sorted(sizes))
        self._list_tiles = list_tiles
        self._decoder, self._cache, self._builder, self._last_token = decoder, cache, builder, last_token
        self._group = decoder.config.num_heads // decoder.config.num_kv_heads
        self._shapes = {size: self._shape(size) for size in self.sizes}
        self._inputs = GraphInputs(
            {size: shape.sections(builder.max_blocks) for size, shape in self._shapes.items()},
            builder.arena.max_pages_per_slot,
            builder.device,
        )
        parts = "control", "sampled_slots", "logit_rows"
        self._places = {size: [self._inputs.part(name, size) for name in parts] for size in self.sizes}
        self._recorded: dict[tuple[int, bool], Recorded] = {}
        for done, size in enumerate(reversed(self.sizes)):
            report(f"capturing prefill graphs, {done + 1} of {len(self.sizes)}")
            for with_lora in (True, False):
                self._recorded[size, with_lora] = self._record(size, with_lora, recorder)

    def accepts(self, step: StepArrays) -> bool:
        """True if there is a graph for as many rows, and no decode's context is too long for it."""
        if step.num_tokens > self.sizes[-1]:
            return False
        decodes = step.num_decodes
        return not decodes or int(step.contexts[:decodes].max()) <= _MAX_DECODE_CONTEXT

    def replay(self, step: StepArrays, drawing: Drawing = NOT_HERE) -> tuple[torch.Tensor, Outputs]:
        """Run one step.

        Returns:
            [T, hidden], before the last norm, and what follows. The next replay overwrites both.
        """
        count = step.num_tokens
        size = next(size for size in self.sizes if size >= count)
        host = self._inputs.next_host(size)
        self._fill(host, step)
        _fill_outputs(host, step, drawing)
        with_lora = bool((step.adapters >= 0).any())
        if with_lora:
            self._list_work(step, size)
        self._inputs.send(host, len(step.items), with_lora)
        recorded = self._recorded[size, with_lora]
        recorded.replay()
        places = self._places[size]
        return recorded.outputs[0][:count], self._builder.outputs_at(step, drawing, *places)

    def _shape(self, size: int) -> _Shape:
        from lorax_kernels.attention_triton import tile_rows

        config, device = self._decoder.config, self._builder.device
        sequences = min(size, self._builder.max_num_seqs)
        dtype = self._cache.data.dtype
        block_m = tile_rows(sequences, config.head_dim, dtype, device.index)
        return _Shape(size, sequences, size * self._group // block_m + sequences, block_m)

    def _fill(self, host: HostCopy, step: StepArrays) -> None:
        parts, shape, rows, count = host.parts, self._shapes[host.size], step.num_tokens, len(step.items)
        parts["ids"][:rows] = step.ids
        parts["positions"][:rows] = step.positions
        parts["slot_mapping"][:rows] = step.slot_mapping
        parts["query_start"][:count] = step.query_start[:-1]
        parts["query_start"][count:] = rows
        parts["contexts"][:count] = step.contexts
        if step.num_decodes:
            parts["decode_contexts"][: step.num_decodes] = step.contexts[: step.num_decodes]
        if step.pending.size:
            parts["pending"][step.pending[:, 0]] = step.pending[:, 1]
        host.tables[:count, : step.tables.shape[1]] = step.tables
        tiles = self._list_tiles(step.prefills(), self._group, shape.block_m)
        parts["tiles"][: len(tiles)] = tiles

    def _list_work(self, step: StepArrays | None, size: int) -> LoraBatch:
        """The adapters' work of a step, or of none."""
        arena = self._builder.arena
        place = arena.slot_pages, arena.slot_ranks, self._builder.device, self._inputs.work[size]
        if step is not None and len(step.items) == 1:
            return LoraBatch.build_first_rows(step.num_tokens, int(step.adapters[0]), *place)
        adapters = np.full(size, -1, dtype=np.int32)
        if step is not None:
            adapters[: step.num_tokens] = step.token_adapters
        batch = LoraBatch.build(adapters, *place)
        assert batch is not None
        return batch

    def _record(self, size: int, with_lora: bool, recorder: GraphRecorder) -> Recorded:
        inputs, shape = self._inputs, self._shapes[size]
        host = inputs.next_host(size)
        host.tables.fill(0)
        nobody = self._list_work(None, size)
        inputs.send(host, shape.sequences + 1, with_work=True)
        lora = LoraBatches(*[nobody] * 4) if with_lora else LoraBatches()
        attention = AttentionBatch(
            query_start=inputs.part("query_start", size),
            context_lens=inputs.part("contexts", size),
            block_tables=inputs.part("tables", size),
            slot_mapping=inputs.part("slot_mapping", size),
            num_decodes=shape.sequences,
            max_query=size,
            max_context=self._builder.max_blocks * self._builder.block_size,
            # With nobody's sequence, there are more than decodes: nothing may take this for a decode step.
            query_start_host=np.arange(shape.sequences + 2, dtype=np.int32),
            context_lens_host=np.zeros(shape.sequences + 1, dtype=np.int32),
            block_tables_host=np.zeros((shape.sequences + 1, 1), dtype=np.int32),
            fixed=FixedAttention(
                inputs.part("decode_contexts", size),
                inputs.part("tiles", size),
            ),
        )
        positions = inputs.part("positions", size)

        def forward() -> tuple[torch.Tensor, ...]:
            pending = inputs.part("pending", size)
            ids = newest_ids(inputs.part("ids", size), pending, self._last_token)
            return (self._decoder.forward(ids, positions, attention, lora, self._cache),)

        return recorder.record(forward)


def _fill_outputs(host: HostCopy, step: StepArrays, drawing: Drawing) -> None:
    """What `Outputs` has on the device."""
    parts, count = host.parts, len(step.sampled)
    if not count:
        return
    parts["control"][:] = drawing.mode, drawing.turn
    parts["sampled_slots"][:count] = step.sampled_slots
    if step.logit_rows is not None:
        parts["logit_rows"][:count] = step.logit_rows
