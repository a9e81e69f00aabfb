"""The model's kernels in plain torch on any device: slow, short, and independent of what they check.

The twins of `lorax_kernels.reference` are written for a CPU's decode steps and keep their indices there. These serve
where whole models are compared with and without Triton.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

import lorax_kernels
from lorax_kernels import AttentionBatch, LoraBatch, dispatch, fused_reference, reference

_USERS = "lorax_backend.model."


def add_lora(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    batch: LoraBatch,
    out: torch.Tensor,
    out_slices: tuple[int, ...],
) -> None:
    """See `lorax_kernels.add_lora`."""
    if len(batch.rows):
        reference.sgmv_expand(reference.sgmv_shrink(x, a, batch), b, batch, out, out_slices)


def lora_linear(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor | None],
    weights: tuple[torch.Tensor, torch.Tensor],
    batch: LoraBatch,
    out_slices: tuple[int, ...],
) -> torch.Tensor:
    """See `lorax_kernels.lora_linear`."""
    out = torch.nn.functional.linear(x, *layer)
    add_lora(x, *weights, batch, out, out_slices)
    return out


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """See `lorax_kernels.paged_attention`. One sequence at a time, scores in float32."""
    out = torch.zeros_like(q)
    # The device's numbers: in a batch of fixed address the host's are capacities only.
    starts, block_size = batch.query_start.tolist(), k_cache.shape[1]
    for index, context in enumerate(batch.context_lens.tolist()):
        begin, end = starts[index], starts[index + 1]
        if not 0 < end - begin <= context:
            continue
        blocks = batch.block_tables[index, : -(-context // block_size)].long()
        k, v = (cache[blocks].flatten(0, 1)[:context].float() for cache in (k_cache, v_cache))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), k) * scale
        last = torch.arange(context - (end - begin), context, device=q.device)[:, None]
        seen = torch.arange(context, device=q.device)[None]
        hidden = seen > last
        if sliding_window is not None:
            hidden |= seen <= last - sliding_window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


TWINS: dict[str, Callable[..., Any]] = {
    "add_lora": add_lora,
    "lora_linear": lora_linear,
    "paged_attention": paged_attention,
    "rms_norm": fused_reference.rms_norm,
    "rope_and_cache": fused_reference.rope_and_cache,
    "silu_mul": fused_reference.silu_mul,
}


class NoTwinError(RuntimeError):
    """The model uses a kernel of which there is no twin here."""


def _uses() -> Iterator[tuple[ModuleType, str]]:
    """Every name in the model's modules that stands for a public kernel."""
    kernels = {
        getattr(dispatch, name): name
        for name in lorax_kernels.__all__
        if callable(getattr(dispatch, name, None)) and not isinstance(getattr(dispatch, name), type)
    }
    for key, module in list(sys.modules.items()):
        if key.startswith(_USERS):
            for name, value in list(vars(module).items()):
                if callable(value) and value in kernels:
                    yield module, name


@contextmanager
def plain_torch() -> Iterator[int]:
    """Let the model compute with the twins until the block is left; gives how many places were changed.

    Raises:
        NoTwinError: a kernel has none.
    """
    places = [(module, name, getattr(module, name)) for module, name in _uses()]
    missing = {name for _, name, _ in places} - TWINS.keys()
    if missing:
        raise NoTwinError(f"perf/torch_twins.py has no twin of {', '.join(sorted(missing))}")
    for module, name, _ in places:
        setattr(module, name, TWINS[name])
    try:
        yield len(places)
    finally:
        for module, name, kernel in places:
            setattr(module, name, kernel)
