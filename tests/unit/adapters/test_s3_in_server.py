"""Adapters in buckets as a server has them: real HTTP, real threads, a disk cache, device memory on the CPU."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapter_files import Base, lora_tensors, read_files
from adapter_server import AdapterServer
from s3_server import S3Server

from lorax_backend.errors import AdapterDownloadError, AdapterIncompatibleError
from lorax_backend.types import AdapterRef

WEIGHTS = "adapter_model.safetensors"
MODULES = ("model.layers.0.self_attn.q_proj",)


def ref(name: str) -> AdapterRef:
    return AdapterRef("s3", f"s3://loras/{name}")


def target(name: str) -> dict[str, Any]:
    return {"adapter_id": f"loras/{name}", "adapter_source": "s3"}


def page(server: AdapterServer, name: str) -> torch.Tensor:
    """The adapter's weights on the device, of the generation that a new request gets."""
    current = server.manager.resolve(ref(name))
    slot = server.manager.activate(current)
    assert slot is not None
    server.manager.deactivate(current)
    row = server.arena.slot_pages[slot]
    return server.arena.pages[row[row >= 0]].clone()


def test_what_is_wrong_with_an_adapter_is_told_to_its_requests_alone(
    s3: S3Server,
    make_adapter: Callable[..., Path],
    make_server: Callable[..., AdapterServer],
    tiny: Base,
) -> None:
    tensors = lora_tensors(tiny.targets, MODULES)
    shapes = {name: tensor[:, :-1].contiguous() for name, tensor in tensors.items()}
    next(iter(tensors.values()))[0, 0] = float("nan")
    good = read_files(make_adapter("good"))
    s3.put("loras", "shapes", read_files(make_adapter("shapes", modules=MODULES, tensors=shapes)))
    s3.put("loras", "nan", read_files(make_adapter("nan", modules=MODULES, tensors=tensors)))
    s3.put("loras", "short", {**good, WEIGHTS: good[WEIGHTS][:-100]})
    s3.put("loras", "good", good)
    server = make_server()
    for name, words in (("shapes", "needs shape"), ("nan", "NaN"), ("short", "truncated")):
        error = server.error(ref(name))
        assert type(error) is AdapterIncompatibleError, error
        assert words in error.message
    server.get(ref("good"))


def test_a_download_that_trickles_is_given_up_and_the_same_adapter_can_be_had_later(
    s3: S3Server, make_adapter: Callable[..., Path], make_server: Callable[..., AdapterServer], tiny: Base
) -> None:
    s3.put("loras", "slow", read_files(make_adapter()))
    s3.add_fault(f"GET /loras/slow/{WEIGHTS}", trickle=threading.Event())
    # On a busy machine the time may be over before the weights are asked for.
    for limit in (0.5, 3.0, 15.0):
        error = make_server(adapter_load_timeout_s=limit).error(ref("slow"))
        assert isinstance(error, AdapterDownloadError)
        assert f"{limit:g} s" in error.message
        if s3.count(f"GET /loras/slow/{WEIGHTS}"):
            break
    # It waits for the first server's thread, which must end too, and let go of the files.
    server = make_server()
    server.get(ref("slow"))
    assert s3.count(f"GET /loras/slow/{WEIGHTS}") == 2


def test_200_requests_for_one_cold_adapter_are_one_download(
    s3: S3Server, make_adapter: Callable[..., Path], make_server: Callable[..., AdapterServer]
) -> None:
    s3.put("loras", "crowd", read_files(make_adapter()))
    server = make_server()
    handles = [server.ask(ref("crowd")) for _ in range(200)]
    server.until(lambda: all(server.ready(handle, ref("crowd")) for handle in handles))
    assert s3.count(f"GET /loras/crowd/{WEIGHTS}") == 1


