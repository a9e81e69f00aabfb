"""InputBatch: a scheduled step as tensors. All work on the host is numpy; nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from lorax_backend.adapters.arena import LoraArena
from lorax_backend.model.decoder import LoraBatches
from lorax_backend.model.greedy import NOT_HERE, Drawing
from lorax_backend.model.lora import LM_HEAD
from lorax_backend.model.step_arrays import IntArray, StepArrays
from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence, Sequence
from lorax_kernels import AttentionBatch, LoraBatch

_CONTROL = 4  # integers before the places in a step's outputs, which begin on 16 bytes


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
        return self._arrays_of_one(given[0]) if len(given) == 1 else self._arrays_of_many(given)

    def _arrays_of_many(self, given: list[ScheduledSequence]) -> StepArrays:
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
            num_decodes=int(np.count_nonzero(counts == 1)),
            sampled=[given[index] for index in sampling],
            sampled_slots=np.array([given[index].seq.slot for index in sampling], dtype=np.int64),
            logit_rows=None if all_rows else query_start[1:][place[sampling]].astype(np.int64) - 1,
            scored=[(item, int(query_start[index])) for index, item in enumerate(items) if _is_scored(item)],
        )

    def _arrays_of_one(self, item: ScheduledSequence) -> StepArrays:
        """What `_arrays_of_many` makes of one sequence, in few calls: an idle engine's first token waits for each."""
        seq, count = item.seq, item.count
        end = item.start + count
        query_start = np.array([0, count], dtype=np.int32)
        tables = self.block_tables([seq], -(-end // self.block_size))
        ids, pending = self._ids([item], query_start)
        positions = np.arange(item.start, end, dtype=np.int32)
        block, offset = np.divmod(positions, self.block_size)
        sampled = [item] if item.sample else []
        return StepArrays(
            items=[item],
            ids=ids,
            pending=pending,
            positions=positions,
            query_start=query_start,
            contexts=np.array([end], dtype=np.int32),
            tables=tables,
            slot_mapping=tables[0].astype(np.int64)[block] * self.block_size + offset,
            adapters=np.array([seq.adapter_slot], dtype=np.int32),
            num_decodes=int(count == 1),
            sampled=sampled,
            sampled_slots=np.array([seq.slot] * len(sampled), dtype=np.int64),
            logit_rows=None if len(sampled) == count else np.array([count - 1] * len(sampled), np.int64),
            scored=[(item, 0)] if _is_scored(item) else [],
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
        if not step.sampled:
            return Outputs(step.sampled, step.scored, drawing)
        count = len(step.sampled)
        rows = () if step.logit_rows is None else step.logit_rows
        array = np.zeros(_CONTROL + 2 * (count + len(rows)), dtype=np.int32)
        array[:2] = drawing.mode, drawing.turn
        places = array[_CONTROL:].view(np.int64)
        places[:count], places[count:] = step.sampled_slots, rows
        sent = self.upload(array)
        on_device = sent[_CONTROL:].view(torch.int64)
        return self.outputs_at(step, drawing, sent[:2], on_device[:count], on_device[count:])

    def outputs_at(
        self,
        step: StepArrays,
        drawing: Drawing,
        control: torch.Tensor,
        sampled_slots: torch.Tensor,
        logit_rows: torch.Tensor,
    ) -> Outputs:
        """`outputs` of which the first entries of these tensors on the device are a part already."""
        outputs, count = Outputs(step.sampled, step.scored, drawing), len(step.sampled)
        if not count:
            return outputs
        outputs.control, outputs.sampled_slots = control, sampled_slots[:count]
        outputs.logit_rows = None if step.logit_rows is None else logit_rows[:count]
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
        # As unsigned numbers, negative ones are larger than any vocabulary.
        if ids.size and ids.view(np.uint32).max() >= self.vocab_size:
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
        if len(sequences) == 1:
            return self._tables[sequences[0].slot, None, :width].copy()
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


def _is_scored(item: ScheduledSequence) -> bool:
    """Somebody wants the log probabilities of a prompt of which this is a chunk."""
    return item.seq.sampling.prompt_logprobs and item.start < item.seq.prompt_len


def _row_order(starts: IntArray, counts: IntArray) -> npt.NDArray[np.int64] | None:
    """Indices that put decodes first and prompts that begin in this step last; None if they lie so already."""
    kind = np.where(counts == 1, 0, np.where(starts > 0, 1, 2))
    if bool((kind[1:] >= kind[:-1]).all()):
        return None
    return np.argsort(kind, kind="stable")
