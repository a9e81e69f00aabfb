"""The model's kernels in plain torch on any device: slow, short, and independent of what they check.

The twins of `lorax_kernels.reference` are written for a CPU's decode steps and keep their indices there. Where that
matters, these take their place, so that whole models can be compared with and without Triton on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from lorax_kernels import AttentionBatch, LoraBatch, attention_reference, dispatch, reference


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


def never(tensor: torch.Tensor) -> bool:
    """No tensor goes to Triton."""
    return False


TWINS: dict[tuple[ModuleType, str], Callable[..., Any]] = {
    (dispatch, "_uses_triton"): never,
    (reference, "add_lora"): add_lora,
    (attention_reference, "paged_attention"): paged_attention,
}
"""What takes the place of what. All kernels of the model go through `dispatch`, which asks before each."""


@contextmanager
def plain_torch() -> Iterator[None]:
    """Let every model of this process compute without Triton until the block is left.

    Raises:
        AttributeError: one of the places is no more: this file and `lorax_kernels` have parted.
    """
    with ExitStack() as stack:
        for (module, name), twin in TWINS.items():
            stack.enter_context(patch.object(module, name, twin))
        yield
