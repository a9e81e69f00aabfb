"""Random paged-attention batches and what they must give, in float64, from each sequence's keys in order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lorax_kernels import AttentionBatch, FixedAttention


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


def fixed_batch(
    rows: int, sequences: int, tiles: int, width: int, device: torch.device | str = "cpu"
) -> AttentionBatch:
    """The batch of a captured graph for up to `rows` token rows: nothing but device memory of fixed address."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return AttentionBatch(
        query_start=zeros(sequences + 2),
        context_lens=zeros(sequences + 1),
        block_tables=zeros(sequences + 1, width),
        slot_mapping=torch.full((rows,), -1, dtype=torch.int64, device=device),
        num_decodes=sequences,
        max_query=rows,
        max_context=0,
        query_start_host=np.arange(sequences + 2, dtype=np.int32),
        context_lens_host=np.zeros(sequences + 1, dtype=np.int32),
        block_tables_host=np.zeros((sequences + 1, 1), dtype=np.int32),
        fixed=FixedAttention(zeros(sequences), zeros(tiles, 2)),
    )


def fill_fixed(batch: AttentionBatch, case: AttentionCase, listed: np.ndarray) -> None:
    """Put a case into the memory of `fixed_batch`; `listed` are its tiles."""
    assert batch.fixed is not None
    real = case.batch()
    count, none = real.num_sequences, batch.context_lens.numel() - 1
    batch.query_start.fill_(int(real.query_start[-1]))
    batch.query_start[: count + 1] = real.query_start
    batch.context_lens.zero_()
    batch.context_lens[:count] = real.context_lens
    batch.block_tables.fill_(1 << 30)  # a block that nobody may look for
    batch.block_tables[:count, : real.block_tables.shape[1]] = real.block_tables
    batch.fixed.decode_contexts.zero_()
    batch.fixed.decode_contexts[: real.num_decodes] = real.context_lens[: real.num_decodes]
    batch.fixed.tiles[:, 0], batch.fixed.tiles[:, 1] = none, 0
    batch.fixed.tiles[: len(listed)] = torch.from_numpy(listed)


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
