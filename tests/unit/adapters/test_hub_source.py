"""Adapters on a hub, over real HTTP."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_files import read_files
from hub_server import HubServer

from lorax_backend.adapters.sources.hub import HubSource
from lorax_backend.errors import (
    AdapterDownloadError,
    AdapterError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    AdapterUnauthorizedError,
    ValidationError,
)
from lorax_backend.serving.adapter_templates import AdapterTemplates
from lorax_backend.types import AdapterRef

TOKEN = "hf_the-secret-of-the-owner"
REF = AdapterRef("hub", "org/adapter")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def files(make_adapter: Callable[..., Path]) -> dict[str, bytes]:
    folder = make_adapter()
    return {**read_files(folder), "README.md": b"# hello", "optimizer.pt": b"0" * 1000}


@pytest.fixture
def source(tmp_path: Path) -> HubSource:
    return HubSource(cache_dir=str(tmp_path / "cache"), sleep=lambda seconds: None)


def failure(
    source: HubSource, kind: type[AdapterError], ref: AdapterRef = REF, token: str | None = None
) -> str:
    with pytest.raises(AdapterError) as caught:
        source.fetch(ref, token)
    assert type(caught.value) is kind, caught.value
    assert TOKEN not in caught.value.message
    return caught.value.message


def test_only_the_needed_files_are_downloaded(
    hub: HubServer, files: dict[str, bytes], source: HubSource
) -> None:
    commit = hub.commit(REF.id, files)
    fetched = source.fetch(REF, None)
    assert sorted(path.name for path in fetched.folder.iterdir()) == ["adapter_config.json", WEIGHTS]
    assert (fetched.folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert fetched.revision == commit
    assert fetched.public
    assert hub.count("README") == hub.count("optimizer") == 0


def test_a_cached_adapter_costs_one_request(
    hub: HubServer, files: dict[str, bytes], source: HubSource
) -> None:
    hub.commit(REF.id, files)
    first = source.fetch(REF, None)
    hub.requests.clear()
    assert source.fetch(REF, None) == first
    assert [(method, path) for method, path, _ in hub.requests] == [
        ("GET", "/api/models/org/adapter/revision/main")
    ]


def test_a_new_commit_is_another_revision(hub: HubServer, files: dict[str, bytes], source: HubSource) -> None:
    first = hub.commit(REF.id, files)
    assert source.fetch(REF, None).revision == first
    changed = {**files, "adapter_config.json": files["adapter_config.json"] + b"\n"}
    second = hub.commit(REF.id, changed)
    fetched = source.fetch(REF, None)
    assert fetched.revision == second != first
    assert (fetched.folder / "adapter_config.json").read_bytes() == changed["adapter_config.json"]


def test_a_revision_is_taken_from_the_id_or_beside_it(
    hub: HubServer, files: dict[str, bytes], source: HubSource
) -> None:
    main = hub.commit(REF.id, files)
    other = hub.commit(REF.id, {**files, "adapter_config.json": b"{}"}, branch="v2")
    assert source.fetch(AdapterRef("hub", "org/adapter@v2"), None).revision == other
    assert source.fetch(AdapterRef("hub", "org/adapter", "v2"), None).revision == other
    assert source.fetch(AdapterRef("hub", f"org/adapter@{main}"), None).revision == main
    assert source.canonical(AdapterRef("hub", "org/adapter@v2")) == AdapterRef("hub", "org/adapter", "v2")
    with pytest.raises(ValidationError, match="give one"):
        source.canonical(AdapterRef("hub", "org/adapter@v2", "v3"))


@pytest.mark.parametrize(
    "bad", ["", "@v1", "a/b/c", "../../etc/passwd", "org/ad apter", "org/--x..y", "/abs/path"]
)
def test_an_id_that_is_no_repository_is_refused_without_asking(
    bad: str, hub: HubServer, source: HubSource
) -> None:
    with pytest.raises(ValidationError, match="adapter_id"):
        source.canonical(AdapterRef("hub", bad))
    assert not hub.requests


def test_what_is_missing_is_said(hub: HubServer, files: dict[str, bytes], source: HubSource) -> None:
    assert "org/adapter" in failure(source, AdapterNotFoundError)
    hub.commit(REF.id, files)
    assert "'v9'" in failure(source, AdapterNotFoundError, AdapterRef("hub", "org/adapter", "v9"))
    hub.commit("org/model", {"config.json": b"{}", "model.safetensors": b""})
    assert "adapter_config.json" in failure(source, AdapterNotFoundError, AdapterRef("hub", "org/model"))
    hub.commit("org/empty", {"adapter_config.json": b"{}", "sub/adapter_model.safetensors": b""})
    assert WEIGHTS in failure(source, AdapterNotFoundError, AdapterRef("hub", "org/empty"))


def test_a_pickle_is_not_even_downloaded(hub: HubServer, source: HubSource) -> None:
    hub.commit(REF.id, {"adapter_config.json": b"{}", "adapter_model.bin": b"cos\nsystem"})
    assert "pickle" in failure(source, AdapterIncompatibleError)
    assert hub.count("resolve") == 0


def test_a_whole_model_in_adapters_clothes_is_not_downloaded(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.commit(REF.id, {**files, WEIGHTS: b"0" * 5000})
    message = failure(HubSource(cache_dir=str(tmp_path / "cache"), max_bytes=4000), AdapterTooLargeError)
    assert "4000" in message
    assert hub.count("resolve") == 0


def test_a_private_adapter_needs_its_token(
    hub: HubServer, files: dict[str, bytes], source: HubSource
) -> None:
    hub.commit(REF.id, files, token=TOKEN)
    assert "api_token" in failure(source, AdapterNotFoundError)
    assert "may not read" in failure(source, AdapterNotFoundError, token="hf_wrong")
    fetched = source.fetch(REF, TOKEN)
    assert not fetched.public
    assert (fetched.folder / WEIGHTS).is_file()


def test_a_cached_private_adapter_still_needs_its_token(
    hub: HubServer, files: dict[str, bytes], source: HubSource
) -> None:
    hub.commit(REF.id, files, token=TOKEN)
    source.fetch(REF, TOKEN)
    failure(source, AdapterNotFoundError)
    failure(source, AdapterNotFoundError, token="hf_wrong")
    source.authorize(REF, TOKEN)
    with pytest.raises(AdapterNotFoundError):
        source.authorize(REF, "hf_wrong")


def test_a_gated_adapter_needs_a_token_that_was_let_in(
    hub: HubServer, files: dict[str, bytes], source: HubSource
) -> None:
    hub.commit(REF.id, files, token=TOKEN, gated=True)
    assert "gated" in failure(source, AdapterUnauthorizedError)
    assert not source.fetch(REF, TOKEN).public
    failure(source, AdapterUnauthorizedError)
    with pytest.raises(AdapterUnauthorizedError):
        source.authorize(REF, "hf_wrong")
    source.authorize(REF, TOKEN)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_reads_like_a_missing_adapter(
    status: int, hub: HubServer, files: dict[str, bytes], source: HubSource
) -> None:
    missing = failure(source, AdapterNotFoundError, token="hf_wrong")
    hub.commit(REF.id, files)
    hub.add_fault("api/models", status=status)
    assert failure(source, AdapterNotFoundError, token="hf_wrong") == missing


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_the_servers_token_is_used_only_if_the_server_says_so(
    name: str, hub: HubServer, files: dict[str, bytes], source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(REF.id, files, token=TOKEN)
    monkeypatch.setenv(name, TOKEN)
    failure(source, AdapterNotFoundError)
    assert all(token == "" for _, _, token in hub.requests)
    assert source.credential(None) == ""
    monkeypatch.setenv("LORAX_USE_GLOBAL_HF_TOKEN", "1")
    assert source.fetch(REF, None).folder.is_dir()
    assert source.credential(None) == source.credential(TOKEN) != source.credential("hf_other")
    failure(source, AdapterNotFoundError, token="hf_wrong")


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("step", ["GET /api/models", "HEAD /org/adapter/resolve", "GET /org/adapter/resolve"])
def test_a_passing_fault_is_retried(
    status: int, step: str, hub: HubServer, files: dict[str, bytes], source: HubSource
) -> None:
    hub.commit(REF.id, files)
    hub.add_fault(step, status=status)
    assert (source.fetch(REF, None).folder / WEIGHTS).read_bytes() == files[WEIGHTS]


@pytest.mark.parametrize("status", [429, 500])
def test_a_lasting_fault_is_told_as_one_worth_retrying(
    status: int, hub: HubServer, files: dict[str, bytes], source: HubSource
) -> None:
    hub.commit(REF.id, files)
    hub.add_fault("GET /api/models", times=50, status=status)
    assert str(status) in failure(source, AdapterDownloadError)
    assert hub.count("GET /api/models") == source.attempts


def test_retries_end_with_the_time_allowed(hub: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add_fault("GET /api/models", times=50, status=500)
    source = HubSource(cache_dir=str(tmp_path), deadline_s=0.0, sleep=lambda seconds: pytest.fail("slept"))
    failure(source, AdapterDownloadError)
    assert hub.count("GET /api/models") == 1


def test_a_file_cut_short_is_taken_up_where_it_ended(
    hub: HubServer, files: dict[str, bytes], source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50)
    hub.commit(REF.id, files)
    hub.add_fault(f"GET /org/adapter/resolve/{hub.repositories[REF.id].branches['main']}/{WEIGHTS}", cut=100)
    assert (source.fetch(REF, None).folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert [asked for path, asked in hub.ranges if path.endswith(WEIGHTS)] == ["", "bytes=100-"]


def test_another_process_takes_up_what_broke_off(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50)
    hub.commit(REF.id, files)
    commit = hub.repositories[REF.id].branches["main"]
    hub.add_fault(f"GET /org/adapter/resolve/{commit}/{WEIGHTS}", cut=100)
    hub.add_fault(f"GET /org/adapter/resolve/{commit}/{WEIGHTS}", times=50, status=503)
    failure(
        HubSource(cache_dir=str(tmp_path / "c"), attempts=1, sleep=lambda seconds: None), AdapterDownloadError
    )
    hub.faults.clear()
    hub.ranges.clear()
    later = HubSource(cache_dir=str(tmp_path / "c"))
    assert (later.fetch(REF, None).folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert [asked for path, asked in hub.ranges if path.endswith(WEIGHTS)] == ["bytes=100-"]


def test_a_hub_that_is_not_there_is_told(
    hub: HubServer, source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "could not be reached" in failure(source, AdapterDownloadError)


def test_offline_a_warm_cache_is_enough(
    hub: HubServer, files: dict[str, bytes], source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit(REF.id, files)
    tagged = hub.commit(REF.id, {**files, "adapter_config.json": b"{}"}, branch="v2")
    online = source.fetch(REF, None)
    source.fetch(AdapterRef("hub", REF.id, "v2"), None)
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert source.fetch(REF, None) == online
    assert source.fetch(AdapterRef("hub", REF.id, commit), None).revision == commit
    assert source.fetch(AdapterRef("hub", REF.id, "v2"), None).revision == tagged
    source.authorize(REF, "any")
    assert "HF_HUB_OFFLINE" in failure(source, AdapterDownloadError, AdapterRef("hub", "org/other"))
    assert not hub.requests


def test_tokens_are_in_no_log_repr_or_error(
    hub: HubServer, files: dict[str, bytes], source: HubSource, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.commit(REF.id, files, token="hf_other")
    hub.add_fault("api/models", times=2, status=500)
    message = failure(source, AdapterNotFoundError, token=TOKEN)
    assert any(token == TOKEN for _, _, token in hub.requests), "it was sent to the hub"
    assert TOKEN not in caplog.text + message + repr(source) + source.credential(TOKEN)


def test_many_threads_fetching_one_adapter_get_the_same_files(
    hub: HubServer, files: dict[str, bytes], source: HubSource
) -> None:
    hub.commit(REF.id, files)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(source.fetch(REF, None))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 6
    assert len(set(map(str, found))) == 1
    assert json.loads((found[0].folder / "adapter_config.json").read_bytes())["peft_type"] == "LORA"


def test_a_chat_template_comes_along_and_is_found_there(
    hub: HubServer, source: HubSource, files: dict[str, bytes]
) -> None:
    template = b'{"chat_template": "own: {{ messages[0].content }}"}'
    hub.commit(REF.id, {**files, "tokenizer_config.json": template, "tokenizer.json": b"{}"})

    templates = AdapterTemplates(lambda: {"hub": source}, {})
    found = templates.get(REF, None)

    assert found is not None
    assert found.render([{"role": "user", "content": "hi"}]) == "own: hi"
    templates.close()
    assert hub.count("tokenizer.json") == 0
    downloads = hub.count("tokenizer_config.json")
    assert downloads > 0
    source.fetch(REF, None)  # as the engine does afterwards
    assert hub.count("tokenizer_config.json") == downloads
