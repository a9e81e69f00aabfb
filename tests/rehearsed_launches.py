"""Compares what a rehearsal says will be launched with launches on real tensors, without a GPU: nothing runs.

    python rehearsed_launches.py MODEL_FOLDER

A program, because a process that takes other tensors for a device's is good for nothing else. It compiles the attention
kernels ahead, in processes as the server does, and writes as JSON: "rehearsed", "launched" and "missing", kernels by
name; "hits", for each attention kernel whether its launch found it in Triton's cache; "told", what the server says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from lorax_backend.adapters.arena import LoraArena
from lorax_backend.model import graphs
from lorax_backend.model.batch import BatchBuilder
from lorax_backend.model.compile_ahead import CompileAhead
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.decoder import Decoder
from lorax_backend.model.greedy import GreedyDrawer
from lorax_backend.model.kv_cache import KvCache
from lorax_backend.model.lora import page_layout
from lorax_backend.model.prefill_graphs import PrefillGraphs
from lorax_backend.model.recorder import Recorded
from lorax_backend.model.rehearsal import Rehearsal
from lorax_backend.model.rehearsal_plan import StartPlan
from lorax_backend.model.weights import allocate_weights
from lorax_kernels import AttentionBatch, paged_attention
from lorax_kernels.device_facts import DeviceFacts
from lorax_kernels.specializations import recorded

CPU = torch.device("cpu")
DTYPE = torch.bfloat16


def start_plan(model: ModelConfig) -> StartPlan:
    facts = DeviceFacts("a device", (9, 0), 132)
    return StartPlan(facts, model, "bfloat16", 16, 17, 12, 256, 16, (1, 2, 12), (16, 64))


class Runs:
    """A `GraphRecorder` that only runs what it is given."""

    def record(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> Recorded:
        return Recorded(lambda: None, run())


def launched(plan: StartPlan) -> list[Any]:
    """What the graphs of real tensors, with all layers, launch."""
    model, layout = plan.model, page_layout(plan.model)
    weights, _ = allocate_weights(model, DTYPE, CPU)
    arena = LoraArena(layout, 16, 4, DTYPE, CPU, plan.max_lora_rank)
    decoder = Decoder(model, weights, layout, arena.pages, plan.max_total_tokens)
    builder = BatchBuilder(16, plan.max_num_seqs, plan.max_blocks, CPU, arena, model.vocab_size)
    last_token = torch.zeros(plan.max_num_seqs, dtype=torch.int64)
    parts = decoder, KvCache(model, 64, 16, DTYPE, CPU), builder
    # Ids that no kernel has written are no ids, and without a device there are no lists of work to warm up with.
    torch.empty_like = torch.zeros_like
    graphs.warm_up_prefill = lambda *given: None
    with recorded() as found:
        graphs.DecodeGraphs(*parts, GreedyDrawer(last_token, model.vocab_size), plan.sizes, Runs())
        PrefillGraphs(*parts, last_token, plan.prefill_sizes, Runs())
    return list(found)


def attention_hits(model: ModelConfig) -> list[bool]:
    """Whether launches of the paged kernels, one decode and a prompt of 40 tokens, find them in the cache."""
    kernel = triton.runtime.jit.KernelInterface
    kernel.__getitem__ = lambda self, grid: lambda *given, **named: self.warmup(*given, grid=grid, **named)
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **kwargs: hits.append(cache_hit)
    cache = KvCache(model, 64, 16, DTYPE, CPU)
    batch = AttentionBatch.build(
        np.array([0, 1, 41], dtype=np.int32),
        np.array([9, 40], dtype=np.int32),
        np.zeros((2, 8), dtype=np.int32),
        np.full(41, -1, dtype=np.int64),
        CPU,
    )
    q = torch.zeros(41, model.num_heads, model.head_dim, dtype=DTYPE)
    paged_attention(q, cache.keys[0], cache.values[0], batch, model.head_dim**-0.5, model.layer_windows[0])
    return hits


@torch.inference_mode()
def main(folder: Path) -> None:
    plan = start_plan(ModelConfig.from_folder(folder))
    ahead = CompileAhead(plan, 2)
    rehearsed, problems = Rehearsal(plan).whole()
    found = launched(plan)
    ahead.wait_for_attention()
    told = ahead.close()
    result = {
        "rehearsed": [wanted.name for wanted in rehearsed],
        "problems": list(map(repr, problems)),
        "launched": [wanted.name for wanted in found],
        "missing": [wanted.name for wanted in found if wanted not in set(rehearsed)],
        "hits": attention_hits(plan.model),
        "told": told,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
