"""Working out limits and memory: defaults, refusals that name the option, arithmetic of the GPU plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lorax_backend.config import ServerConfig
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.limits import (
    CudaMemory,
    Limits,
    fit_limits,
    plan_adapter_pages,
    plan_cpu_blocks,
    plan_cuda_blocks,
    resolve_limits,
)
from lorax_backend.model.lora import page_layout

GIB = 1 << 30


@pytest.fixture
def model(tiny_model_path: Callable[..., Path]) -> ModelConfig:
    return ModelConfig.from_folder(tiny_model_path("llama"))


def test_open_limits_follow_the_model_and_the_device(model: ModelConfig) -> None:
    assert resolve_limits(ServerConfig(), model, on_cuda=False) == Limits(511, 512, 64, 512)
    long = replace(model, max_position_embeddings=100_000)
    assert resolve_limits(ServerConfig(), long, on_cuda=True) == Limits(4095, 4096, 256, 8192)
    assert (
        resolve_limits(ServerConfig(max_total_tokens=50_000), long, on_cuda=True).max_input_length == 49_999
    )


def test_without_chunked_prefill_a_step_holds_the_longest_prompt(model: ModelConfig) -> None:
    config = ServerConfig(chunked_prefill=False, max_batch_tokens=64)
    assert resolve_limits(config, model, on_cuda=False).max_batch_tokens == 511


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (ServerConfig(max_total_tokens=513), "max_total_tokens"),
        (ServerConfig(max_total_tokens=1), "max_total_tokens"),
        (ServerConfig(max_total_tokens=100, max_input_length=100), "max_input_length"),
        (ServerConfig(max_batch_size=-1), "max_batch_size"),
    ],
)
def test_limits_out_of_range_are_named(config: ServerConfig, word: str, model: ModelConfig) -> None:
    with pytest.raises(ValueError, match=word):
        resolve_limits(config, model, on_cuda=False)


def test_a_small_cache_lowers_the_limit_only_if_nobody_asked_for_it() -> None:
    limits = Limits(511, 512, 64, 512)
    assert fit_limits(limits, ServerConfig(), 10) == Limits(159, 160, 64, 512)
    assert fit_limits(limits, ServerConfig(), 32) == limits
    with pytest.raises(ValueError, match="max_total_tokens 512 does not fit"):
        fit_limits(limits, ServerConfig(max_total_tokens=512), 31)


def test_adapter_pages_come_from_the_option_the_device_or_the_memory(model: ModelConfig) -> None:
    layout = page_layout(model)
    assert plan_adapter_pages(ServerConfig(), layout, 4, None) == 64
    assert plan_adapter_pages(ServerConfig(adapter_pages=9), layout, 4, None) == 9
    total = 1000 * layout.page_size * 2
    assert plan_adapter_pages(ServerConfig(), layout, 2, total) == 100
    assert plan_adapter_pages(ServerConfig(max_active_adapters=2), layout, 2, total) == 16
    with pytest.raises(ValueError, match="max_lora_rank 64"):
        plan_adapter_pages(ServerConfig(adapter_pages=7), layout, 4, None)


def test_kv_blocks_on_a_cpu_come_from_the_count_or_the_memory() -> None:
    assert plan_cpu_blocks(ServerConfig(num_blocks=5), 1000) == 5
    assert plan_cpu_blocks(ServerConfig(kv_cache_memory=0.5), 1 << 20) == 512
    with pytest.raises(ValueError, match="num_blocks"):
        plan_cpu_blocks(ServerConfig(num_blocks=-5), 1000)
    with pytest.raises(ValueError, match="kv_cache_memory"):
        plan_cpu_blocks(ServerConfig(kv_cache_memory=0.0001), 1 << 20)


def test_the_gpu_plan_stays_within_its_share_whatever_others_use() -> None:
    config = ServerConfig(cuda_memory_fraction=0.9)
    block = 2 << 20
    for other in (0, 20 * GIB):
        memory = CudaMemory(free=60 * GIB - other, total=80 * GIB, peak=2 * GIB, table=GIB // 8)
        taken = plan_cuda_blocks(config, memory, block) * block + memory.peak + memory.table
        used = memory.total - memory.free
        assert 0.88 * memory.total < used + taken + (768 << 20) <= 0.9 * memory.total
    plain = CudaMemory(free=60 * GIB, total=80 * GIB, peak=2 * GIB, table=0)
    assert (
        plan_cuda_blocks(config, replace(plain, graphs=GIB), block)
        == plan_cuda_blocks(config, plain, block) - 512
    )
    with pytest.raises(ValueError, match="cuda_memory_fraction"):
        plan_cuda_blocks(config, CudaMemory(GIB, 80 * GIB, 0, 0), block)
    with pytest.raises(ValueError, match="num_blocks 99999999"):
        plan_cuda_blocks(ServerConfig(num_blocks=99_999_999), CudaMemory(60 * GIB, 80 * GIB, 0, 0), block)
