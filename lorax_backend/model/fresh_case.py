"""Steps of fresh prompts to try attention on, and what the answer is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorax_backend.model.attention import FreshFunction, attend
from lorax_backend.model.head_layout import HeadLayout
from lorax_kernels import AttentionBatch


@dataclass(frozen=True, slots=True)
class FreshCase:
    """A step of fresh prompts: queries, and values as a part of a wider row, as the model has them."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    cache: tuple[torch.Tensor, torch.Tensor]
    batch: AttentionBatch
    scale: float

    @classmethod
    def random(cls, layout: HeadLayout, lengths: Sequence[int], seed: int) -> FreshCase:
        rng = np.random.default_rng(seed)
        generator = torch.Generator(device=layout.device).manual_seed(seed)
        total, size = sum(lengths), layout.block_size
        shape = (total, layout.num_heads + 2 * layout.num_kv_heads, layout.head_dim)
        rows = torch.randn(shape, generator=generator, dtype=torch.float32, device=layout.device)
        q, k, v = rows.to(layout.dtype).split(
            (layout.num_heads, layout.num_kv_heads, layout.num_kv_heads), dim=1
        )
        widths = [-(-length // size) for length in lengths]
        order = rng.permutation(sum(widths)).astype(np.int32)
        tables = np.zeros((len(lengths), max(widths)), dtype=np.int32)
        slots, at = [], 0
        for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
            tables[row, :width] = order[at : at + width]
            at += width
            position = np.arange(length)
            slots.append(tables[row, position // size].astype(np.int64) * size + position % size)
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        mapping = np.concatenate(slots)
        cached = (sum(widths), size, layout.num_kv_heads, layout.head_dim)
        cache = torch.zeros((2, *cached), dtype=layout.dtype, device=layout.device)
        index = torch.from_numpy(mapping).to(layout.device)
        for store, part in zip(cache, (k, v), strict=True):
            store.view(-1, *cached[2:]).index_copy_(0, index, part.contiguous())
        batch = AttentionBatch.build(starts, np.diff(starts), tables, mapping, layout.device)
        return cls(q.contiguous(), k, v, (cache[0], cache[1]), batch, layout.head_dim**-0.5)

    def run(self, function: FreshFunction | None, window: int | None) -> torch.Tensor:
        return attend(self.queries, self.values, self.cache, self.batch, self.scale, window, function)

    def expected(self, window: int | None) -> torch.Tensor:
        """Causal attention in float64, a sequence and a key head at a time, since the scores of all take gigabytes."""
        heads = self.keys.shape[1]
        group = self.queries.shape[1] // heads
        out = torch.empty_like(self.queries, dtype=torch.float64)
        for first, last in itertools.pairwise(self.batch.query_start_host.tolist()):
            position = torch.arange(last - first, device=out.device)
            hidden = position > position[:, None]
            if window is not None:
                hidden |= position <= position[:, None] - window
            for head in range(heads):
                mine = slice(head * group, (head + 1) * group)
                q = self.queries[first:last, mine].double()
                k, v = (t[first:last, head].double() for t in (self.keys, self.values))
                scores = (
                    torch.einsum("qhd,kd->hqk", q, k).mul_(self.scale).masked_fill_(hidden, float("-inf"))
                )
                out[first:last, mine] = torch.einsum("hqk,kd->qhd", scores.softmax(-1), v)
        return out
