"""InputBatch: a scheduled step as tensors. All work on the host is numpy; nothing waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from lorax_backend.adapters.arena import LoraArena
from lorax_backend.model.decoder import LoraBatches
from lorax_backend.model.greedy import NOT_HERE, Drawing
from lorax_backend.model.lora import LM_HEAD
from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence, Sequence
from lorax_kernels import AttentionBatch, LoraBatch

IntArray = npt.NDArray[np.int32]
_CONTROL = 4  # integers before the places in a step's outputs, which begin on 16 bytes


@dataclass(slots=True)
class StepArrays:
    """A step in numpy. T tokens, S sequences, R rows that sample, P ids that only the device knows.

    Attributes:
        items: the sequences as their rows lie: of one token first, then chunks over a cached context, then prompts that
            begin here.
        ids: int32 [T], 0 where the device knows better.
        pending: int64 [P, 2], token row and runner slot of those.
        positions: int32 [T]. query_start: int32 [S + 1]. contexts: int32 [S], this step's tokens included.
        tables: int32 [S, blocks]. slot_mapping: int64 [T].
        adapters: int32 [S], adapter slot of each sequence, -1 for none.
        sampled: the sequences that sample, in batch order; row r of the logits belongs to sampled[r].
        sampled_slots: int64 [R], their runner slots.
        logit_rows: int64 [R], their token rows; None if every token row samples.
        scored: chunks of prompts whose log probabilities are wanted, with each one's first token row.
    """

    items: list[ScheduledSequence]
    ids: IntArray
    pending: npt.NDArray[np.int64]
    positions: IntArray
    query_start: IntArray
    contexts: IntArray
    tables: IntArray
    slot_mapping: npt.NDArray[np.int64]
    adapters: IntArray
    sampled: list[ScheduledSequence]
    sampled_slots: npt.NDArray[np.int64]
    logit_rows: npt.NDArray[np.int64] | None
    scored: list[tuple[ScheduledSequence, int]]

    @property
    def num_tokens(self) -> int:
        return int(self.ids.size)

    @property
    def num_decodes(self) -> int:
        """The leading sequences that have one row each."""
        return int(np.count_nonzero(np.diff(self.query_start) == 1))

    def prefills(self) -> Iterator[tuple[int, int, int, int]]:
        """(sequence, first row, rows, context length) of every other sequence."""
        starts, contexts = self.query_start.tolist(), self.contexts.tolist()
        for i in range(self.num_decodes, len(contexts)):
            yield i, starts[i], starts[i + 1] - starts[i], contexts[i]

    @property
    def token_adapters(self) -> IntArray:
        """int32 [T]: adapter slot of every token row."""
        return np.repeat(self.adapters, np.diff(self.query_start))


@dataclass(slots=True)
class Outputs:
    """What becomes of a step's hidden rows, on the device; fields as in `StepArrays`. `head_lora` are the adapter rows
    of the logits, None if no sampled row's adapter changes lm_head. `control` int32 [2] is `drawing` on the device."""

    sampled: list[ScheduledSequence]
    scored: list[tuple[ScheduledSequence, int]]
    drawing: Drawing
    control: torch.Tensor | None = None
    sampled_slots: torch.Tensor | None = None
    logit_rows: torch.Tensor | None = None
    head_lora: LoraBatch | None = None


