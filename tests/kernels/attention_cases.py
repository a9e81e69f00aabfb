"""Random paged-attention batches and what they must give, in float64, from each sequence's keys in order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lorax_kernels import AttentionBatch


@dataclass
class AttentionCase:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    query_start: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    slot_mapping: np.ndarray
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    scale: float

    def batch(self, device: torch.device | str = "cpu") -> AttentionBatch:
        return AttentionBatch.build(
            self.query_start, self.context_lens, self.block_tables, self.slot_mapping, device
        )


def make_attention_case(
    queries: tuple[int, ...],
    contexts: tuple[int, ...],
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 64,
    block_size: int = 16,
    consecutive: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionCase:
    """Sequences with `queries[i]` new tokens and `contexts[i]` in all; unused cache positions are NaN."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    query_heads, key_heads = heads
    widths = [-(-c // block_size) for c in contexts]
    total = sum(widths)
    order = np.arange(total + 3) if consecutive else rng.permutation(total + 3)
    tables = np.zeros((len(contexts), max(widths) + 2), np.int32)
    shape = (total + 3, block_size, key_heads, head_dim)
    k_cache = torch.full(shape, float("nan"), dtype=dtype)
    v_cache = torch.full(shape, float("nan"), dtype=dtype)
    keys, values, slots, at = [], [], [], 0
    for i, (count, context) in enumerate(zip(queries, contexts, strict=True)):
        tables[i, : widths[i]] = order[at : at + widths[i]]
        at += widths[i]
        k = torch.randn(context, key_heads, head_dim).to(dtype)
        v = torch.randn(context, key_heads, head_dim).to(dtype)
        place = [int(tables[i, p // block_size]) * block_size + p % block_size for p in range(context)]
        k_cache.view(-1, key_heads, head_dim)[place] = k
        v_cache.view(-1, key_heads, head_dim)[place] = v
        slots += place[context - count :]
        keys.append(k.to(device))
        values.append(v.to(device))
    return AttentionCase(
        q=torch.randn(sum(queries), query_heads, head_dim).to(dtype).to(device),
        k_cache=k_cache.to(device),
        v_cache=v_cache.to(device),
        query_start=np.concatenate([[0], np.cumsum(queries)]).astype(np.int32),
        context_lens=np.array(contexts, np.int32),
        block_tables=tables,
        slot_mapping=np.array(slots, np.int64),
        keys=keys,
        values=values,
        scale=head_dim**-0.5,
    )


def expected_attention(case: AttentionCase, window: int | None = None) -> torch.Tensor:
    """Causal attention in float64."""
    out = torch.empty(case.q.shape, dtype=torch.float64, device=case.q.device)
    group = case.q.shape[1] // case.k_cache.shape[2]
    for i, context in enumerate(case.context_lens.tolist()):
        first, last = int(case.query_start[i]), int(case.query_start[i + 1])
        k = case.keys[i].double().repeat_interleave(group, 1)
        v = case.values[i].double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", case.q[first:last].double(), k) * case.scale
        row = torch.arange(context - (last - first), context, device=k.device)[:, None]
        column = torch.arange(context, device=k.device)
        seen = column <= row
        if window:
            seen &= column > row - window
        scores.masked_fill_(~seen, float("-inf"))
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out
