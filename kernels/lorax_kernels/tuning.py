"""Block sizes and split counts of the kernels, by device and batch size.

The tables are written by `perf/kernels.py --tune` on the device they name. A device without a table gets
`DEFAULT`, which is sensible on any recent NVIDIA GPU.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """How the LoRA kernels are launched. Waves are programs per multiprocessor of a persistent launch.

    `pdl` lets expand start while shrink still runs (programmatic dependent launch, compute capability 9.0 and up);
    `overlap` runs shrink beside the base layer's product on a second stream.
    """

    block_k: int = 512
    max_splits: int = 8
    shrink_waves: int = 8
    shrink_warps: int = 4
    stages: int = 3
    block_n: int = 256
    expand_waves: int = 8
    expand_warps: int = 4
    pdl: bool = False
    overlap: bool = False
    prefill_block_k: int = 128
    prefill_splits: int = 2
    prefill_stages: int = 3
    prefill_shrink_warps: int = 4
    prefill_block_n: int = 128
    prefill_expand_warps: int = 4


DEFAULT = LoraConfig()


@functools.cache
def _tables(device_index: int) -> dict[int, LoraConfig]:
    """{largest token count: config} of the current device, empty if it has no table."""
    major, minor = torch.cuda.get_device_capability(device_index)
    path = Path(__file__).parent / "tuned" / f"lora_sm{major}{minor}.json"
    if not path.is_file():
        return {}
    known = {f.name for f in fields(LoraConfig)}
    table = json.loads(path.read_text())["configs"]
    return {
        int(tokens): replace(DEFAULT, **{k: v for k, v in entry.items() if k in known})
        for tokens, entry in table.items()
    }


@functools.lru_cache(maxsize=1024)
def lora_config(num_tokens: int, decode: bool) -> LoraConfig:
    """The configuration for a batch of `num_tokens` rows."""
    if not torch.cuda.is_available():
        return DEFAULT
    table = _tables(torch.cuda.current_device())
    if not table:
        return DEFAULT
    fitting = [tokens for tokens in table if tokens >= num_tokens]
    return table[min(fitting) if fitting and decode else max(table)]
