"""The adapter provider of a real server: the life of adapters, with real sources, threads and device memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lorax_backend.adapters.arena import LoraArena
from lorax_backend.adapters.background import COPY, DISK, DOWNLOAD, PERMISSION, READ
from lorax_backend.adapters.checkpoint import AdapterInspector
from lorax_backend.adapters.host_memory import HostMemory
from lorax_backend.adapters.lifecycle import AdapterLifecycle
from lorax_backend.adapters.loader import AdapterLoader
from lorax_backend.adapters.loading import AdapterParts
from lorax_backend.adapters.page_writer import PageWriter
from lorax_backend.adapters.sources.base import AdapterSource
from lorax_backend.adapters.sources.registry import create_disk_cache, create_sources
from lorax_backend.config import ServerConfig
from lorax_backend.model.lora import LoraTarget
from lorax_kernels.layout import PageLayout

_PERMISSION_THREADS = 8  # each waits for one short answer


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
        writer: PageWriter | None = None,
    ) -> None:
        """`targets`, `layout` and `dtype` are the model's; `sources` replaces those of `create_sources(config)`;
        `writer` brings weights into pages where it can, instead of the processor."""

        inspector = AdapterInspector(
            targets, layout, dtype, config.max_lora_rank, config.allow_pickle_adapters, writer
        )
        disk = None
        if sources is None:
            disk = create_disk_cache(config)
            sources = create_sources(config, disk)
        self._memory = HostMemory(
            layout, config.adapter_host_bytes, dtype, pinned=arena.device.type == "cuda"
        )
        if writer is not None and self._memory.num_pages and writer.reaches(self._memory.pages(0, 1)):
            writer.warm_up(layout, self._memory.pages(0, 1))
        threads = config.adapter_loader_threads
        lanes = {DOWNLOAD: threads, READ: threads, PERMISSION: _PERMISSION_THREADS, COPY: 2, DISK: 1}
        parts = AdapterParts(
            sources=sources,
            inspect=inspector.inspect,
            arena=arena,
            memory=self._memory,
            loader=AdapterLoader(lanes),
            load_timeout_s=config.adapter_load_timeout_s,
            auth_ttl_s=config.adapter_auth_ttl_s,
            disk=disk,
            default_source=config.default_adapter_source,
        )
        super().__init__(parts)

    def close(self) -> None:
        super().close()
        self._memory.close()
