"""Graphs without a GPU: a recorder that runs the recorded function again, and kernels that read device memory alone.

The torch twins are told of a step by numbers on the host, which a replay must not depend on. `read_memory_only` puts
functions in their place that see what the Triton kernels see: the buffers, and of the host's numbers the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorax_backend.model.recorder import Recorded
from lorax_kernels import AttentionBatch, LoraBatch, attention_reference, reference
from lorax_kernels.layout import PAGE_RANK


class FakeRecorder:
    """Implements `GraphRecorder`. `fail_at` is the recording that fails, counted from 0."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.recorded = 0
        self.replays = 0
        self._fail_at = fail_at

    def record(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> Recorded:
        if self.recorded == self._fail_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        outputs = tuple(tensor.fill_(float("nan")) for tensor in run())

        def replay() -> None:
            self.replays += 1
            for kept, computed in zip(outputs, run(), strict=True):
                kept.copy_(computed)

        return Recorded(replay, outputs)


def read_memory_only(monkeypatch: pytest.MonkeyPatch, tile_rows: int) -> None:
    """Replace the twins of attention and LoRA in recordings, for the length of a test; prompt tiles have `tile_rows`
    packed rows."""
    twin = reference.add_lora

    def add_lora(*arguments: Any) -> None:
        batch = arguments[3]
        (twin if batch.work is None else _add_lora)(*arguments)

    monkeypatch.setattr(attention_reference, "paged_attention", _Attention(tile_rows))
    monkeypatch.setattr(reference, "add_lora", add_lora)


class _Attention:
    """`paged_attention` of recordings, by one program after another, each as the Triton kernels cut the work."""

    def __init__(self, tile_rows: int) -> None:
        self._tile_rows = tile_rows
        self._twin = attention_reference.paged_attention

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        if batch.fixed is None and batch.context_lens_host.any():
            return self._twin(q, k_cache, v_cache, batch, scale, window)
        out = torch.full_like(q, float("nan"))
        group = q.shape[1] // k_cache.shape[2]
        contexts = batch.context_lens if batch.fixed is None else batch.fixed.decode_contexts
        work = [(i, 0, 1, i, 1) for i in range(batch.num_decodes) if int(contexts[i])]
        if batch.fixed is not None:
            for sequence, packed in batch.fixed.tiles.tolist():
                first, end = batch.query_start[sequence : sequence + 2].tolist()
                count = end - first
                begin, last = packed // group, -(-(packed + self._tile_rows) // group)
                work.append((sequence, begin, min(last, count), first, count))
        for sequence, begin, end, first, count in work:
            if begin >= end:
                continue
            rows = slice(first + begin, first + end)
            context = int(batch.context_lens[sequence])
            position = torch.arange(context)
            blocks = batch.block_tables[sequence].long()[position // k_cache.shape[1]]
            offset = position % k_cache.shape[1]
            keys = k_cache[blocks, offset].repeat_interleave(group, 1)
            values = v_cache[blocks, offset].repeat_interleave(group, 1)
            mine = torch.arange(context - count + begin, context - count + end)[:, None]
            seen = position <= mine
            if window:
                seen &= position > mine - window
            scores = torch.einsum("qhd,khd->hqk", q[rows], keys) * scale
            scores.masked_fill_(~seen, float("-inf"))
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return out


def _add_lora(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    batch: LoraBatch,
    out: torch.Tensor,
    out_slices: tuple[int, ...],
) -> None:
    """The delta of the batch's work list, block by block."""
    assert batch.work is not None
    data, at = batch.work.data, batch.work.capacity
    for record in data[at.blocks_at :][: 8 * int(data[0])].view(-1, 8).tolist():
        first, count, page_at, pages = record[:4]
        rows = data[at.rows_at + first :][:count].long()
        for page in data[at.pages_at + page_at :][:pages].tolist():
            column = 0
            for index, width in enumerate(out_slices):
                h = x[rows] @ a[page, index].T
                assert h.shape[1] == PAGE_RANK
                out[rows, column : column + width] += h @ b[page, :, column : column + width]
                column += width
