"""The host's page-locked memory and the device's pages, and copies between them that no step waits for."""

from __future__ import annotations

import time

import pytest
import torch

from lorax_backend.adapters.arena import LoraArena
from lorax_backend.adapters.host_adapter import HostAdapter
from lorax_backend.adapters.host_memory import HostMemory
from lorax_kernels.layout import LoraSite, PageLayout

pytestmark = pytest.mark.gpu

# Page of an 8B model with all linear layers adapted, nearly: 20 MiB in bfloat16.
LAYOUT = PageLayout({f"layers.{n}.down": LoraSite(14336, (4096,)) for n in range(70)})


def test_an_adapter_is_copied_beside_the_steps_and_arrives_whole() -> None:
    memory = HostMemory(LAYOUT, 8 * LAYOUT.page_size * 2, torch.bfloat16, pinned=True)
    assert memory.pinned
    assert memory.pages(0, 1).is_pinned()
    arena = LoraArena(LAYOUT, 8, 4, torch.bfloat16, "cuda", 64)
    pages = memory.pages(2, 4)
    pages.copy_(torch.randint(-100, 100, pages.shape, dtype=torch.int8))
    torch.cuda.synchronize()
    for _ in range(2):  # the first time pays for starting up
        slot = arena.allocate(32)
        assert slot is not None
        started = time.perf_counter()
        event = arena.write(slot, HostAdapter(pages, 32, frozenset({"layers.0.down"})))
        enqueued = time.perf_counter() - started
        assert event is not None
        event.synchronize()
        copied = time.perf_counter() - started
        assert arena.is_ready(slot)
        assert torch.equal(arena.pages[arena.slot_pages[slot][:4].tolist()].cpu(), pages)
        arena.free(slot)
    size = pages.numel() * 2
    print(f"{size / 2**20:.0f} MiB: host busy {enqueued * 1e3:.3f} ms, copied in {copied * 1e3:.2f} ms")  # noqa: T201
    assert enqueued < 0.002 < copied or copied < 0.02
    memory.close()


def test_a_large_copy_is_not_ready_until_it_is_over() -> None:
    memory = HostMemory(LAYOUT, 8 * LAYOUT.page_size * 2, torch.bfloat16, pinned=True)
    arena = LoraArena(LAYOUT, 8, 4, torch.bfloat16, "cuda", 64)
    pages = memory.pages(0, 8).fill_(1.0)
    slot = arena.allocate(64)
    assert slot is not None
    torch.cuda.synchronize()
    event = arena.write(slot, HostAdapter(pages, 64, frozenset({"layers.0.down"})))
    assert event is not None
    assert not arena.is_ready(slot), "80 MiB take longer than that"
    event.synchronize()
    assert arena.is_ready(slot)
    assert bool((arena.pages == 1.0).all())
    memory.close()