@dataclass(slots=True)
class InputBatch:
    """Everything a forward pass reads: ids and positions int32 [T], and what follows it."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    lora: LoraBatches
    outputs: Outputs


@dataclass(slots=True)
class _TableRow:
    """Whose block table a mirror row holds, and how many of its blocks."""

    handle: int = -1
    preemptions: int = -1
    length: int = 0


@dataclass(slots=True)
class BatchBuilder:
    """Builds input batches. Owns a numpy mirror of the running sequences' block tables, one row a runner slot, so that
    a decode step copies only the blocks that are new."""

    block_size: int
    max_num_seqs: int
    max_blocks: int
    device: torch.device
    arena: LoraArena
    vocab_size: int
    _tables: IntArray = field(init=False)
    _rows: list[_TableRow] = field(init=False)

    def __post_init__(self) -> None:
        self._tables = np.zeros((self.max_num_seqs, self.max_blocks), dtype=np.int32)
        self._rows = [_TableRow() for _ in range(self.max_num_seqs)]

    def arrays(self, batch: ScheduledBatch) -> StepArrays:
        """The numbers of a step; nothing of it is on the device yet.

        Raises:
            ValueError: some id is no token of the model.
        """
        given = batch.sequences
        starts = np.array([item.start for item in given], dtype=np.int32)
        counts = np.array([item.count for item in given], dtype=np.int32)
        order = _row_order(starts, counts)
        items = given
        if order is not None:
            items, starts, counts = [given[i] for i in order], starts[order], counts[order]
        query_start = np.zeros(len(items) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        row_of_token = np.repeat(np.arange(len(items)), counts)
        positions = (np.arange(query_start[-1]) - query_start[row_of_token] + starts[row_of_token]).astype(
            np.int32
        )
        contexts = starts + counts
        tables = self.block_tables([item.seq for item in items], -(-int(contexts.max()) // self.block_size))
        blocks = tables[row_of_token, positions // self.block_size].astype(np.int64)
        ids, pending = self._ids(items, query_start)
        place = (
            np.arange(len(items)) if order is None else np.argsort(order)
        )  # of a given item among the rows
        sampling = [index for index, item in enumerate(given) if item.sample]
        all_rows = len(sampling) == int(query_start[-1])
        return StepArrays(
            items=items,
            ids=ids,
            pending=pending,
            positions=positions,
            query_start=query_start,
            contexts=contexts,
            tables=tables,
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            adapters=np.array([item.seq.adapter_slot for item in items], dtype=np.int32),
            sampled=[given[index] for index in sampling],
            sampled_slots=np.array([given[index].seq.slot for index in sampling], dtype=np.int64),
            logit_rows=None if all_rows else query_start[1:][place[sampling]].astype(np.int64) - 1,
            scored=[
                (item, int(query_start[index]))
                for index, item in enumerate(items)
                if item.seq.sampling.prompt_logprobs and item.start < item.seq.prompt_len
            ],
        )

    def build(self, step: StepArrays, last_token: torch.Tensor, drawing: Drawing = NOT_HERE) -> InputBatch:
        """Take a step to the device. `last_token` int64 [slots], on the device: the ids of tokens drawn but not yet
        known to the host."""
        input_ids = self.upload(step.ids)
        if step.pending.size:
            rows, slots = self.upload(np.ascontiguousarray(step.pending.T))
            input_ids.index_copy_(0, rows, last_token.index_select(0, slots).to(torch.int32))
        return InputBatch(
            input_ids=input_ids,
            positions=self.upload(step.positions),
            attention=AttentionBatch.build(
                step.query_start, step.contexts, step.tables, step.slot_mapping, self.device
            ),
            lora=self._lora(step),
            outputs=self.outputs(step, drawing),
        )

    def outputs(self, step: StepArrays, drawing: Drawing = NOT_HERE) -> Outputs:
        """Take to the device what follows the forward pass, in one copy."""
        outputs = Outputs(step.sampled, step.scored, drawing)
        if not step.sampled:
            return outputs
        count = len(step.sampled)
        rows = () if step.logit_rows is None else step.logit_rows
        array = np.zeros(_CONTROL + 2 * (count + len(rows)), dtype=np.int32)
        array[:2] = drawing.mode, drawing.turn
        places = array[_CONTROL:].view(np.int64)
        places[:count], places[count:] = step.sampled_slots, rows
        sent = self.upload(array)
        on_device = sent[_CONTROL:].view(torch.int64)
        outputs.control, outputs.sampled_slots = sent[:2], on_device[:count]
        outputs.logit_rows = None if step.logit_rows is None else on_device[count:]
        outputs.head_lora = self.head_batch(step.sampled)
        return outputs

    def head_batch(self, items: list[ScheduledSequence]) -> LoraBatch | None:
        """The adapter rows of one row of logits for each of `items`."""
        slots = np.array([item.seq.adapter_slot for item in items], dtype=np.int32)
        if not (slots >= 0).any():
            return None
        having = self._having(slots, LM_HEAD)
        return self._lora_batch(having) if (having >= 0).any() else None

    def head_lora(self, adapter_slot: int, rows: int) -> LoraBatch | None:
        """The adapter rows of `rows` rows of logits that all belong to one adapter."""
        return self._lora_batch(self._having(np.full(rows, adapter_slot, dtype=np.int32), LM_HEAD))

    def check_ids(self, ids: IntArray) -> None:
        """A GPU would find an id out of range only in a kernel, and no step after that would run.

        Raises:
            ValueError: some of `ids` are no token of the model.
        """
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(
                f"token ids {ids.min()} to {ids.max()} exceed the vocabulary of {self.vocab_size}"
            )

    def upload(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        """A device tensor of a host array. On CUDA through pinned memory, which torch keeps until the copy is done."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def _ids(
        self, items: list[ScheduledSequence], query_start: IntArray
    ) -> tuple[IntArray, npt.NDArray[np.int64]]:
        ids: list[int] = []
        pending: list[tuple[int, int]] = []
        for index, item in enumerate(items):
            known = item.seq.token_ids
            end = item.start + item.count
            if item.count == 1 and end <= len(known):
                ids.append(known[item.start])
                continue
            ids += known[item.start : end]
            if end > len(known):
                pending.append((int(query_start[index + 1]) - 1, item.seq.slot))
                ids.append(0)
        array = np.array(ids, dtype=np.int32)
        self.check_ids(array)
        return array, np.array(pending, dtype=np.int64)

    def block_tables(self, sequences: list[Sequence], width: int) -> IntArray:
        """int32 [S, width]: the first `width` blocks of each sequence, arbitrary beyond its end."""
        for seq in sequences:
            row = self._rows[seq.slot]
            if row.handle != seq.handle or row.preemptions != seq.num_preemptions:
                row.handle, row.preemptions, row.length = seq.handle, seq.num_preemptions, 0
            length = len(seq.block_table)
            if length > row.length:
                self._tables[seq.slot, row.length : length] = seq.block_table[row.length :]
                row.length = length
        return self._tables[[seq.slot for seq in sequences], :width]

    def _lora(self, step: StepArrays) -> LoraBatches:
        if not (step.adapters >= 0).any():
            return LoraBatches()
        token_slots = step.token_adapters
        if self.device.type != "cpu":
            every = self._lora_batch(token_slots)
            return LoraBatches(every, every, every, every)
        made: dict[bytes, LoraBatch | None] = {}
        kinds: list[LoraBatch | None] = []
        for kind in ("qkv", "o", "gate_up", "down"):
            # A CPU gains by skipping adapters that change nothing at a site; most kinds share one batch.
            wanted = self._having(token_slots, kind)
            key = wanted.tobytes()
            if key not in made:
                made[key] = self._lora_batch(wanted)
            kinds.append(made[key])
        return LoraBatches(*kinds)

    def _having(self, slots: IntArray, kind: str) -> IntArray:
        """`slots` with -1 where the adapter has no weights at sites of this kind."""
        mask = self.arena.kind_mask(kind)
        return np.where((slots >= 0) & mask[slots], slots, np.int32(-1))

    def _lora_batch(self, slots: IntArray) -> LoraBatch | None:
        return LoraBatch.build(slots, self.arena.slot_pages, self.arena.slot_ranks, self.device)


def _row_order(starts: IntArray, counts: IntArray) -> npt.NDArray[np.int64] | None:
    """Indices that put decodes first and prompts that begin in this step last; None if they lie so already."""
    kind = np.where(counts == 1, 0, np.where(starts > 0, 1, 2))
    if bool((kind[1:] >= kind[:-1]).all()):
        return None
    return np.argsort(kind, kind="stable")
