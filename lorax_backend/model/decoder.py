"""Decoder: the forward pass that all supported architectures share.

`forward` takes tensors only and branches on nothing that lies on the device, so that it can be captured in a CUDA
graph and run for any mix of decoding and prefill, with and without adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorax_backend.model.attention import attend
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.kv_cache import KvCache
from lorax_backend.model.layers import Linear, apply_rope, doubled_rope, rms_norm, rope_tables, silu_mul
from lorax_backend.model.lora import LM_HEAD
from lorax_backend.model.weights import LayerWeights, ModelWeights
from lorax_kernels import LoraBatch, add_lora
from lorax_kernels.layout import PageLayout
from lorax_kernels.metadata import AttentionBatch


@dataclass(frozen=True, slots=True)
class LoraBatches:
    """The adapter rows of a step for each kind of site; None where no row has weights there."""

    qkv: LoraBatch | None = None
    o: LoraBatch | None = None
    gate_up: LoraBatch | None = None
    down: LoraBatch | None = None


class LoraSiteView:
    """One site of the adapter arena: where its A and B lie, and its output slices."""

    __slots__ = ("a", "b", "out_slices")

    def __init__(self, layout: PageLayout, pages: torch.Tensor, key: str) -> None:
        self.a = layout.a_view(pages, key)
        self.b = layout.b_view(pages, key)
        self.out_slices = layout.sites[key].out_slices

    def project(self, linear: Linear, x: torch.Tensor, batch: LoraBatch | None) -> torch.Tensor:
        """linear(x), plus the adapters' deltas of the rows in `batch`; x [T, in] -> [T, out]."""
        out = linear(x)
        if batch is not None:
            add_lora(x, self.a, self.b, batch, out, self.out_slices)
        return out


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
        cos, sin = rope_tables(config.rope, config.head_dim, max_positions)
        self._cos, self._sin = (table.to(device) for table in doubled_rope(cos, sin))
        self._scale = config.head_dim**-0.5
        self._sites = [
            {
                kind: LoraSiteView(layout, adapter_pages, f"layers.{index}.{kind}")
                for kind in ("qkv", "o", "gate_up", "down")
            }
            for index in range(config.num_layers)
        ]
        self._head_site = LoraSiteView(layout, adapter_pages, LM_HEAD)

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
        x = F.embedding(input_ids, self.weights.embedding)
        cos = self._cos.index_select(0, positions)
        sin = self._sin.index_select(0, positions)
        for index, layer in enumerate(self.weights.layers):
            x = self._layer(index, layer, x, (cos, sin), attention, lora, cache)
        return x

    def logits(self, hidden: torch.Tensor, lora: LoraBatch | None) -> torch.Tensor:
        """Last norm and language model head: hidden [R, hidden] of the rows that sample -> [R, vocab]."""
        x = rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)
        return self._head_site.project(self.weights.lm_head, x, lora)

    def _layer(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        attention: AttentionBatch,
        lora: LoraBatches,
        cache: KvCache,
    ) -> torch.Tensor:
        config, sites = self.config, self._sites[index]
        qkv = sites["qkv"].project(layer.qkv, rms_norm(x, layer.input_norm, config.rms_norm_eps), lora.qkv)
        q, k, v = self._heads(layer, qkv, rope)
        window = config.layer_windows[index]
        attended = attend((q, k, v), (cache.keys[index], cache.values[index]), attention, self._scale, window)
        x = x + sites["o"].project(layer.o, attended, lora.o)
        gate_up = sites["gate_up"].project(
            layer.gate_up, rms_norm(x, layer.post_norm, config.rms_norm_eps), lora.gate_up
        )
        return x + sites["down"].project(layer.down, silu_mul(gate_up), lora.down)

    def _heads(
        self, layer: LayerWeights, qkv: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split [T, q + 2 kv] into q, k, v [T, heads, head_dim]; q and k normed where the family does, and rotated."""
        config = self.config
        heads = qkv.view(-1, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        qk = heads[:, : config.num_heads + config.num_kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(qk[:, : config.num_heads], layer.q_norm, config.rms_norm_eps)
            k = rms_norm(qk[:, config.num_heads :], layer.k_norm, config.rms_norm_eps)
            qk = torch.cat((q, k), 1)
        qk = apply_rope(qk, *rope)
        v = heads[:, config.num_heads + config.num_kv_heads :]
        return qk[:, : config.num_heads], qk[:, config.num_heads :], v
