"""Nodes of the decode step that make a base layer's input and, in the same launch, its product with A^T.

See `riding_kernels` for how, and for what it is expected to save. The result is a `Shrunk` for `lora_triton.linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorax_kernels.attention_triton import paged_attention
from lorax_kernels.fused_triton import norm_shape, rms_norm, silu_block, silu_mul
from lorax_kernels.layout import PAGE_RANK
from lorax_kernels.lora_triton import Shrunk, num_sms, work_of
from lorax_kernels.metadata import AttentionBatch, LoraBatch
from lorax_kernels.riding_kernels import NORM, RESIDUAL_NORM, SILU, norm_shrink_kernel, silu_shrink_kernel
from lorax_kernels.tuning import LoraConfig, launch_options, lora_config
from lorax_kernels.worklist import LoraWork


def riding_config(
    batch: LoraBatch, x: torch.Tensor, config: LoraConfig | None = None
) -> tuple[LoraWork, LoraConfig | None]:
    """The work list, and the configuration if shrink is to ride in a step of this batch, else None."""
    work = work_of(batch)
    config = config or lora_config(work.num_tokens, work.shape.decode, x.device.index)
    if config.shrink != "fused" or not work.shape.decode:
        return work, None
    return work, config.for_itemsize(x.element_size())


def rms_norm_shrink(
    x: torch.Tensor,
    norm: tuple[torch.Tensor, float],
    residual: torch.Tensor | None,
    a: torch.Tensor,
    batch: LoraBatch,
    config: LoraConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Shrunk | None]:
    """`lorax_kernels.rms_norm_lora` on a device."""
    work, riding = riding_config(batch, x, config)
    if riding is None:
        return *rms_norm(x, *norm, residual), None
    rows, width = x.shape
    weight, eps = norm
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if residual is not None else x
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    h = _allocate(a, work, riding, (riding.ride_split_shift, riding.ride_target_log2), scale)
    block, warps = norm_shape(width)
    riders, at = _num_riders(a, work, riding), work.capacity
    norm_shrink_kernel[(riders + rows,)](
        x, x if residual is None else residual, weight, y, total, scale, a, h.planes, work.data, x.stride(0),
        0 if residual is None else residual.stride(0), eps, riders, a.stride(0), at.units_at, at.rows_at,
        h.planes.shape[1], work.max_pages,
        WIDTH=width, BLOCK=block, HAS_RESIDUAL=residual is not None,
        SOURCE=(NORM if residual is None else RESIDUAL_NORM).value,
        **_constants(a, work, riding), num_warps=riding.ride_warps or warps, num_stages=1, **launch_options(riding.pdl),
    )  # fmt: skip
    return y, total, h


def silu_mul_shrink(
    gate_up: torch.Tensor, a: torch.Tensor, batch: LoraBatch, config: LoraConfig | None = None
) -> tuple[torch.Tensor, Shrunk | None]:
    """`lorax_kernels.silu_mul_lora` on a device."""
    work, riding = riding_config(batch, gate_up, config)
    if riding is None:
        return silu_mul(gate_up), None
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    h = _allocate(a, work, riding, (riding.ride_split_shift, riding.ride_target_log2))
    block = silu_block(width)
    riders, at = _num_riders(a, work, riding), work.capacity
    silu_shrink_kernel[(riders + rows * -(-width // block),)](
        gate_up, y, a, h.planes, work.data, gate_up.stride(0), riders, a.stride(0), at.units_at, at.rows_at,
        h.planes.shape[1], work.max_pages,
        WIDTH=width, BLOCK=block, SOURCE=SILU.value, **_constants(a, work, riding), num_warps=riding.ride_warps or 4,
        num_stages=1, **launch_options(riding.pdl),
    )  # fmt: skip
    return y, h


@dataclass(frozen=True, slots=True)
class Rider:
    """LoRA work that rides in decode's attention: `a` [P, 1, 8, Hq * D] of the layer after it, and where h goes."""

    a: torch.Tensor
    batch: LoraBatch
    h: Shrunk

    @property
    def arguments(self) -> tuple[torch.Tensor | int, ...]:
        """What the kernel is told of it."""
        work, planes = work_of(self.batch), self.h.planes
        at = work.capacity
        return (
            self.a, planes, work.data, self.a.stride(0), at.tokens_at, at.pages_at, planes.shape[1], work.max_pages
        )  # fmt: skip


def paged_attention_shrink(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None,
    a: torch.Tensor,
    lora: LoraBatch,
    config: LoraConfig | None = None,
) -> tuple[torch.Tensor, Shrunk | None]:
    """`lorax_kernels.paged_attention_lora` on a device."""
    decodes = batch.fixed is None and batch.num_decodes == batch.num_sequences == q.shape[0]
    h = _attention_planes(q, caches[0].shape[2], a, lora, config) if decodes else None
    rider = Rider(a, lora, h) if h is not None else None
    return paged_attention(q, *caches, batch, scale, sliding_window, rider=rider), h


def _attention_planes(
    q: torch.Tensor, heads: int, a: torch.Tensor, batch: LoraBatch, config: LoraConfig | None = None
) -> Shrunk | None:
    """Memory for h of attention's results, which attention is to fill, a plane a key head; None where shrink is not to
    ride in it, or cannot: expand sums a power of two of planes, up to 16."""
    work, riding = riding_config(batch, q, config)
    if riding is None or not riding.ride_attention or heads not in _PLANES or q.shape[1] // heads > 16:
        return None
    return _allocate(a, work, riding, (_PLANES[heads], _ALWAYS))


_PLANES = {1 << shift: shift for shift in range(5)}
_ALWAYS = 30  # log2 of more pieces than there can be: as many splits as allowed


def _allocate(
    a: torch.Tensor,
    work: LoraWork,
    config: LoraConfig,
    splits: tuple[int, int],
    scale: torch.Tensor | None = None,
) -> Shrunk:
    shape = 1 << splits[0], work.capacity.rows, work.max_pages * a.shape[1] * PAGE_RANK
    planes = torch.empty(shape, dtype=torch.float32, device=a.device)
    return Shrunk(planes, a.shape[1], config, splits, True, scale)


def _num_riders(a: torch.Tensor, work: LoraWork, config: LoraConfig) -> int:
    """Programs of shrink: as many as the list may have pieces, or as the device holds beside the node's own."""
    pieces = (work.capacity.units if work.fixed else work.num_units) * a.shape[1] << config.ride_split_shift
    return max(1, min(num_sms(a.device.index) * config.ride_waves, pieces))


def _constants(a: torch.Tensor, work: LoraWork, config: LoraConfig) -> dict[str, int | bool]:
    return {
        "S": a.shape[1],
        "BLOCK_M": work.shape.block_rows,
        "BLOCK_K": config.ride_block_k,
        "MAX_SHIFT": config.ride_split_shift,
        "TARGET_LOG2": config.ride_target_log2,
        "STAGES": config.ride_stages,
        "PDL": config.pdl,
    }
