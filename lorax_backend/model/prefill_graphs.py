"""Small steps with prompt tokens as CUDA graphs: prefills, chunks over a cached context, and these mixed with decodes.

Launching the kernels of such a step one by one takes the host longer than the device takes to run them. A graph is
recorded for each padded number of token rows, with and without adapters, and for nothing else: how the rows are shared
out among sequences, what they see and which adapters they have is data in device memory (`_Inputs`). The attention
kernels are launched for as many decodes and prompt tiles as the rows could be; those a step lacks find no context, or
a sequence without rows, and end at once. The adapters' kernels are those of decode, whose loops are bounded by the
work list. Rows beyond the step's own have no sequence, store nothing, and nobody reads what becomes of them.

The graph ends with the hidden rows. The language model head runs outside, on the rows that sample, because its output
for every row that could sample would take more memory than all the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from lorax_backend.model.batch import BatchBuilder, StepArrays
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.decoder import Decoder, LoraBatches
from lorax_backend.model.kv_cache import KvCache
from lorax_backend.model.recorder import GraphRecorder, Recorded
from lorax_kernels import GRAPH_MAX_TOKENS, AttentionBatch, FixedAttention, LoraBatch, WorkBuffer
from lorax_kernels.greedy import newest_ids

_COPIES = 4  # host buffers in turn: more than the steps that can be in flight
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


@dataclass(slots=True)
class _Inputs:
    """What the recordings read: sections of one int32 tensor of fixed address, and the host copies sent to it.

    Sections, for R rows, S sequences and N tiles: ids, pending (the slot whose last drawn token replaces the id, -1 for
    none), positions, each [R]; slot_mapping int64 [R]; query_start [S + 2]; contexts [S + 1]; decode_contexts [S];
    tiles [N, 2]; block tables [S + 1, max_blocks] last, so that a step copies no more of them than it has sequences.
    Sequence S is nobody's: it has no rows and no context.
    """

    rows: int
    sequences: int
    tiles: int
    max_blocks: int
    device: torch.device
    data: torch.Tensor = field(init=False)
    _at: dict[str, int] = field(init=False)
    _hosts: list[torch.Tensor] = field(init=False)
    _turn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        rows, sequences = self.rows, self.sequences
        sizes = {
            "slot_mapping": 2 * rows,
            "ids": rows,
            "pending": rows,
            "positions": rows,
            "query_start": sequences + 2,
            "contexts": sequences + 1,
            "decode_contexts": sequences,
            "tiles": 2 * self.tiles,
            "tables": (sequences + 1) * self.max_blocks,
        }
        # Each section begins on 16 bytes, for which the kernels have been compiled already.
        ends = np.cumsum([-(-size // 4) * 4 for size in sizes.values()]).tolist()
        self._at = dict(zip(sizes, [0, *ends[:-1]], strict=True))
        self.data = torch.zeros(ends[-1], dtype=torch.int32, device=self.device)
        pinned = self.device.type == "cuda"
        self._hosts = [torch.zeros(ends[-1], dtype=torch.int32, pin_memory=pinned) for _ in range(_COPIES)]

    def part(self, data: torch.Tensor, name: str, count: int) -> torch.Tensor:
        """The first `count` entries of a section; rows of it for tiles and tables."""
        at = self._at[name]
        if name == "slot_mapping":
            return data[at : at + 2 * count].view(torch.int64)
        if name in ("tiles", "tables"):
            width = 2 if name == "tiles" else self.max_blocks
            return data[at : at + count * width].view(count, width)
        return data[at : at + count]

    def next_host(self) -> torch.Tensor:
        self._turn = (self._turn + 1) % _COPIES
        return self._hosts[self._turn]

    def send(self, host: torch.Tensor, sequences: int) -> None:
        """Copy everything up to the tables of the first `sequences`."""
        used = self._at["tables"] + sequences * self.max_blocks
        self.data[:used].copy_(host[:used], non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the launches for one padded size have room for. `block_m` are the packed rows of a tile."""

    rows: int
    sequences: int
    tiles: int
    block_m: int


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
        self.sizes = tuple(sorted(sizes))
        self._decoder, self._cache, self._builder, self._last_token = decoder, cache, builder, last_token
        self._group = decoder.config.num_heads // decoder.config.num_kv_heads
        self._shapes = {size: self._shape(size) for size in self.sizes}
        largest = list(self._shapes.values())
        self._inputs = _Inputs(
            self.sizes[-1],
            max(shape.sequences for shape in largest),
            max(shape.tiles for shape in largest),
            builder.max_blocks,
            builder.device,
        )
        max_pages = builder.arena.max_pages_per_slot
        self._work = {size: WorkBuffer(size, max_pages, builder.device, _COPIES) for size in self.sizes}
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

    def replay(self, step: StepArrays) -> torch.Tensor:
        """Run one step.

        Returns:
            [T, hidden], before the last norm. The next replay overwrites it.
        """
        count = step.num_tokens
        size = next(size for size in self.sizes if size >= count)
        self._send(step, self._shapes[size])
        with_lora = bool((step.adapters >= 0).any())
        if with_lora:
            adapters = np.full(size, -1, dtype=np.int32)
            adapters[:count] = step.token_adapters
            self._list_work(adapters, size)
        recorded = self._recorded[size, with_lora]
        recorded.replay()
        return recorded.outputs[0][:count]

    def _shape(self, size: int) -> _Shape:
        # Imported here, because Triton is not installed everywhere that graphs are not used.
        from lorax_kernels.attention_triton import tile_rows

        config, device = self._decoder.config, self._builder.device
        sequences = min(size, self._builder.max_num_seqs)
        dtype = self._cache.data.dtype
        block_m = tile_rows(sequences, config.head_dim, dtype, device.index)
        return _Shape(size, sequences, size * self._group // block_m + sequences, block_m)

    def _send(self, step: StepArrays, shape: _Shape) -> None:
        from lorax_kernels.attention_triton import list_tiles

        inputs, rows, count = self._inputs, step.num_tokens, len(step.items)
        host, nobody, decodes = inputs.next_host(), inputs.sequences, step.num_decodes
        sections = {
            name: inputs.part(host, name, size).numpy()
            for name, size in (
                ("ids", shape.rows), ("pending", shape.rows), ("positions", shape.rows),
                ("slot_mapping", shape.rows), ("query_start", nobody + 2), ("contexts", nobody + 1),
                ("decode_contexts", nobody), ("tiles", shape.tiles), ("tables", count),
            )
        }  # fmt: skip
        for name, values, rest in (
            ("ids", step.ids, 0),
            ("positions", step.positions, 0),
            ("slot_mapping", step.slot_mapping, -1),
            ("query_start", step.query_start, rows),
            ("contexts", step.contexts, 0),
            ("decode_contexts", step.contexts[:decodes], 0),
        ):
            sections[name][: len(values)] = values
            sections[name][len(values) :] = rest
        sections["pending"].fill(-1)
        if step.pending.size:
            sections["pending"][step.pending[:, 0]] = step.pending[:, 1]
        sections["tables"][:, : step.tables.shape[1]] = step.tables
        tiles = list_tiles(step.prefills(), self._group, shape.block_m)
        sections["tiles"][: len(tiles)] = tiles
        sections["tiles"][len(tiles) :] = nobody, 0
        inputs.send(host, count)

    def _list_work(self, adapters: np.ndarray[tuple[int], np.dtype[np.int32]], size: int) -> LoraBatch:
        arena = self._builder.arena
        batch = LoraBatch.build(
            adapters, arena.slot_pages, arena.slot_ranks, self._builder.device, self._work[size]
        )
        assert batch is not None
        return batch

    def _record(self, size: int, with_lora: bool, recorder: GraphRecorder) -> Recorded:
        self._send_nothing()
        inputs, data, shape = self._inputs, self._inputs.data, self._shapes[size]
        nobody = inputs.sequences
        lora = LoraBatches()
        if with_lora:
            lora = LoraBatches(*[self._list_work(np.full(size, -1, dtype=np.int32), size)] * 4)
        attention = AttentionBatch(
            query_start=inputs.part(data, "query_start", nobody + 2),
            context_lens=inputs.part(data, "contexts", nobody + 1),
            block_tables=inputs.part(data, "tables", nobody + 1),
            slot_mapping=inputs.part(data, "slot_mapping", size),
            num_decodes=shape.sequences,
            max_query=size,
            max_context=self._builder.max_blocks * self._builder.block_size,
            # With nobody's sequence, there are more than decodes: nothing may take this for a decode step.
            query_start_host=np.arange(shape.sequences + 2, dtype=np.int32),
            context_lens_host=np.zeros(shape.sequences + 1, dtype=np.int32),
            block_tables_host=np.zeros((shape.sequences + 1, 1), dtype=np.int32),
            fixed=FixedAttention(
                inputs.part(data, "decode_contexts", shape.sequences),
                inputs.part(data, "tiles", shape.tiles),
            ),
        )
        positions = inputs.part(data, "positions", size)

        def forward() -> tuple[torch.Tensor, ...]:
            pending = inputs.part(data, "pending", size)
            ids = newest_ids(inputs.part(data, "ids", size), pending, self._last_token)
            return (self._decoder.forward(ids, positions, attention, lora, self._cache),)

        return recorder.record(forward)

    def _send_nothing(self) -> None:
        """A step without sequences."""
        inputs = self._inputs
        host = inputs.next_host()
        host.zero_()
        inputs.part(host, "pending", inputs.rows).fill_(-1)
        inputs.part(host, "slot_mapping", inputs.rows).fill_(-1)
        inputs.part(host, "tiles", inputs.tiles)[:, 0] = inputs.sequences
        inputs.send(host, inputs.sequences + 1)
