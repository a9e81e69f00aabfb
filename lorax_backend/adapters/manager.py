"""The adapter provider of a real server: the life of adapters, with real sources, threads and device memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorax_backend.adapters.arena import LoraArena
from lorax_backend.adapters.checkpoint import AdapterPlan, inspect_adapter
from lorax_backend.adapters.lifecycle import AdapterLifecycle
from lorax_backend.adapters.loader import AdapterLoader
from lorax_backend.adapters.loading import DOWNLOAD, PERMISSION, READ, AdapterParts
from lorax_backend.adapters.sources.base import AdapterSource
from lorax_backend.adapters.sources.registry import create_sources
from lorax_backend.config import ServerConfig
from lorax_backend.model.lora import LoraTarget
from lorax_kernels.layout import PageLayout

_PERMISSION_THREADS = 4


@dataclass(frozen=True, slots=True)
class _PinnedPlan:
    """A plan whose weights are read into page-locked memory, from which copies to the device do not block."""

    plan: AdapterPlan

    @property
    def rank(self) -> int:
        return self.plan.rank

    @property
    def num_pages(self) -> int:
        return self.plan.num_pages

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes

    def load(self) -> Any:
        return self.plan.load(pin_memory=True)


class AdapterManager(AdapterLifecycle):
    """See `AdapterLifecycle`, which has all the behaviour."""

    def __init__(
        self,
        config: ServerConfig,
        targets: Mapping[str, LoraTarget],
        layout: PageLayout,
        dtype: torch.dtype,
        arena: LoraArena,
        sources: Mapping[str, AdapterSource] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`targets`, `layout` and `dtype` are the model's; `sources` replaces those of `create_sources(config)`."""

        def inspect(folder: Path) -> AdapterPlan | _PinnedPlan:
            plan = inspect_adapter(folder, targets, layout, dtype, config.max_lora_rank)
            return _PinnedPlan(plan) if arena.device.type == "cuda" else plan

        threads = config.adapter_loader_threads
        parts = AdapterParts(
            sources=create_sources(config) if sources is None else sources,
            inspect=inspect,
            arena=arena,
            loader=AdapterLoader({DOWNLOAD: threads, READ: threads, PERMISSION: _PERMISSION_THREADS}),
            host_bytes=config.adapter_host_bytes,
            load_timeout_s=config.adapter_load_timeout_s,
        )
        super().__init__(parts, clock)
