"""What LoRAX does wrong with adapters (by the row of its behaviour inventory), on real HTTP, threads and folders."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import Base, read_files
from adapter_server import AdapterServer
from hub_server import HubServer

from lorax_backend.adapters.checkpoint import AdapterInspector
from lorax_backend.errors import (
    AdapterDownloadError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
)
from lorax_backend.types import AdapterRef


@pytest.fixture
def files(make_adapter: Callable[..., Path]) -> dict[str, bytes]:
    return read_files(make_adapter())


def hub_ref(name: str) -> AdapterRef:
    return AdapterRef("hub", f"org/{name}")


def test_a09_the_same_id_from_two_sources_is_two_adapters(
    hub: HubServer,
    make_server: Callable[..., AdapterServer],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    make_adapter("org/same", seed=1)
    hub.commit("org/same", read_files(make_adapter("other", seed=2)))
    server = make_server(adapter_roots=str(tmp_path))
    refs = [AdapterRef("hub", "org/same"), AdapterRef("local", "org/same")]
    for ref in refs:
        server.get(ref)
    slots = [server.manager.activate(ref) for ref in refs]
    assert len({server.manager.cache_key(ref) for ref in refs}) == 2
    pages = [server.arena.pages[server.arena.slot_pages[slot][0]] for slot in slots]
    assert not torch.equal(*pages)


def test_a09_weights_that_change_between_their_naming_and_their_check_do_not_get_the_old_name(
    make_server: Callable[..., AdapterServer],
    make_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_adapter(seed=1)
    changes = [2]

    inspect = AdapterInspector.inspect

    def meanwhile(*arguments: Any) -> Any:
        if changes:
            make_adapter(seed=changes.pop(), lora_alpha=3)
        return inspect(*arguments)

    monkeypatch.setattr(AdapterInspector, "inspect", meanwhile)
    server = make_server()
    ref = AdapterRef("local", str(folder))
    assert "changed" in server.error(ref).message
    server.get(ref)


def test_a10_records_of_adapters_nobody_needs_do_not_pile_up(
    make_server: Callable[..., AdapterServer], tiny: Base, make_adapter: Callable[..., Path]
) -> None:
    server, page_bytes = make_server(num_pages=2), tiny.layout.page_size * 4
    folder = make_adapter()
    for number in range(30):
        link = folder.with_name(f"link{number}")
        link.symlink_to(folder)
        server.manager.release(server.get(AdapterRef("local", str(link))))
        server.error(AdapterRef("local", f"/no/such/{number}"))
    assert server.manager.stats()["known"] <= (64 << 20) // page_bytes
    assert not any(record.handles for record in server.manager._loading.records.values())


def test_a49_a_client_that_has_gone_when_its_adapter_fails_stops_no_other_load(
    hub: HubServer, make_server: Callable[..., AdapterServer], files: dict[str, bytes]
) -> None:
    release = threading.Event()
    hub.commit("org/bad", {**files, "adapter_model.safetensors": b"broken"})
    hub.commit("org/good", files)
    hub.add_fault("GET /org/bad/resolve", hold=release)
    server = make_server()
    gone = server.ask(hub_ref("bad"))
    server.manager.release(gone)  # perhaps before its download has begun, perhaps after
    release.set()
    server.get(hub_ref("good"))
    assert gone not in server.failed
    assert isinstance(server.error(hub_ref("bad")), AdapterIncompatibleError)


def test_a51_slow_downloads_delay_no_other_even_when_all_threads_have_one(
    hub: HubServer,
    make_server: Callable[..., AdapterServer],
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorax_backend.adapters.loader._PATIENCE_S", 0.05)
    release = threading.Event()
    for number in range(5):
        hub.commit(f"org/slow{number}", files)
        hub.add_fault(f"GET /org/slow{number}/resolve", hold=release)
    hub.commit("org/quick", files)
    server = make_server(adapter_loader_threads=2)
    slow = [server.ask(hub_ref(f"slow{number}")) for number in range(5)]
    server.get(hub_ref("quick"))
    assert not any(server.ready(handle, hub_ref(f"slow{number}")) for number, handle in enumerate(slow))
    release.set()
    server.until(lambda: all(server.ready(h, hub_ref(f"slow{n}")) for n, h in enumerate(slow)))


def test_a52_an_adapter_too_big_for_the_moment_is_passed_by_smaller_ones(
    make_server: Callable[..., AdapterServer], make_adapter: Callable[..., Path]
) -> None:
    server = make_server(num_pages=3)
    refs = {
        name: AdapterRef("local", str(make_adapter(name, rank=rank)))
        for name, rank in (("used", 8), ("other", 8), ("big", 24), ("small", 8))
    }
    for ref in refs.values():
        server.get(ref)
    assert server.manager.activate(refs["used"]) is not None
    assert server.manager.activate(refs["big"]) is None, "room for it must be waited for"
    assert server.manager.activate(refs["small"]) is not None


def test_a54_pages_are_given_to_the_next_only_when_they_are_free(
    make_server: Callable[..., AdapterServer], make_adapter: Callable[..., Path]
) -> None:
    server = make_server(num_pages=1)
    first, second = (AdapterRef("local", str(make_adapter(name, seed=n))) for n, name in enumerate("ab"))
    for ref in (first, second):
        server.get(ref)
    slot = server.manager.activate(first)
    before = server.arena.pages.clone()
    assert server.manager.activate(second) is None
    assert torch.equal(server.arena.pages, before)
    server.manager.deactivate(first)
    assert server.manager.activate(second) == slot
    assert not torch.equal(server.arena.pages, before)


def test_a55_the_least_recently_used_leaves_not_the_first_activated(
    make_server: Callable[..., AdapterServer], make_adapter: Callable[..., Path]
) -> None:
    server = make_server(num_pages=2)
    a, b, c = (AdapterRef("local", str(make_adapter(name))) for name in "abc")
    for ref in (a, b, a, c):
        handle = server.get(ref)
        assert server.manager.activate(ref) is not None
        server.manager.deactivate(ref)
        server.manager.release(handle)
    assert server.manager.is_on_device(a)
    assert not server.manager.is_on_device(b)


def test_a59_an_adapter_evicted_from_the_device_comes_back_from_host_memory(
    hub: HubServer, make_server: Callable[..., AdapterServer], files: dict[str, bytes]
) -> None:
    for name in "ab":
        hub.commit(f"org/{name}", files)
    server = make_server(num_pages=1)
    for name in "abab":
        handle = server.get(hub_ref(name))
        assert server.manager.activate(hub_ref(name)) is not None
        server.manager.deactivate(hub_ref(name))
        server.manager.release(handle)
    stats = server.manager.stats()
    assert stats["tier_loads"] == {"device": 4, "host": 2, "disk": 2}
    assert stats["tier_hits"] == {"device": 0, "host": 2, "disk": 0, "remote": 2}
    assert hub.count("GET /org/a/resolve") == 2, "two files, once"


def test_a59_a_restarted_server_finds_its_adapters_on_disk(
    hub: HubServer, make_server: Callable[..., AdapterServer], files: dict[str, bytes]
) -> None:
    hub.commit("org/a", files)
    make_server().get(hub_ref("a"))
    downloads = hub.count("resolve")
    again = make_server()
    assert [entry["tier"] for entry in again.manager.describe()] == ["disk"]
    again.get(hub_ref("a"))
    assert hub.count("resolve") == downloads
    assert again.manager.stats()["tier_hits"]["disk"] == 1


def test_a60_a_cached_private_adapter_looks_like_a_missing_one(
    hub: HubServer, make_server: Callable[..., AdapterServer], files: dict[str, bytes]
) -> None:
    server = make_server()
    missing = {token: server.error(hub_ref("private"), token).to_dict() for token in (None, "hf_thief")}
    server = make_server()
    hub.commit("org/private", files, token="hf_owner")
    owner = server.get(hub_ref("private"), "hf_owner")
    assert server.manager.activate(hub_ref("private")) is not None
    for token, error in missing.items():
        assert server.error(hub_ref("private"), token).to_dict() == error
    assert server.ready(owner, hub_ref("private"))
    assert "hf_" not in json.dumps(server.manager.stats()) + json.dumps(server.manager.describe())


def test_a61_pinned_adapters_and_dynamic_loading_live_together(
    hub: HubServer, make_server: Callable[..., AdapterServer], files: dict[str, bytes]
) -> None:
    for name in "abc":
        hub.commit(f"org/{name}", files)
    server = make_server(num_pages=2)
    answer = server.manager.control("adapter_preload", {"adapter_id": "hf://org/a", "pin": True})
    assert answer["status"] == "loading"
    server.until(lambda: server.manager.is_on_device(hub_ref("a")))
    for name in "bcbc":
        handle = server.get(hub_ref(name))
        assert server.manager.activate(hub_ref(name)) is not None
        server.manager.deactivate(hub_ref(name))
        server.manager.release(handle)
    assert server.manager.is_on_device(hub_ref("a"))


def test_200_clients_of_one_cold_private_adapter_are_one_download(
    hub: HubServer, make_server: Callable[..., AdapterServer], files: dict[str, bytes]
) -> None:
    hub.commit("org/private", files, token="hf_owner")
    server = make_server()
    handles = [server.ask(hub_ref("private"), "hf_owner" if n % 2 else "hf_thief") for n in range(200)]
    server.until(
        lambda: all(handle in server.failed or server.ready(handle, hub_ref("private")) for handle in handles)
    )
    assert len(server.failed) == 100
    assert {type(error) for error in server.failed.values()} == {AdapterNotFoundError}
    assert hub.count("GET /org/private/resolve") == 2
    assert hub.count("GET /api/models/org/private") <= 4


def test_an_adapter_with_nan_ends_only_its_own_requests(
    hub: HubServer,
    make_server: Callable[..., AdapterServer],
    files: dict[str, bytes],
    make_adapter: Callable[..., Path],
    tiny: Base,
) -> None:
    from adapter_files import lora_tensors

    tensors = lora_tensors(tiny.targets, ("model.layers.0.self_attn.q_proj",))
    next(iter(tensors.values()))[0, 0] = float("nan")
    broken = make_adapter("nan", modules=("model.layers.0.self_attn.q_proj",), tensors=tensors)
    hub.commit("org/nan", read_files(broken))
    hub.commit("org/good", files)
    server = make_server()
    assert "NaN" in server.error(hub_ref("nan")).message
    server.get(hub_ref("good"))
    server.manager.check()
    assert server.manager.stats()["host_bytes_used"] == tiny.layout.page_size * 4


class Gateway(ThreadingHTTPServer):
    """Answers by path; None is 404."""

    def __init__(self, answers: dict[str, Any]) -> None:
        gateway = self
        self.asked: list[tuple[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                token = self.headers.get("Authorization", "")
                gateway.asked.append((self.path, token))
                answer = answers.get(self.path) if token == "Bearer pb_owner" else None
                body = json.dumps(answer).encode()
                self.send_response(200 if answer is not None else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


def test_a05_a_gateway_says_where_an_adapter_lies_and_who_may_have_it(
    make_server: Callable[..., AdapterServer], files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3_server import S3Server

    answers = {
        "/v2/repos/shout/version/1": {"adapterPath": "runs/7", "status": "completed"},
        "/v2/repos/shout/version/2": {"status": "training"},
        "/v1/models/version/name/shout?version=0": {"uuid": "u", "bestRunID": "r"},
    }
    gateway = Gateway(answers)
    monkeypatch.setenv("PREDIBASE_GATEWAY_ENDPOINT", f"http://127.0.0.1:{gateway.server_port}")
    monkeypatch.setenv("PREDIBASE_MODEL_BUCKET", "adapters")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with S3Server() as s3:
        monkeypatch.setenv("S3_ENDPOINT_URL", s3.url)
        s3.reset()
        s3.put("adapters", "runs/7", files)
        s3.put("adapters", "u/r/artifacts/model/model_weights", files)
        server = make_server()
        refs = {version: AdapterRef("pbase", f"shout/{version}") for version in "0123"}
        server.get(refs["1"], "pb_owner")
        server.get(refs["0"], "pb_owner")
        assert "not available yet (training)" in server.error(refs["2"], "pb_owner").message
        missing = server.error(refs["3"], "pb_thief").message
        assert server.error(refs["1"], "pb_thief").message == missing.replace("/3", "/1")
        assert isinstance(server.error(refs["1"]), AdapterNotFoundError), "without a token"
    gateway.shutdown()
    gateway.server_close()
    monkeypatch.setenv("PREDIBASE_GATEWAY_ENDPOINT", "http://127.0.0.1:9")
    from lorax_backend.adapters.sources.pbase import PbaseSource

    source = PbaseSource(None, attempts=1)  # type: ignore[arg-type]
    with pytest.raises(AdapterDownloadError, match="did not answer"):
        source.authorize(refs["1"], "pb_owner")
