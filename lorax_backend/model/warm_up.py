"""Kernels compiled at start, so that no request waits for a compiler while all others wait with it."""

from __future__ import annotations

import numpy as np
import torch

from lorax_backend.model.batch import BatchBuilder
from lorax_backend.model.decoder import Decoder, LoraBatches
from lorax_backend.model.kv_cache import KvCache
from lorax_kernels import PAGE_RANK, AttentionBatch, LoraBatch
from lorax_kernels.tuning import prefill_rows

_TOKENS = (1, 17, 200, 300)


def warm_up_prefill(decoder: Decoder, builder: BatchBuilder, cache: KvCache) -> None:
    """Run what steps with prompts run that are no graphs; nothing is written to the cache."""
    device = builder.device
    longest = builder.max_blocks * builder.block_size
    for tokens in _TOKENS:
        # Of several prompts where none may be as long: a list of blocks ends with the longest.
        starts = np.array([*range(0, tokens, longest), tokens], dtype=np.int32)
        attention = AttentionBatch.build(
            starts,
            np.diff(starts),
            np.zeros((starts.size - 1, builder.max_blocks), dtype=np.int32),
            np.full(tokens, -1, dtype=np.int64),
            device,
        )
        ids = torch.zeros(tokens, dtype=torch.int32, device=device)
        work = _one_adapter(tokens, builder)
        hidden = decoder.forward(ids, ids, attention, LoraBatches(work, work, work, work), cache)
        decoder.logits(hidden, work)
    if device.type != "cpu":
        # Products of as many rows as the tables of this device tell apart, which may have others with adapters.
        for rows in prefill_rows(device.index):
            decoder.run_products(rows, None)
            decoder.run_products(rows, _one_adapter(rows, builder))


def _one_adapter(tokens: int, builder: BatchBuilder) -> LoraBatch | None:
    """All rows of a step of one adapter, in the first pages there are."""
    return LoraBatch.build(
        np.zeros(tokens, dtype=np.int32),
        np.zeros((1, builder.arena.max_pages_per_slot), dtype=np.int32),
        np.full(1, PAGE_RANK * min(2, builder.arena.max_pages_per_slot), dtype=np.int32),
        builder.device,
    )
