"""Attention over the paged KV cache in Triton: what a CUDA device runs.

Decode splits the context of every sequence over programs (Flash-Decoding, Dao et al. 2023), and the last program of a
sequence to finish combines the parts, so that one launch does it whatever the lengths. Prefill is the tiled online
softmax of Flash Attention (Dao 2023) over blocks found through the block table. Both pack the query heads that share a
key head into the rows of one matrix product, so that every key is read once for its group.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch

from lorax_kernels.attention_kernels import decode_kernel, prefill_kernel, write_kv_kernel
from lorax_kernels.configs import AttentionConfig, launch_options
from lorax_kernels.metadata import AttentionBatch, IntArray
from lorax_kernels.sizes import cdiv, next_power_of_2
from lorax_kernels.tuning import attention_config, node_config

_LOG2E = 1.4426950408889634
_MAX_SPLITS = 32


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """`lorax_kernels.write_kv` on a device. Heads of a row must be contiguous in k, v and the caches."""
    width = k.shape[1] * k.shape[2]
    for tensor in (k, v):
        if tensor.stride(2) != 1 or tensor.stride(1) != k.shape[2]:
            raise ValueError("write_kv: the heads of one token must be contiguous")
    block = min(1024, next_power_of_2(width))
    write_kv_kernel[(k.shape[0], cdiv(width, block))](
        k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0), WIDTH=width, BLOCK=block, num_warps=2
    )


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
    config: AttentionConfig | None = None,
) -> torch.Tensor:
    """`lorax_kernels.paged_attention` on a device."""
    config = config or attention_config(_padded(batch.num_decodes), q.device.index)
    if q.stride(2) != 1 or k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError("paged_attention: head_dim must be contiguous and both caches laid out alike")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch.num_decodes:
        _decode(q, (k_cache, v_cache), batch, scale * _LOG2E, sliding_window or 0, out, config)
    if batch.fixed is not None or batch.num_decodes < batch.num_sequences:
        _prefill(q, (k_cache, v_cache), batch, scale * _LOG2E, sliding_window or 0, out, config)
    return out


def _decode(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    batch: AttentionBatch,
    qk_scale: float,
    window: int,
    out: torch.Tensor,
    config: AttentionConfig,
) -> None:
    k_cache, v_cache = caches
    heads, dim = k_cache.shape[2], k_cache.shape[3]
    group = q.shape[1] // heads
    block_g, block_d = max(16, next_power_of_2(group)), next_power_of_2(dim)
    splits = _decode_splits(_padded(batch.num_decodes) * heads, config.waves * _num_sms(q.device.index))
    space = _workspace(q.device, batch.num_decodes * heads, splits, block_g, block_d)
    pdl = node_config(q.device.index).pdl
    contexts = batch.context_lens if batch.fixed is None else batch.fixed.decode_contexts
    decode_kernel[(batch.num_decodes, heads, splits)](
        q, k_cache, v_cache, out, *space, batch.block_tables, contexts,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), out.stride(0),
        batch.block_tables.stride(0), qk_scale,
        HEADS=heads, GROUP=group, BLOCK_G=block_g, BLOCK_SIZE=k_cache.shape[1], D=dim, BLOCK_D=block_d,
        BLOCK_N=_block_n(config.block_n, block_d, q.dtype), SPLITS=splits, MIN_SPLIT=config.min_split, WINDOW=window,
        STAGES=config.stages, PDL=pdl, num_warps=config.warps, num_stages=1, **launch_options(pdl),
    )  # fmt: skip


def _prefill(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    batch: AttentionBatch,
    qk_scale: float,
    window: int,
    out: torch.Tensor,
    config: AttentionConfig,
) -> None:
    k_cache, v_cache = caches
    heads, dim = k_cache.shape[2], k_cache.shape[3]
    group = q.shape[1] // heads
    block_d = next_power_of_2(dim)
    wide = _is_wide(block_d, q.dtype)
    block_m = 64 if wide else config.prefill_block_m
    tiles = _prefill_tiles(batch, group, block_m, q.device) if batch.fixed is None else batch.fixed.tiles
    prefill_kernel[(tiles.shape[0], heads)](
        q, k_cache, v_cache, out, tiles, batch.block_tables, batch.context_lens, batch.query_start,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), out.stride(0),
        batch.block_tables.stride(0), qk_scale,
        GROUP=group, BLOCK_M=block_m, BLOCK_SIZE=k_cache.shape[1], D=dim, BLOCK_D=block_d,
        BLOCK_N=_block_n(config.prefill_block_n, block_d, q.dtype), WINDOW=window,
        STAGES=2 if wide else config.prefill_stages, num_warps=4 if wide else config.prefill_warps, num_stages=1,
    )  # fmt: skip


def _block_n(wanted: int, block_d: int, dtype: torch.dtype) -> int:
    """Keys of a tile, so that the pipelined tiles of K and V fit in shared memory."""
    return max(16, min(wanted, wanted * 128 * 2 // (block_d * dtype.itemsize)))


def _padded(num_decodes: int) -> int:
    """The number of decodes that the launch is chosen for: one that graphs are captured for, so that a step beside
    them needs no kernel that has not been compiled."""
    return next_power_of_2(num_decodes) if num_decodes <= 8 else cdiv(num_decodes, 8) * 8


def _decode_splits(cells: int, programs: int) -> int:
    """Programs a (sequence, key head) pair's context may be split over: a power of two, about `programs` in all."""
    wanted = max(1, programs // max(cells, 1))
    return max(2, min(_MAX_SPLITS, next_power_of_2(wanted)))


def _is_wide(block_d: int, dtype: torch.dtype) -> bool:
    return block_d > 128 or dtype == torch.float32


def tile_rows(num_decodes: int, head_dim: int, dtype: torch.dtype, device: int | None) -> int:
    """Packed rows, (token, query head of the group) pairs, of a prefill tile in a batch of `num_decodes` decodes."""
    if _is_wide(next_power_of_2(head_dim), dtype):
        return 64
    return attention_config(_padded(num_decodes), device).prefill_block_m


def list_tiles(prefills: Iterable[tuple[int, int, int, int]], group: int, block_m: int) -> IntArray:
    """int32 [tiles, 2]: sequence and first packed row of every tile of `AttentionBatch.prefills`, the ones with most
    keys first."""
    prefills = list(prefills)
    if len(prefills) == 1 and group <= block_m:  # each tile sees more keys than the one before
        ((i, _, count, _),) = prefills
        starts = np.arange(0, count * group, block_m, dtype=np.int32)[::-1]
        tiles = np.full((starts.size, 2), i, dtype=np.int32)
        tiles[:, 1] = starts
        return tiles
    listed = []
    for i, _, count, context in prefills:
        starts = np.arange(0, count * group, block_m, dtype=np.int64)
        listed.append(np.stack((np.full_like(starts, i), starts, context - count + starts // group), axis=1))
    if not listed:
        return np.zeros((0, 2), dtype=np.int32)
    table = np.concatenate(listed)
    return np.ascontiguousarray(table[np.argsort(-table[:, 2], kind="stable"), :2].astype(np.int32))


def _prefill_tiles(batch: AttentionBatch, group: int, block_m: int, device: torch.device) -> torch.Tensor:
    key = ("tiles", group, block_m)
    tiles = batch.cache.get(key)
    if not isinstance(tiles, torch.Tensor):
        tiles = torch.from_numpy(list_tiles(batch.prefills(), group, block_m))
        if device.type == "cuda":
            tiles = tiles.pin_memory().to(device, non_blocking=True)
        batch.cache[key] = tiles
    return tiles


_spaces: dict[tuple[torch.device, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}


def _workspace(
    device: torch.device, cells: int, splits: int, block_g: int, block_d: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parts, their statistics, and arrival counters that every launch leaves at zero. Kept, because a captured graph
    holds the addresses; launches on one stream may share them."""
    key = (device, block_g, block_d)
    space = _spaces.get(key)
    needed = cells * splits * block_g * block_d
    if space is None or space[0].numel() < needed or space[2].numel() < cells:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("paged_attention: run the largest batch once before capturing a graph")
        cells = max(cells, 0 if space is None else space[2].numel())
        parts = max(needed, 0 if space is None else space[0].numel())
        space = (
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.empty(2 * parts // block_d, dtype=torch.float32, device=device),
            torch.zeros(cells, dtype=torch.int32, device=device),
        )
        _retired.append(_spaces.get(key))
        _spaces[key] = space
    return space


_retired: list[object] = []  # graphs captured with a smaller space still point at it


@functools.cache
def _num_sms(index: int | None) -> int:
    if index is None:
        return 4
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
