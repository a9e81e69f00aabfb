"""What the launches of a start depend on."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_backend.model.config import ModelConfig
from lorax_kernels.device_facts import DeviceFacts


@dataclass(frozen=True, slots=True)
class StartPlan:
    """What a start launches depends on this, on the tables of the kernels and on nothing else. `dtype` is torch's name
    of it, `sizes` and `prefill_sizes` are the graphs' padded sizes."""

    device: DeviceFacts
    model: ModelConfig
    dtype: str
    block_size: int
    max_blocks: int
    max_num_seqs: int
    max_total_tokens: int
    max_lora_rank: int
    sizes: tuple[int, ...]
    prefill_sizes: tuple[int, ...]
