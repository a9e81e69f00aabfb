"""Decoder: the forward pass that all supported architectures share.

`forward` takes tensors only and branches on nothing that lies on the device, so that it can be captured in a CUDA
graph and run for any mix of decoding and prefill, with and without adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lorax_backend.model.attention import FreshFunction, attend
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.kv_cache import KvCache
from lorax_backend.model.layers import Linear, doubled_rope, rope_tables
from lorax_backend.model.lora import LM_HEAD
from lorax_backend.model.weights import ModelWeights
from lorax_kernels import (
    AttentionBatch,
    LoraBatch,
    PageLayout,
    add_lora,
    begin_lora_linear,
    lora_linear,
    lora_linear_silu_mul,
    paged_attention,
    rms_norm,
    rope_and_cache,
    silu_mul,
)

if TYPE_CHECKING:
    from lorax_kernels.expand_nodes import Delta


@dataclass(frozen=True, slots=True)
class LoraBatches:
    """The adapter rows of a step for each kind of site; None where no row has weights there."""

    qkv: LoraBatch | None = None
    o: LoraBatch | None = None
    gate_up: LoraBatch | None = None
    down: LoraBatch | None = None


class LoraSiteView:
    """One site of the adapter arena: where its A and B lie, and its output slices."""

    __slots__ = ("out_slices", "weights")

    def __init__(self, layout: PageLayout, pages: torch.Tensor, key: str) -> None:
        self.weights = layout.a_view(pages, key), layout.b_view(pages, key)
        self.out_slices = layout.sites[key].out_slices

    def project(self, linear: Linear, x: torch.Tensor, batch: LoraBatch | None) -> torch.Tensor:
        """linear(x), plus the adapters' deltas of the rows in `batch`; x [T, in] -> [T, out]."""
        if batch is None:
            return linear(x)
        if linear.weight is not None:
            return lora_linear(x, (linear.weight, linear.bias), self.weights, batch, self.out_slices)
        out = linear(x)
        add_lora(x, *self.weights, batch, out, self.out_slices)
        return out

    def begin(
        self, linear: Linear, x: torch.Tensor, batch: LoraBatch | None
    ) -> tuple[torch.Tensor, Delta | None]:
        """`project` for the next norm, which may have to add the deltas, and sum planes; or for the rotation."""
        if batch is None:
            return linear.begin(x), None
        if linear.weight is None:
            return self.project(linear, x, batch), None
        return begin_lora_linear(x, (linear.weight, linear.bias), self.weights, batch, self.out_slices)

    def silu_mul(self, linear: Linear, x: torch.Tensor, batch: LoraBatch | None) -> torch.Tensor:
        """`lorax_kernels.silu_mul` of `project`: x [T, in] -> [T, out / 2]."""
        if batch is None:
            return linear.silu_mul(x)
        if linear.weight is None:
            return silu_mul(self.project(linear, x, batch))
        return lora_linear_silu_mul(x, (linear.weight, linear.bias), self.weights, batch, self.out_slices)


