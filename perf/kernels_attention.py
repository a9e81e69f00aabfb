"""Paged attention alone: shapes, timing, and the search for block sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
from kernels_timing import graph_us

from lorax_kernels import AttentionBatch, attention_triton
from lorax_kernels.configs import DEFAULT_ATTENTION, AttentionConfig

ATTENTION_SHAPES = [
    (1, 1, 256), (1, 1, 2048), (1, 1, 32768), (8, 1, 256), (8, 1, 4096), (32, 1, 256), (32, 1, 2048), (128, 1, 256),
    (128, 1, 2048), (256, 1, 1024), (4, 2048, 2048), (1, 2048, 8192),
]  # fmt: skip
ATTENTION_CHOICES = [
    {"block_n": n, "stages": t, "warps": w, "min_split": m, "waves": v}
    for n, t, w, m, v in (
        (64, 3, 4, 128, 4), (32, 3, 4, 128, 8), (32, 3, 2, 128, 8), (32, 4, 2, 256, 8), (64, 3, 4, 256, 4),
        (64, 2, 4, 512, 6), (64, 3, 8, 128, 4), (32, 3, 4, 64, 8),
    )
]  # fmt: skip
ATTENTION_PREFILL_CHOICES = [
    {"prefill_block_m": m, "prefill_block_n": n, "prefill_stages": t, "prefill_warps": w}
    for m, n, t, w in ((128, 64, 2, 8), (128, 64, 3, 8), (128, 128, 2, 8), (64, 64, 3, 4), (128, 32, 4, 8))
]


class AttentionBench:
    """Times attention of 32 query heads on 8 key heads of 128, in blocks of 16 at random places."""

    def __init__(self, rep: int) -> None:
        self.rep = rep

    def call(
        self, shape: tuple[int, int, int], config: AttentionConfig | None = None
    ) -> list[Callable[[], torch.Tensor]]:
        """Calls on two different caches, in turn."""
        count, queries, context = shape
        blocks = -(-context // 16)
        tables = np.random.default_rng(0).permutation(count * blocks).astype(np.int32).reshape(count, blocks)
        caches = [
            torch.randn(2, count * blocks, 16, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        ]
        batch = AttentionBatch.build(
            np.arange(count + 1, dtype=np.int32) * queries, np.full(count, context, np.int32), tables,
            np.zeros(count * queries, np.int64), "cuda",
        )  # fmt: skip
        q = torch.randn(count * queries, 32, 128, device="cuda").bfloat16()
        return [
            lambda c=c: attention_triton.paged_attention(q, c[0], c[1], batch, 128**-0.5, None, config)
            for c in caches * 2
        ]

    def us(self, shape: tuple[int, int, int], config: AttentionConfig | None = None) -> float:
        return graph_us(self.call(shape, config), self.rep)

    def row(self, shape: tuple[int, int, int], config: AttentionConfig | None) -> dict[str, float]:
        """Decode in GB/s of keys and values, prefill in TFLOP/s."""
        (count, queries, context), us = shape, self.us(shape, config)
        entry: dict[str, float] = {"sequences": count, "queries": queries, "context": context, "us": us}
        if queries == 1:
            entry["gbs"] = count * context * 8 * 128 * 4 / us / 1e3
        else:
            seen = queries * (context - queries) + queries * (queries + 1) / 2
            entry["tflops"] = count * seen * 32 * 128 * 4 / us / 1e6
        return entry

    def tune(self, log: list[dict[str, Any]]) -> dict[int, AttentionConfig]:
        """The best decode choice for up to 8, 32 and more sequences, each with the best prefill choice."""
        prefill = [s for s in ATTENTION_SHAPES if s[1] > 1]
        best_prefill = self._best(prefill, DEFAULT_ATTENTION, ATTENTION_PREFILL_CHOICES, log)
        found = {}
        for low, high in ((1, 8), (9, 32), (33, 512)):
            shapes = [s for s in ATTENTION_SHAPES if s[1] == 1 and low <= s[0] <= high]
            found[high] = self._best(shapes, best_prefill, ATTENTION_CHOICES, log)
        return found

    def _best(
        self, shapes: list[tuple[int, int, int]], start: AttentionConfig, choices: list[dict[str, Any]],
        log: list[dict[str, Any]],
    ) -> AttentionConfig:  # fmt: skip
        scored = []
        for choice in choices:
            config = replace(start, **choice)
            try:
                times = [self.us(shape, config) for shape in shapes]
            except triton.runtime.errors.OutOfResources as error:
                print(f"  left out {choice}: {error}", flush=True)
                continue
            scored.append((float(np.exp(np.mean(np.log(times)))), config))
            log.append({"choice": choice, "shapes": shapes, "us": times})
            print(f"  {scored[-1][0]:8.2f} {choice} " + " ".join(f"{t:.1f}" for t in times), flush=True)
        return min(scored, key=lambda item: item[0])[1]
