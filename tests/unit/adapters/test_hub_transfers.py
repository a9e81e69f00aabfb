"""Files of a hub that come slowly or break off, over real HTTP, and what is left of them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_files import read_files
from adapter_server import AdapterServer
from filelock import FileLock
from hub_server import HubServer

from lorax_backend.adapters.disk_cache import DiskCache
from lorax_backend.adapters.sources.hub import HubSource
from lorax_backend.errors import AdapterDownloadError
from lorax_backend.types import AdapterRef

REF = AdapterRef("hub", "org/adapter")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def files(hub: HubServer, make_adapter: Callable[..., Path]) -> dict[str, bytes]:
    """An adapter's, which are on the hub."""
    files = read_files(make_adapter())
    hub.commit(REF.id, files)
    return files


@pytest.fixture
def disk(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "disk", 1 << 30)


def source(disk: DiskCache, **options: Any) -> HubSource:
    return HubSource(cache_dir=str(disk.folder("hub")), disk=disk, sleep=lambda seconds: None, **options)


def path_of(hub: HubServer, name: str) -> str:
    return f"GET /{REF.id}/resolve/{hub.repositories[REF.id].branches['main']}/{name}"


def ranges(hub: HubServer, name: str) -> list[str]:
    return [asked for path, asked in hub.ranges if path == f"{REF.id}/{name}"]


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_a_download_that_trickles_ends_with_its_time_and_the_next_goes_on(
    name: str, hub: HubServer, files: dict[str, bytes], disk: DiskCache
) -> None:
    enough = threading.Event()
    hub.add_fault(path_of(hub, name), trickle=enough)
    # On a busy machine the time may be over before the file is asked for.
    for deadline_s in (0.3, 2.0, 5.0):
        begun = time.monotonic()
        with pytest.raises(AdapterDownloadError, match=f"within {deadline_s:g} s"):
            source(disk, deadline_s=deadline_s).fetch(REF, None)
        if ranges(hub, name):
            break
    assert time.monotonic() - begun < len(files[name]) * 0.02, "it did not wait for the file"
    assert disk.entries() == [], "half an adapter is none"
    enough.set()
    fetched = source(disk).fetch(REF, None)
    assert {path.name: path.read_bytes() for path in fetched.folder.iterdir()} == files
    first, second = ranges(hub, name)
    assert first == ""
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) < len(files[name])


def test_a_server_lets_go_of_a_download_that_trickles_and_the_next_has_the_adapter(
    hub: HubServer, files: dict[str, bytes], make_server: Callable[..., AdapterServer]
) -> None:
    hub.add_fault(path_of(hub, WEIGHTS), trickle=threading.Event())
    for limit in (0.5, 3.0, 15.0):
        error = make_server(adapter_load_timeout_s=limit).error(REF)
        assert isinstance(error, AdapterDownloadError)
        assert f"{limit:g} s" in error.message
        if ranges(hub, WEIGHTS):
            break
    # It waits for the first server's thread, which must end too, and let go of the files.
    make_server().get(REF)
    assert len(ranges(hub, WEIGHTS)) == 2


def test_a_file_that_breaks_off_again_and_again_comes_as_long_as_each_try_brings_some_of_it(
    hub: HubServer, files: dict[str, bytes], disk: DiskCache
) -> None:
    hub.add_fault(path_of(hub, WEIGHTS), times=10, cut=100)
    fetched = source(disk, attempts=2).fetch(REF, None)
    assert (fetched.folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert ranges(hub, WEIGHTS) == ["", *(f"bytes={number}00-" for number in range(1, 11))]


def test_a_file_that_brings_nothing_is_given_up(
    hub: HubServer, files: dict[str, bytes], disk: DiskCache
) -> None:
    hub.add_fault(path_of(hub, WEIGHTS), times=10, cut=0)
    with pytest.raises(AdapterDownloadError, match="broke off"):
        source(disk, attempts=3).fetch(REF, None)
    assert len(ranges(hub, WEIGHTS)) == 3


def test_each_file_is_asked_for_once_and_described_once(
    hub: HubServer, files: dict[str, bytes], disk: DiskCache
) -> None:
    source(disk).fetch(REF, None)
    for name in files:
        assert hub.count(path_of(hub, name)) == 1
        assert hub.count(path_of(hub, name).replace("GET", "HEAD")) == 1


def test_a_download_that_somebody_else_does_not_end_is_told(
    hub: HubServer, files: dict[str, bytes], disk: DiskCache
) -> None:
    locks = disk.folder("hub") / ".locks" / f"models--{REF.id.replace('/', '--')}"
    locks.mkdir(parents=True)
    etag = hashlib.sha256(files[WEIGHTS]).hexdigest()
    with (
        FileLock(locks / f"{etag}.part.lock"),
        pytest.raises(AdapterDownloadError, match="somebody else's download"),
    ):
        source(disk, deadline_s=0.3).fetch(REF, None)
    assert source(disk).fetch(REF, None).folder.is_dir()
