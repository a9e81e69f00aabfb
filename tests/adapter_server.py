"""The adapter provider of a real server, with the part of an engine that polls it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapter_files import Base

from lorax_backend.adapters.arena import LoraArena
from lorax_backend.adapters.manager import AdapterManager
from lorax_backend.config import ServerConfig
from lorax_backend.errors import LoraxError
from lorax_backend.types import AdapterRef

WAIT = 60.0


class AdapterServer:
    """A manager with real sources, threads and a disk cache in the folder `cache`, device memory on the CPU.

    `failed` has the errors of requests by their handles.
    """

    def __init__(self, base: Base, cache: Path, num_pages: int = 8, **options: Any) -> None:
        config = ServerConfig(adapter_disk_cache=str(cache), adapter_host_bytes=64 << 20, **options)
        self.arena = LoraArena(base.layout, num_pages, 8, torch.float32, "cpu", config.max_lora_rank)
        self.manager = AdapterManager(config, base.targets, base.layout, torch.float32, self.arena)
        self.failed: dict[int, LoraxError] = {}
        self.woken = threading.Event()
        self.manager.set_wakeup(self.woken.set)
        self._handles = iter(range(1, 10_000))

    def ask(self, ref: AdapterRef, token: str | None = None) -> int:
        """A request that needs the adapter; its handle."""
        handle = next(self._handles)
        self.manager.acquire(handle, ref, token)
        return handle

    def until(self, done: Callable[[], bool]) -> None:
        """Poll, as an idle engine does, until something holds."""
        deadline = time.monotonic() + WAIT
        while True:
            self.woken.clear()
            self.failed.update({failure.handle: failure.error for failure in self.manager.poll()})
            self.manager.check()
            if done():
                return
            assert self.woken.wait(deadline - time.monotonic()), "nothing happened"

    def ready(self, handle: int, ref: AdapterRef) -> bool:
        """True if this request may begin."""
        return self.manager.is_ready(handle, ref)

    def get(self, ref: AdapterRef, token: str | None = None) -> int:
        """A request that may begin; its handle."""
        handle = self.ask(ref, token)
        self.until(lambda: handle in self.failed or self.ready(handle, ref))
        assert handle not in self.failed, self.failed[handle]
        return handle

    def error(self, ref: AdapterRef, token: str | None = None) -> LoraxError:
        """Why a request for the adapter fails."""
        handle = self.ask(ref, token)
        self.until(lambda: handle in self.failed)
        return self.failed[handle]
