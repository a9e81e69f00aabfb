"""Kernels of multi-LoRA serving. Standalone: torch, triton and numpy only.

Every function runs as Triton kernels on CUDA tensors and as its torch twin (`reference`, `attention_reference`)
elsewhere. Layout of the adapter pages: `layout`. What a step's kernels are told: `metadata`.
"""

from lorax_kernels.dispatch import (
    add_lora,
    begin_linear,
    begin_lora_linear,
    linear,
    linear_silu_mul,
    lora_linear,
    lora_linear_silu_mul,
    paged_attention,
    rms_norm,
    rope_and_cache,
    silu_mul,
    write_kv,
)
from lorax_kernels.layout import PAGE_RANK, LoraSite, PageLayout, pages_for_rank
from lorax_kernels.metadata import AttentionBatch, FixedAttention, LoraBatch, LoraSegment
from lorax_kernels.worklist import GRAPH_MAX_TOKENS, WorkBuffer

__all__ = [
    "GRAPH_MAX_TOKENS",
    "PAGE_RANK",
    "AttentionBatch",
    "FixedAttention",
    "LoraBatch",
    "LoraSegment",
    "LoraSite",
    "PageLayout",
    "WorkBuffer",
    "add_lora",
    "begin_linear",
    "begin_lora_linear",
    "linear",
    "linear_silu_mul",
    "lora_linear",
    "lora_linear_silu_mul",
    "paged_attention",
    "pages_for_rank",
    "rms_norm",
    "rope_and_cache",
    "silu_mul",
    "write_kv",
]