def test_a_client_gone_while_its_adapter_loads_or_fails_stops_no_other_load(
    s3: S3Server, make_adapter: Callable[..., Path], make_server: Callable[..., AdapterServer]
) -> None:
    files, release = read_files(make_adapter()), threading.Event()
    for name, weights in (("late", files[WEIGHTS]), ("bad", b"broken"), ("good", files[WEIGHTS])):
        s3.put("loras", name, {**files, WEIGHTS: weights})
    server = make_server(adapter_loader_threads=2)
    for name in ("late", "bad"):
        s3.add_fault(f"GET /loras/{name}/", hold=release)
        server.manager.release(server.ask(ref(name)))
    server.until(lambda: True)
    release.set()
    server.get(ref("good"))
    server.get(ref("late"))
    assert isinstance(server.error(ref("bad")), AdapterIncompatibleError)


def test_files_deleted_while_in_use_end_no_request_and_are_downloaded_anew(
    s3: S3Server,
    make_adapter: Callable[..., Path],
    make_server: Callable[..., AdapterServer],
    tmp_path: Path,
) -> None:
    s3.put("loras", "a", read_files(make_adapter()))
    server = make_server()
    handle = server.get(ref("a"))
    before = page(server, "a")
    shutil.rmtree(tmp_path / "disk" / "s3")
    assert torch.equal(page(server, "a"), before)
    server.manager.release(handle)
    server.manager.control("adapter_unload", target("a"))
    server.get(ref("a"))
    assert torch.equal(page(server, "a"), before)
    assert s3.count(f"GET /loras/a/{WEIGHTS}") == 2


def test_a_reload_of_a_changed_object_gives_new_requests_the_new_weights_and_leaves_the_old_theirs(
    s3: S3Server, make_adapter: Callable[..., Path], make_server: Callable[..., AdapterServer]
) -> None:
    s3.put("loras", "a", read_files(make_adapter(seed=1)))
    server = make_server()
    old_request = server.get(ref("a"))
    old = server.manager.resolve(ref("a"))
    slot = server.manager.activate(old)
    assert slot is not None
    row = server.arena.slot_pages[slot]
    weights, key = server.arena.pages[row[row >= 0]].clone(), server.manager.cache_key(old)
    s3.put("loras", "a", read_files(make_adapter(seed=2)))
    server.get(ref("a"))
    assert server.manager.cache_key(server.manager.resolve(ref("a"))) == key, "nobody has asked for a reload"

    assert server.manager.control("adapter_reload", target("a"))["status"] == "loading"
    server.until(lambda: server.manager.resolve(ref("a")) != old)
    new = server.manager.resolve(ref("a"))
    server.get(new)
    new_key = server.manager.cache_key(new)
    assert key.rpartition("@")[0] == new_key.rpartition("@")[0] == "s3:s3://loras/a"
    assert key != new_key, "the prefix cache goes by it"
    row = server.arena.slot_pages[slot]
    assert torch.equal(server.arena.pages[row[row >= 0]], weights), "those of the request in flight"
    assert not torch.equal(page(server, "a"), weights)
    server.manager.deactivate(old)
    server.manager.release(old_request)


def test_a_request_that_began_with_an_object_since_overwritten_gets_its_weights_back_from_disk(
    s3: S3Server, make_adapter: Callable[..., Path], make_server: Callable[..., AdapterServer]
) -> None:
    s3.put("loras", "a", read_files(make_adapter(seed=1)))
    server = make_server()
    handle = server.get(ref("a"))
    weights, key = page(server, "a"), server.manager.cache_key(ref("a"))
    s3.put("loras", "a", read_files(make_adapter(seed=2)))
    record = server.manager._loading.find(ref("a"))
    assert record is not None
    # As if it had been preempted, and others had needed the room in both memories.
    server.manager._loading.evict(record)
    server.manager.evict(record)
    assert not server.ready(handle, ref("a"))
    server.until(lambda: server.ready(handle, ref("a")) or handle in server.failed)
    assert not server.failed
    assert server.manager.cache_key(ref("a")) == key
    assert torch.equal(page(server, "a"), weights)
