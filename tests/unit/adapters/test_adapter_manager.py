"""The adapter provider as a server has it: real folders, a real hub, real threads, device memory on the CPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from adapter_files import Base, lora_tensors, read_files
from hub_server import HubServer

from lorax_backend.adapters.arena import LoraArena
from lorax_backend.adapters.manager import AdapterManager
from lorax_backend.config import ServerConfig
from lorax_backend.errors import (
    AdapterDownloadError,
    AdapterError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    AdapterUnauthorizedError,
    LoraxError,
    ValidationError,
)
from lorax_backend.types import AdapterRef

WAIT = 60.0
WEIGHTS = "adapter_model.safetensors"
MODULES = ("model.layers.0.self_attn.q_proj",)


class Server:
    """A manager and the part of an engine that polls it."""

    def __init__(self, base: Base, num_pages: int = 8, **options: object) -> None:
        config = ServerConfig(**options)  # type: ignore[arg-type]
        self.arena = LoraArena(base.layout, num_pages, 8, torch.float32, "cpu", config.max_lora_rank)
        self.manager = AdapterManager(config, base.targets, base.layout, torch.float32, self.arena)
        self.failed: dict[int, LoraxError] = {}
        self._woken = threading.Event()
        self.manager.set_wakeup(self._woken.set)

    def until(self, done: Callable[[], bool]) -> None:
        """Poll, as an idle engine does, until something holds."""
        deadline = time.monotonic() + WAIT
        while True:
            self._woken.clear()
            self.failed.update({failure.handle: failure.error for failure in self.manager.poll()})
            self.manager.check()
            if done():
                return
            assert self._woken.wait(deadline - time.monotonic()), "nothing happened"

    def error(self, handle: int, ref: AdapterRef, token: str | None = None) -> LoraxError:
        self.manager.acquire(handle, ref, token)
        self.until(lambda: handle in self.failed)
        return self.failed[handle]


@pytest.fixture
def make_server(tiny: Base) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(base: Base = tiny, **options: object) -> Server:
        servers.append(Server(base, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield make
    for server in servers:
        server.manager.close()


def local(folder: Path) -> AdapterRef:
    return AdapterRef("local", str(folder))


def test_all_example_adapters_reach_the_device_whole(
    adapters_path: Path, smollm2: Base, make_server: Callable[..., Server]
) -> None:
    server = make_server(smollm2, num_pages=12)
    refs = [local(folder) for folder in sorted(adapters_path.iterdir())]
    for handle, ref in enumerate(refs):
        server.manager.acquire(handle, ref, None)
    server.until(lambda: all(server.manager.is_loaded(ref) for ref in refs))
    keys = {server.manager.cache_key(ref) for ref in refs}
    assert len(keys) == len(refs)
    for ref in refs:
        slot = server.manager.activate(ref)
        assert slot is not None
        row = server.arena.slot_pages[slot]
        assert torch.equal(server.arena.pages[row[row >= 0]], smollm2.load(Path(ref.id)).pages)
        assert server.arena.slot_has(slot, "lm_head") == ref.id.endswith("tag-cedar")
    server.arena.check()


def test_200_requests_for_a_hub_adapter_are_one_download(
    hub: HubServer, make_adapter: Callable[..., Path], make_server: Callable[..., Server], tmp_path: Path
) -> None:
    hub.commit("org/adapter", read_files(make_adapter()))
    server = make_server(hub_cache=str(tmp_path / "cache"))
    ref = AdapterRef("hub", "org/adapter")
    for handle in range(200):
        server.manager.acquire(handle, ref, None)
    server.until(lambda: server.manager.is_loaded(ref))
    assert hub.count("GET /org/adapter/resolve") == 2
    assert server.manager.stats()["loads"] == 1
    assert (
        server.manager.cache_key(ref) == f"hub:org/adapter@{hub.repositories['org/adapter'].branches['main']}"
    )


def test_slow_downloads_delay_only_their_own_requests(
    hub: HubServer, make_adapter: Callable[..., Path], make_server: Callable[..., Server], tmp_path: Path
) -> None:
    folder = make_adapter()
    release = threading.Event()
    for number in range(6):
        hub.commit(f"org/slow{number}", read_files(folder))
        hub.add_fault(f"GET /org/slow{number}/resolve", hold=release)
    server = make_server(hub_cache=str(tmp_path / "cache"), adapter_loader_threads=2)
    slow = [AdapterRef("hub", f"org/slow{number}") for number in range(6)]
    for handle, ref in enumerate(slow):
        server.manager.acquire(handle, ref, None)
    server.manager.acquire(100, local(folder), None)
    server.until(lambda: server.manager.is_loaded(local(folder)))
    assert not any(server.manager.is_loaded(ref) for ref in slow)
    release.set()
    server.until(lambda: all(server.manager.is_loaded(ref) for ref in slow))
    assert not server.failed


def test_a_download_that_trickles_is_given_up_and_the_next_ones_go_on(
    hub: HubServer, make_adapter: Callable[..., Path], make_server: Callable[..., Server], tmp_path: Path
) -> None:
    files = read_files(make_adapter())
    hub.commit("org/slow", files)
    hub.commit("org/good", files)
    hub.add_fault("GET /org/slow/resolve", trickle=threading.Event())
    server = make_server(
        hub_cache=str(tmp_path / "cache"), adapter_loader_threads=1, adapter_load_timeout_s=0.8
    )
    error = server.error(1, AdapterRef("hub", "org/slow"))
    assert isinstance(error, AdapterDownloadError)
    assert "0.8 s" in error.message
    server.manager._loading.background._timeout_s = 60.0  # of this one nothing is said about time
    good = AdapterRef("hub", "org/good")
    server.manager.acquire(2, good, None)
    server.until(lambda: server.manager.is_loaded(good))


def test_each_kind_of_failure_reaches_its_request(
    hub: HubServer,
    make_adapter: Callable[..., Path],
    make_server: Callable[..., Server],
    tmp_path: Path,
    tiny: Base,
) -> None:
    server = make_server(hub_cache=str(tmp_path / "cache"), max_lora_rank=16)
    hub.commit("org/dora", read_files(make_adapter("dora", use_dora=True)))
    hub.commit("org/private", read_files(make_adapter("private")), token="hf_owner")
    wrong = {
        name: tensor[:, :-1].contiguous() for name, tensor in lora_tensors(tiny.targets, MODULES).items()
    }
    hub.commit("org/shapes", read_files(make_adapter("shapes", modules=MODULES, tensors=wrong)))
    cut = read_files(make_adapter("cut"))
    hub.commit("org/cut", {**cut, WEIGHTS: cut[WEIGHTS][:-100]})
    hub.commit("org/gated", read_files(make_adapter("gated")), token="hf_owner", gated=True)
    cases: list[tuple[AdapterRef, type[LoraxError], str]] = [
        (AdapterRef("hub", "org/dora"), AdapterIncompatibleError, "use_dora"),
        (AdapterRef("hub", "org/private"), AdapterNotFoundError, "api_token"),
        (AdapterRef("hub", "org/shapes"), AdapterIncompatibleError, "the base model needs shape"),
        (AdapterRef("hub", "org/cut"), AdapterIncompatibleError, "truncated"),
        (AdapterRef("hub", "org/gated"), AdapterUnauthorizedError, "gated"),
        (AdapterRef("hub", "org/dora", "v9"), AdapterNotFoundError, "'v9'"),
        (AdapterRef("hub", "org/none"), AdapterNotFoundError, "org/none"),
        (AdapterRef("hub", "not a repo"), ValidationError, "adapter_id"),
        (AdapterRef("gcs", "bucket/key"), ValidationError, "hub, local, pbase, s3"),
        (local(tmp_path / "none"), AdapterNotFoundError, str(tmp_path / "none")),
        (local(make_adapter("wide", rank=17)), AdapterTooLargeError, "max_lora_rank 16"),
    ]
    for handle, (ref, kind, words) in enumerate(cases):
        error = server.error(handle, ref)
        assert type(error) is kind, error
        assert words in error.message
    good = local(make_adapter("good"))
    server.manager.acquire(99, good, None)
    server.until(lambda: server.manager.is_loaded(good))


def test_an_adapter_mended_on_disk_is_found_by_the_next_request(
    make_adapter: Callable[..., Path], make_server: Callable[..., Server]
) -> None:
    server = make_server()
    ref = local(make_adapter(use_dora=True))
    assert isinstance(server.error(1, ref), AdapterError)
    make_adapter(use_dora=False)
    server.manager.acquire(2, ref, None)
    server.until(lambda: server.manager.is_loaded(ref))


def test_a_private_adapter_is_shared_only_among_those_who_may_read_it(
    hub: HubServer, make_adapter: Callable[..., Path], make_server: Callable[..., Server], tmp_path: Path
) -> None:
    hub.commit("org/private", read_files(make_adapter()), token="hf_owner")
    server = make_server(hub_cache=str(tmp_path / "cache"))
    ref = AdapterRef("hub", "org/private")
    server.manager.acquire(1, ref, "hf_owner")
    server.until(lambda: server.manager.is_loaded(ref))
    error = server.error(2, ref, "hf_thief")
    assert isinstance(error, AdapterNotFoundError)
    assert "hf_" not in error.message
    assert server.manager.is_loaded(ref), "for its owner"
    downloads = hub.count("GET /org/private/resolve")
    server.manager.acquire(3, ref, "hf_owner")
    assert server.manager.is_loaded(ref)
    assert hub.count("GET /org/private/resolve") == downloads
