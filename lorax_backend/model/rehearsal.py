"""A start without a device: every launch that warming up and capturing will make, to know what has to be compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from lorax_backend.adapters.arena import LoraArena
from lorax_backend.adapters.page_writer import PageWriter
from lorax_backend.model import layers
from lorax_backend.model.batch import BatchBuilder
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.decoder import Decoder
from lorax_backend.model.graphs import DecodeGraphs
from lorax_backend.model.greedy import GreedyDrawer
from lorax_backend.model.kv_cache import KvCache
from lorax_backend.model.lora import page_layout
from lorax_backend.model.prefill_graphs import PrefillGraphs
from lorax_backend.model.recorder import Recorded
from lorax_backend.model.rehearsal_plan import StartPlan
from lorax_backend.model.warm_up import warm_up_prefill
from lorax_backend.model.weights import allocate_weights
from lorax_kernels import AttentionBatch, paged_attention
from lorax_kernels.layout import pages_for_rank
from lorax_kernels.specializations import Specialization, pretend, recorded

_BLOCKS = 4  # of a KV cache that holds nothing


class _Once:
    """A `GraphRecorder` that only runs what it is given."""

    def record(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> Recorded:
        return Recorded(lambda: None, run())


class Rehearsal:
    """A model of `plan` on the device "meta". From here on this process is good for nothing else; see `pretend`."""

    def __init__(self, plan: StartPlan) -> None:
        pretend(plan.device, "lorax_backend.model.warm_up")
        layers._on_device = lambda x: True
        self._plan = plan
        self._device = torch.device("meta")
        self._dtype: torch.dtype = getattr(torch, plan.dtype)
        self._model = _shortened(plan.model)
        self._layout = page_layout(plan.model)
        self._cache = KvCache(self._model, _BLOCKS, plan.block_size, self._dtype, self._device)

    @torch.inference_mode()
    def attention(self) -> list[Specialization]:
        """What the paged kernels need before anything else: implementations of attention are compared with them."""
        model, rows = self._model, 200
        q = torch.empty(rows + 1, model.num_heads, model.head_dim, dtype=self._dtype, device=self._device)
        with recorded() as found:
            for lengths in ((rows,), (1, rows)):
                starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
                batch = AttentionBatch.build(
                    starts,
                    np.array(lengths, dtype=np.int32),
                    np.zeros((len(lengths), -(-rows // self._plan.block_size)), dtype=np.int32),
                    np.full(starts[-1], -1, dtype=np.int64),
                    self._device,
                )
                for window in dict.fromkeys(model.layer_windows):
                    keys = self._cache.keys[0], self._cache.values[0]
                    paged_attention(q[: starts[-1]], *keys, batch, model.head_dim**-0.5, window)
        return list(found)

    @torch.inference_mode()
    def whole(self) -> tuple[list[Specialization], list[Exception]]:
        """All of them, and what kept parts of it from being rehearsed."""
        plan, device, dtype = self._plan, self._device, self._dtype
        weights, _ = allocate_weights(self._model, dtype, device)
        arena = LoraArena(
            self._layout, pages_for_rank(plan.max_lora_rank), 1, dtype, device, plan.max_lora_rank
        )
        decoder = Decoder(self._model, weights, self._layout, arena.pages, plan.max_total_tokens)
        builder = BatchBuilder(
            plan.block_size, plan.max_num_seqs, plan.max_blocks, device, arena, plan.model.vocab_size
        )
        last_token = torch.zeros(plan.max_num_seqs, dtype=torch.int64, device=device)
        drawer = GreedyDrawer(last_token, plan.model.vocab_size)
        parts = decoder, self._cache, builder

        def decodes() -> None:
            DecodeGraphs(*parts, drawer, plan.sizes, _Once())

        def prefills() -> None:
            if plan.prefill_sizes:
                PrefillGraphs(*parts, last_token, plan.prefill_sizes, _Once())

        def others() -> None:
            hidden = torch.empty(plan.max_num_seqs, self._model.hidden_size, dtype=dtype, device=device)
            decoder.logits(hidden, None)
            # Nobody knows yet who computes the attention of fresh prompts, and others than our own want other inputs.
            decoder.fresh_attention = lambda q, k, v, starts, longest, scale, window: torch.empty_like(q)
            warm_up_prefill(decoder, builder, self._cache)

        def pages() -> None:
            PageWriter(device, 1 << 16, 1).warm_up(self._layout, arena.pages[:1])

        problems: list[Exception] = []
        with recorded() as found:
            for part in (decodes, prefills, others, pages):
                try:
                    part()
                except Exception as error:  # what it would have launched is compiled at the launch
                    problems.append(error)
        return list(found), problems


def _shortened(model: ModelConfig) -> ModelConfig:
    """As many of the first layers as have all windows there are; two at least, as the first norm has no residual."""
    firsts = [model.layer_windows.index(window) for window in set(model.layer_windows)]
    count = min(model.num_layers, max(2, 1 + max(firsts)))
    return replace(model, num_layers=count, layer_windows=model.layer_windows[:count])
