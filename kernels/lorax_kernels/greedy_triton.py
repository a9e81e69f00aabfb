"""Greedy drawing in Triton: what a CUDA device runs.

The columns of a row are split over programs. Each leaves its largest logit, that one's id and its sum of exponentials,
and the last of a row to finish combines them in their order, so that a result does not depend on who that is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorax_kernels.configs import launch_options
from lorax_kernels.greedy import LOGIT_LIMIT, SCORED, GreedyMemory, num_splits
from lorax_kernels.sizes import cdiv, next_power_of_2
from lorax_kernels.tuning import node_config

_MOST_COLUMNS = 2048  # of a tile
_LANE_COLUMNS = 8  # of a thread
_IDS_BLOCK = 128
_NO_ID = tl.constexpr(2**31 - 1)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit(do_not_specialize=("max_rows",))
def greedy_kernel(
    logits_ptr, control_ptr, slots_ptr, last_ptr, ids_ptr, logprobs_ptr, best_ptr, sum_ptr, at_ptr, counter_ptr,
    stride_row, max_rows,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, SCORED_MODE: tl.constexpr,
    LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    split = tl.program_id(1)
    mode = tl.load(control_ptr)
    turn = tl.load(control_ptr + 1)
    slot = tl.load(slots_ptr + row)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if (mode > 0) & (slot >= 0):
        scored = mode == SCORED_MODE
        begin = split * CHUNK
        end = tl.minimum(begin + CHUNK, VOCAB)
        lane = tl.arange(0, TILE)
        base = logits_ptr + row.to(tl.int64) * stride_row
        # Of every lane: the largest logit so far, its column, and the sum of exponentials relative to it.
        best = tl.full((TILE,), -_LARGEST, dtype=tl.float32)
        at = begin + lane
        total = tl.zeros((TILE,), dtype=tl.float32)
        after = tl.load(base + at, mask=at < end, other=0.0)
        for start in range(begin, end, TILE):
            column = start + lane
            seen = column < end
            x = after.to(tl.float32)
            after = tl.load(base + column + TILE, mask=column + TILE < end, other=0.0)
            if scored:
                finite = tl.where(x == float("inf"), LIMIT, tl.where(x == float("-inf"), -LIMIT, x))
                x = tl.where(seen, tl.where(x != x, -LIMIT, finite), -_LARGEST)
                ratio = tl.where(seen, tl.exp(-tl.abs(x - best)), 0.0)
                total = tl.where(x > best, total * ratio + 1.0, total + ratio)
            else:
                x = tl.where(seen, tl.where(x != x, float("inf"), tl.minimum(x, _LARGEST)), -_LARGEST)
            larger = x > best
            at = tl.where(larger, column, at)
            best = tl.where(larger, x, best)
        most = tl.max(best, axis=0)
        cell = row * SPLITS + split
        tl.store(best_ptr + cell, most)
        tl.store(at_ptr + cell, tl.min(tl.where(best == most, at, _NO_ID), axis=0))
        if scored:
            tl.store(sum_ptr + cell, tl.sum(total * tl.exp(best - most), axis=0))
        # All threads' stores come before the count that publishes them.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + row, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            part = row * SPLITS + tl.arange(0, SPLITS)
            part_best = tl.load(best_ptr + part, cache_modifier=".cg")
            part_at = tl.load(at_ptr + part, cache_modifier=".cg")
            most = tl.max(part_best, axis=0)
            token = tl.min(tl.where(part_best == most, part_at, _NO_ID), axis=0)
            tl.store(last_ptr + slot, token.to(tl.int64))
            tl.store(ids_ptr + turn * max_rows + row, token)
            if scored:
                part_sum = tl.load(sum_ptr + part, cache_modifier=".cg")
                whole = tl.sum(part_sum * tl.exp(part_best - most), axis=0)
                tl.store(logprobs_ptr + turn * max_rows + row, -tl.log(whole))
            tl.store(counter_ptr + row, 0)


@triton.jit(do_not_specialize=("rows",))
def newest_ids_kernel(ids_ptr, pending_ptr, last_ptr, out_ptr, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = row < rows
    pending = tl.load(pending_ptr + row, mask=seen, other=-1)
    ids = tl.load(ids_ptr + row, mask=seen, other=0)
    drawn = tl.load(last_ptr + pending, mask=pending >= 0, other=0)
    tl.store(out_ptr + row, tl.where(pending >= 0, drawn.to(tl.int32), ids), mask=seen)


def draw_greedy(
    logits: torch.Tensor, control: torch.Tensor, slots: torch.Tensor, memory: GreedyMemory
) -> None:
    """`greedy.draw_greedy` on a device."""
    rows, vocab = logits.shape
    splits = num_splits(rows, vocab)
    chunk = cdiv(cdiv(vocab, splits), 16) * 16  # every program's first logit lies where a wide read may begin
    tile = min(_MOST_COLUMNS, next_power_of_2(chunk))
    pdl = node_config(logits.device.index).pdl
    best, total, at, counter = memory.parts
    greedy_kernel[(rows, splits)](
        logits, control, slots, memory.last_token, memory.ids, memory.logprobs, best, total, at, counter,
        logits.stride(0), memory.rows, VOCAB=vocab, CHUNK=chunk, TILE=tile, SPLITS=splits, SCORED_MODE=SCORED,
        LIMIT=LOGIT_LIMIT, PDL=pdl, num_warps=max(1, tile // (32 * _LANE_COLUMNS)), **launch_options(pdl),
    )  # fmt: skip


def newest_ids(ids: torch.Tensor, pending: torch.Tensor, last_token: torch.Tensor) -> torch.Tensor:
    """`greedy.newest_ids` on a device."""
    out = torch.empty_like(ids)
    newest_ids_kernel[(cdiv(ids.numel(), _IDS_BLOCK),)](
        ids, pending, last_token, out, ids.numel(), BLOCK=_IDS_BLOCK, num_warps=2
    )
    return out