class Decoder:
    """The transformer. Owns no memory but the rope tables; weights, adapter pages and cache are given to it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        layout: PageLayout,
        adapter_pages: torch.Tensor,
        max_positions: int,
    ) -> None:
        self.config = config
        self.weights = weights
        device = weights.embedding.device
        cos, sin = doubled_rope(*rope_tables(config.rope, config.head_dim, max_positions))
        self._cos, self._sin = cos.to(device), sin.to(device)
        self._scale = config.head_dim**-0.5
        self._sites = [
            {
                kind: LoraSiteView(layout, adapter_pages, f"layers.{index}.{kind}")
                for kind in ("qkv", "o", "gate_up", "down")
            }
            for index in range(config.num_layers)
        ]
        self._head_site = LoraSiteView(layout, adapter_pages, LM_HEAD)
        self.fresh_attention: FreshFunction | None = None
        """Computes the attention of prompts that begin in a step; None: the paged kernel does."""

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBatch,
        lora: LoraBatches,
        cache: KvCache,
    ) -> torch.Tensor:
        """Run all layers and write the step's keys and values to the cache.

        Args:
            input_ids: int [T].
            positions: int [T], position of each token in its sequence.

        Returns:
            [T, hidden], before the last norm.
        """
        x, active = self._run_layers(input_ids, positions, attention, lora, cache)
        return x + self._sites[-1]["down"].project(self.weights.layers[-1].down, active, lora.down)

    def forward_with_logits(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBatch,
        lora: LoraBatches,
        cache: KvCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and `logits` of every row without adapters of lm_head, in fewer launches than one by one."""
        x, active = self._run_layers(input_ids, positions, attention, lora, cache)
        block, delta = self._sites[-1]["down"].begin(self.weights.layers[-1].down, active, lora.down)
        normed, hidden = rms_norm(x, self.weights.norm, self.config.rms_norm_eps, block, delta)
        return hidden, self._head_site.project(self.weights.lm_head, normed, None)

    def _run_layers(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBatch,
        lora: LoraBatches,
        cache: KvCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything up to the last product: what that is added to, and what goes into it."""
        eps = self.config.rms_norm_eps
        x = F.embedding(input_ids, self.weights.embedding)
        # What the last block adds to x, and the adapters' deltas of that: the next norm adds both on the way.
        block: torch.Tensor | None = None
        delta: Delta | None = None
        active = x
        # Prompts that begin here may read the values themselves, which are nowhere if qkv is planes.
        planes = self.fresh_attention is None or attention.fixed is not None or attention.max_query == 1
        for index, layer in enumerate(self.weights.layers):
            sites = self._sites[index]
            if index:
                block, delta = self._sites[index - 1]["down"].begin(
                    self.weights.layers[index - 1].down, active, lora.down
                )
            normed, x = rms_norm(x, layer.input_norm, eps, block, delta)
            if planes:
                qkv = sites["qkv"].begin(layer.qkv, normed, lora.qkv)
            else:
                qkv = sites["qkv"].project(layer.qkv, normed, lora.qkv), None
            attended = self._attend(index, qkv, positions, attention, cache)
            block, delta = sites["o"].begin(layer.o, attended, lora.o)
            normed, x = rms_norm(x, layer.post_norm, eps, block, delta)
            active = sites["gate_up"].silu_mul(layer.gate_up, normed, lora.gate_up)
        return x, active

    def run_products(self, rows: int, lora: LoraBatch | None) -> None:
        """The products of a layer for that many rows, for the sake of what that compiles."""
        layer, sites = self.weights.layers[0], self._sites[0]
        for name in ("qkv", "o", "gate_up", "down"):
            linear: Linear = getattr(layer, name)
            if linear.weight is not None:
                width, like = linear.weight.shape[1], linear.weight
                run = sites[name].silu_mul if name == "gate_up" else sites[name].project
                run(linear, torch.zeros(rows, width, dtype=like.dtype, device=like.device), lora)

    def logits(self, hidden: torch.Tensor, lora: LoraBatch | None) -> torch.Tensor:
        """Last norm and language model head: hidden [R, hidden] of the rows that sample -> [R, vocab]."""
        normed, _ = rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)
        return self._head_site.project(self.weights.lm_head, normed, lora)

    def _attend(
        self,
        index: int,
        given: tuple[torch.Tensor, Delta | None],
        positions: torch.Tensor,
        attention: AttentionBatch,
        cache: KvCache,
    ) -> torch.Tensor:
        """Attention of layer `index`: qkv [T, q + 2 kv], or planes, and what it lacks -> [T, q]. Stores the step's keys
        and values."""
        qkv, delta = given
        config, layer = self.config, self.weights.layers[index]
        layer_cache = cache.keys[index], cache.values[index]
        queries = rope_and_cache(
            qkv,
            (config.num_heads, config.num_kv_heads),
            (positions, self._cos, self._sin),
            layer_cache,
            attention.slot_mapping,
            layer.qk_norms,
            config.rms_norm_eps,
            delta,
        )
        window = config.layer_windows[index]
        if qkv.dim() == 3 or delta is not None:
            out = paged_attention(queries, *layer_cache, attention, self._scale, window)
        else:
            values = qkv.view(qkv.shape[0], -1, config.head_dim)[:, -config.num_kv_heads :]
            out = attend(queries, values, layer_cache, attention, self._scale, window, self.fresh_attention)
        return out.view(out.shape[0], config.q_size)
