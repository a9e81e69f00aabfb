"""Sizes fixed at start: the limits of requests and steps, and how device memory is shared out."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_backend.config import ServerConfig
from lorax_backend.model.config import ModelConfig
from lorax_kernels.layout import PageLayout, pages_for_rank

_DEFAULT_TOTAL_TOKENS = 4096
_CPU_ADAPTER_PAGES = 64
_GIB = 1 << 30
# Device memory left alone beside the measured peak: CUDA graphs, library workspaces, fragmentation.
_CUDA_RESERVE_BYTES = 768 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server accepts, after zeros in the configuration have been worked out. All in tokens or counts."""

    max_input_length: int
    max_total_tokens: int
    max_num_seqs: int
    max_batch_tokens: int


def resolve_limits(config: ServerConfig, model: ModelConfig, on_cuda: bool) -> Limits:
    """Fill in the limits that the configuration leaves open.

    Raises:
        ValueError: naming the option, if one is out of the model's range.
    """
    longest = model.max_position_embeddings
    total = config.max_total_tokens or min(longest, _DEFAULT_TOTAL_TOKENS)
    if not 2 <= total <= longest:
        raise ValueError(
            f"max_total_tokens is {total}; this model takes 2 to {longest} (max_position_embeddings)"
        )
    longest_input = config.max_input_length or total - 1
    if not 1 <= longest_input < total:
        raise ValueError(
            f"max_input_length is {longest_input}; it must be 1 to {total - 1} (max_total_tokens - 1)"
        )
    batch_tokens = config.max_batch_tokens or (8192 if on_cuda else 512)
    num_seqs = config.max_batch_size or (256 if on_cuda else 64)
    if batch_tokens < 1 or num_seqs < 1:
        raise ValueError(f"max_batch_tokens {batch_tokens} and max_batch_size {num_seqs} must be at least 1")
    if not config.chunked_prefill:
        batch_tokens = max(batch_tokens, longest_input)
    return Limits(longest_input, total, num_seqs, batch_tokens)


def fit_limits(limits: Limits, config: ServerConfig, num_blocks: int) -> Limits:
    """Lower the limits nobody asked for to what `num_blocks` KV blocks can hold.

    Raises:
        ValueError: if a limit that was asked for does not fit.
    """
    capacity = num_blocks * config.block_size
    if limits.max_total_tokens <= capacity:
        return limits
    if config.max_total_tokens or capacity < 2:
        raise ValueError(
            f"max_total_tokens {limits.max_total_tokens} does not fit the KV cache of {num_blocks} blocks of "
            f"{config.block_size} tokens; lower it, or give the cache more memory (num_blocks, kv_cache_memory, "
            "cuda_memory_fraction)"
        )
    longest_input = min(limits.max_input_length, capacity - 1)
    return Limits(longest_input, capacity, limits.max_num_seqs, limits.max_batch_tokens)


def plan_adapter_pages(
    config: ServerConfig, layout: PageLayout, itemsize: int, cuda_total_bytes: int | None
) -> int:
    """Pages of the adapter arena; `cuda_total_bytes` is the GPU's memory, None on a CPU.

    Raises:
        ValueError: if an adapter of `max_lora_rank` would not fit.
    """
    if config.max_lora_rank < 1 or config.max_active_adapters < 1:
        raise ValueError("max_lora_rank and max_active_adapters must be at least 1")
    needed = pages_for_rank(config.max_lora_rank)
    pages = config.adapter_pages
    if pages == 0 and cuda_total_bytes is None:
        pages = max(_CPU_ADAPTER_PAGES, needed)
    elif pages == 0 and cuda_total_bytes is not None:
        share = int(cuda_total_bytes * config.adapter_memory_fraction)
        pages = min(share // (layout.page_size * itemsize), config.max_active_adapters * needed)
    if pages < needed:
        raise ValueError(
            f"{pages} adapter pages cannot hold one adapter of max_lora_rank {config.max_lora_rank}, which takes "
            f"{needed}; raise adapter_pages or adapter_memory_fraction, or lower max_lora_rank"
        )
    return pages


def plan_cpu_blocks(config: ServerConfig, bytes_a_block: int) -> int:
    """KV blocks on a CPU: `num_blocks`, or what `kv_cache_memory` holds."""
    if config.num_blocks:
        return _at_least_one(config.num_blocks, "num_blocks")
    return _at_least_one(int(config.kv_cache_memory * _GIB) // bytes_a_block, "kv_cache_memory")


@dataclass(frozen=True, slots=True)
class CudaMemory:
    """Bytes of one GPU after weights and adapters are loaded. `free` and `total` are the driver's; `peak` is what the
    largest step took beyond the tensors that stay; `table` what penalties may take later; `graphs` what recordings of
    prefill steps will."""

    free: int
    total: int
    peak: int
    table: int
    graphs: int = 0


def plan_cuda_blocks(config: ServerConfig, memory: CudaMemory, bytes_a_block: int) -> int:
    """KV blocks on CUDA: `num_blocks`, or what is left of `cuda_memory_fraction` of the GPU.

    Raises:
        ValueError: if nothing is left, or `num_blocks` asks for more than there is.
    """
    used = memory.total - memory.free
    left = (
        int(memory.total * config.cuda_memory_fraction)
        - used
        - memory.peak
        - memory.table
        - memory.graphs
        - _CUDA_RESERVE_BYTES
    )
    fitting = left // bytes_a_block
    if config.num_blocks > fitting:
        raise ValueError(
            f"num_blocks {config.num_blocks} takes {config.num_blocks * bytes_a_block / _GIB:.1f} GiB, but "
            f"{max(left, 0) / _GIB:.1f} GiB are left of cuda_memory_fraction {config.cuda_memory_fraction}"
        )
    if config.num_blocks:
        return _at_least_one(config.num_blocks, "num_blocks")
    return _at_least_one(fitting, "cuda_memory_fraction")


def _at_least_one(blocks: int, option: str) -> int:
    if blocks < 1:
        raise ValueError(f"{option} leaves no memory for the KV cache; raise it, or load a smaller model")
    return blocks
