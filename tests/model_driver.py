"""Drives a model runner by hand, without scheduler or engine: any mix of chunks, on scattered KV blocks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as AbstractSequence
from pathlib import Path
from typing import Any

import torch

from lorax_backend.adapters.checkpoint import AdapterInspector
from lorax_backend.config import ServerConfig
from lorax_backend.model.lora import lora_targets
from lorax_backend.model.recorder import GraphRecorder
from lorax_backend.model.runner import TorchModelRunner
from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence, Sequence, StepResult
from lorax_backend.types import SamplingParams

GREEDY = SamplingParams(max_new_tokens=1000)


class ModelDriver:
    """A runner with the smallest possible stand-in for scheduler and adapter manager."""

    def __init__(
        self,
        model_path: Path,
        seed: int = 0,
        recorder: GraphRecorder | None = None,
        progress: Callable[[str], None] | None = None,
        **options: object,
    ) -> None:
        settings = {"num_blocks": 256, "max_batch_size": 32, "adapter_pages": 48, "device": "cpu"} | options
        config = ServerConfig(model_id=str(model_path), **settings)
        self.runner = TorchModelRunner(config, model_path, progress, recorder)
        self.block_size = self.runner.info(0.0).block_size
        self._free_blocks = list(range(self.runner.num_blocks))
        random.Random(seed).shuffle(self._free_blocks)  # neighbours in a sequence are strangers in the cache
        self._free_slots = list(range(self.runner.limits.max_num_seqs))
        self._next_handle = 0
        self._pending: set[int] = set()
        self.last_logits: dict[int, torch.Tensor] = {}

    def add_adapter(self, folder: Path) -> int:
        """Load a PEFT folder to the arena; its slot."""
        runner = self.runner
        targets = lora_targets(runner.model_config)
        adapter = AdapterInspector(targets, runner.layout, runner.dtype, 64).inspect(folder).load()
        slot = runner.arena.allocate(adapter.rank)
        assert slot is not None
        runner.arena.write(slot, adapter)
        return slot

    def add(self, ids: Iterable[int], adapter_slot: int = -1, sampling: SamplingParams = GREEDY) -> Sequence:
        ids = list(ids)
        seq = Sequence(self._next_handle, len(ids), sampling, None, 0, 0.0, token_ids=ids)
        self._next_handle += 1
        seq.slot = self._free_slots.pop()
        seq.adapter_slot = adapter_slot
        return seq

    def remove(self, seq: Sequence) -> None:
        self._free_blocks += seq.block_table
        seq.block_table.clear()
        self._free_slots.append(seq.slot)
        seq.slot = -1

    def batch(self, work: AbstractSequence[tuple[Sequence, int]], in_flight: bool = False) -> ScheduledBatch:
        """`count` more tokens of each sequence, decodes first. With `in_flight`, one token beyond the known ones."""
        items = []
        for seq, count in sorted(work, key=lambda pair: pair[1] > 1):
            known = len(seq.token_ids) + (1 if in_flight else 0)
            end = seq.num_computed + count
            assert end <= known
            while len(seq.block_table) * self.block_size < end:
                seq.block_table.append(self._free_blocks.pop())
            index = known - seq.prompt_len
            items.append(ScheduledSequence(seq, seq.num_computed, count, end == known, index))
            seq.num_computed = end
        return ScheduledBatch(items, sum(item.count for item in items))

    def step(self, work: AbstractSequence[tuple[Sequence, int]]) -> StepResult:
        """Run one step and append nothing; the logits of sampled rows are kept by handle in `last_logits`."""
        batch = self.batch(work)
        seen: list[torch.Tensor] = []
        decoder = self.runner.decoder
        original = decoder.logits

        def recording(hidden: torch.Tensor, lora: object) -> torch.Tensor:
            seen.append(original(hidden, lora))
            return seen[-1].clone()

        def recording_both(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            hidden, logits = type(decoder).forward_with_logits(decoder, *arguments)
            seen.append(logits)
            return hidden, logits.clone()

        decoder.logits, decoder.forward_with_logits = recording, recording_both
        try:
            result = self.runner.launch(batch).result()
        finally:
            del decoder.logits, decoder.forward_with_logits
        sampled = [item.seq.handle for item in batch.sequences if item.sample]
        # Logits of prompts that are scored come before those of the rows that sample.
        self.last_logits = dict(zip(sampled, seen[-1].clone(), strict=True)) if sampled else {}
        return result

    def generate(self, sequences: list[Sequence], new_tokens: int) -> dict[int, list[int]]:
        """Prefill in one step, then decode together; new ids by handle."""
        drawn: dict[int, list[int]] = {seq.handle: [] for seq in sequences}
        for _ in range(new_tokens):
            batch = self.batch([(seq, len(seq.token_ids) - seq.num_computed) for seq in sequences])
            result = self.runner.launch(batch).result()
            for item, token in zip(batch.sequences, result.token_ids, strict=True):
                item.seq.token_ids.append(token)
                drawn[item.seq.handle].append(token)
        return drawn
