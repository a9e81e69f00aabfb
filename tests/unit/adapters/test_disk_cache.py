"""The disk tier: a budget, an order that survives restarts, and nothing removed under a reader."""

from __future__ import annotations

import gc
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from adapter_files import read_files
from hub_server import HubServer
from small_disk import small_files

from lorax_backend.adapters import disk_files, disk_locks
from lorax_backend.adapters.disk_cache import DiskCache, DiskLease
from lorax_backend.adapters.sources.hub import HubSource
from lorax_backend.adapters.sources.registry import create_disk_cache
from lorax_backend.config import ServerConfig
from lorax_backend.errors import AdapterDownloadError, AdapterTooLargeError
from lorax_backend.types import AdapterRef

SIZE = 1000


def store(cache: DiskCache, name: str, age_s: float = 0.0, revision: str = "r1") -> Path:
    """An adapter of SIZE bytes, as a source leaves it there, last used some time ago."""
    repository = cache.repository("s3", name)
    folder = repository / "snapshots" / revision
    with cache.writing(repository, SIZE, name):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_bytes(b"{}")
        (folder / "adapter_model.safetensors").write_bytes(b"0" * (SIZE - 2))
        assert cache.lease("s3", name, folder) is not None
    if age_s:
        used = time.time() - age_s
        cache._entries[folder].last_used = used
        os.utime(folder, (used, used))
    return folder


def names(cache: DiskCache) -> list[str]:
    return [entry["id"] for entry in cache.entries()]


def test_the_least_recently_used_leave_when_the_budget_is_reached(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 3 * SIZE)
    folders = {name: store(cache, name, age_s=100 - 10 * index) for index, name in enumerate("abc")}
    lease = cache.lease("s3", "a", folders["a"])
    del lease
    store(cache, "d")
    assert names(cache) == ["d", "a", "c"]
    assert not folders["b"].parent.parent.exists()
    assert cache.stats() == {"bytes_total": 3 * SIZE, "bytes_used": 3 * SIZE, "entries": 3, "evictions": 1}


def test_the_order_survives_a_restart(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 3 * SIZE)
    for index, name in enumerate("abc"):
        store(cache, f"team/{name}", age_s=10 + 10 * index)
    again = DiskCache(tmp_path, 3 * SIZE)
    assert again.entries() == cache.entries()
    store(again, "d")
    assert names(again) == ["d", "team/a", "team/b"]


def test_what_somebody_reads_or_writes_stays(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 2 * SIZE)
    folder = store(cache, "a", age_s=100)
    lease: DiskLease | None = cache.lease("s3", "a", folder)
    cache._entries[folder].last_used = 0.0
    os.utime(folder, (0, 0))
    store(cache, "b", age_s=50)
    store(cache, "c")
    assert names(cache) == ["c", "a"]
    assert cache.purge() == SIZE
    assert names(cache) == ["a"]
    del lease
    assert cache.purge() == SIZE
    assert list((tmp_path / "s3").iterdir()) == []


def test_what_another_process_has_just_used_stays(tmp_path: Path) -> None:
    cache, other = DiskCache(tmp_path, 2 * SIZE), DiskCache(tmp_path, 2 * SIZE)
    folder = store(cache, "a", age_s=100)
    store(cache, "b", age_s=50)
    other._scan()
    other.lease("s3", "a", folder)
    store(cache, "c")
    assert "a" in names(cache)
    assert "b" not in names(cache)


def test_a_repository_in_which_another_process_writes_is_not_removed_from_under_it(tmp_path: Path) -> None:
    """Its last old revision would go, and the files of the new one with it."""
    ours, other = DiskCache(tmp_path, 9 * SIZE), DiskCache(tmp_path, 9 * SIZE)
    old = store(other, "a", age_s=1000)
    ours._scan()
    with ours.writing(ours.repository("s3", "a"), SIZE, "a"):
        part = old.with_name("r2.part")
        part.mkdir()
        (part / "adapter_config.json").write_bytes(b"{}")
        assert other.purge() == 0
        assert names(other) == ["a"], "known again"
        assert (part / "adapter_config.json").exists()
    assert other.purge() == SIZE


def test_what_another_process_has_read_for_long_stays(tmp_path: Path) -> None:
    ours, other = DiskCache(tmp_path, 9 * SIZE), DiskCache(tmp_path, 9 * SIZE)
    folder = store(other, "a")
    lease: DiskLease | None = ours.lease("s3", "a", folder)
    os.utime(folder, (1, 1))  # it began long ago
    other._entries[folder].last_used = 1.0
    assert other.purge() == 0
    assert (folder / "adapter_config.json").exists()
    del lease
    assert other.purge() == SIZE
    assert ours.lease("s3", "a", folder) is None
    assert names(ours) == []


def test_locks_of_readers_are_few_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_locks, "_MAX_LEASED", 2)
    cache = DiskCache(tmp_path, 9 * SIZE)
    folders = [store(cache, name) for name in "abcd"]
    before = len(os.listdir("/proc/self/fd"))
    leases = [cache.lease("s3", name, folder) for name, folder in zip("abcd", folders, strict=True)]
    assert all(leases)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    assert cache.purge() == 0
    leases.clear()
    assert cache._locks.num_leased == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_cache_that_cannot_be_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store(DiskCache(tmp_path, 9 * SIZE), "a")

    def read_only(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(os, "utime", read_only)
    cache = DiskCache(tmp_path, 9 * SIZE)
    assert cache.lease("s3", "a", folder) is not None
    assert cache._locks.num_leased == 0


def test_a_removal_that_broke_off_is_ended_by_the_next(tmp_path: Path) -> None:
    folder = store(DiskCache(tmp_path, 9 * SIZE), "a")
    doomed = folder.with_name("r1.removed")
    shutil.copytree(folder, doomed)
    cache = DiskCache(tmp_path, 9 * SIZE)
    assert [entry["revision"] for entry in cache.entries()] == ["r1"]
    assert not doomed.exists()
    shutil.copytree(folder, doomed)  # of another process that has ended since
    assert cache.purge() == SIZE
    assert list((tmp_path / "s3").iterdir()) == []


def test_an_adapter_on_its_way_out_is_not_handed_to_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DiskCache(tmp_path, 2 * SIZE)
    folder = store(cache, "a", age_s=100)
    begun, go_on = threading.Event(), threading.Event()

    def slow_removal(folder: Path) -> None:
        begun.set()
        assert go_on.wait(10)
        shutil.rmtree(folder.parent.parent)

    monkeypatch.setattr(disk_files, "remove_snapshot", slow_removal)
    with ThreadPoolExecutor() as pool:
        purge = pool.submit(cache.purge)
        assert begun.wait(10)
        lease = pool.submit(cache.lease, "s3", "a", folder)
        download = pool.submit(store, cache, "a")
        store(cache, "b")
        assert not lease.done(), "it would read files that are being removed"
        assert not download.done(), "it would write into a folder that is being removed"
        go_on.set()
        assert purge.result() == SIZE
        assert download.result() == folder
    assert (folder / "adapter_config.json").exists()
    assert sorted(names(cache)) == ["a", "b"]


def test_many_readers_of_a_cache_too_small_for_them_always_find_whole_adapters(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 3 * SIZE)

    def read(number: int) -> int:
        name = f"a{number % 7}"
        repository = cache.repository("s3", name)
        folder = repository / "snapshots" / "r1"
        with locks[name]:
            lease = cache.lease("s3", name, folder)
            while lease is None:
                with cache.writing(repository, SIZE, name):
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "adapter_model.safetensors").write_bytes(b"0" * (SIZE - 2))
                    (folder / "adapter_config.json").write_bytes(b"{}")
                lease = cache.lease("s3", name, folder)
        size = sum(len(file.read_bytes()) for file in folder.iterdir())
        del lease
        return size

    locks = {f"a{number}": threading.Lock() for number in range(7)}
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, random.Random(1).choices(range(7), k=1500))) == {SIZE}
    assert cache.stats()["evictions"] > 0


def test_an_adapter_larger_than_the_budget_is_refused_before_its_download(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, SIZE)
    store(cache, "a")
    with pytest.raises(AdapterTooLargeError, match="adapter_disk_bytes"), cache.writing(tmp_path, 2 * SIZE):
        pass
    assert names(cache) == ["a"]


def test_downloads_that_broke_off_long_ago_are_removed_and_recent_ones_are_kept(tmp_path: Path) -> None:
    snapshots = tmp_path / "s3" / "x" / "snapshots"
    for name, age_s in (("old.part", 100000), ("new.part", 10)):
        (snapshots / name).mkdir(parents=True)
        os.utime(snapshots / name, (time.time() - age_s,) * 2)
    DiskCache(tmp_path, SIZE)
    assert [path.name for path in snapshots.iterdir()] == ["new.part"]


def test_a_purge_of_one_adapter_leaves_the_others(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 9 * SIZE)
    for name in "ab":
        store(cache, name)
    store(cache, "a", revision="r2")
    assert cache.purge("s3", "a") == 2 * SIZE
    assert names(cache) == ["b"]
    assert cache.purge("hub", "b") == 0


def test_a_server_without_a_cache_folder_starts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = create_disk_cache(ServerConfig())
    assert cache.root.parent == tmp_path
    assert "are lost" in caplog.text
    with pytest.raises(ValueError, match="adapter_disk_cache"):
        create_disk_cache(ServerConfig(adapter_disk_cache=str(tmp_path / "file" / "x")))


# With the hub's own layout


@pytest.fixture
def files(make_adapter: Callable[..., Path]) -> dict[str, bytes]:
    return read_files(make_adapter())


def hub_source(cache: DiskCache, **options: object) -> HubSource:
    folder = str(cache.folder("hub"))
    return HubSource(cache_dir=folder, disk=cache, sleep=lambda seconds: None, **options)  # type: ignore[arg-type]


def test_hub_adapters_are_counted_found_after_a_restart_and_evicted(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    size = sum(map(len, files.values()))
    for number in range(3):
        hub.commit(f"org/a{number}", {**files, "adapter_config.json": files["adapter_config.json"]})
    cache = DiskCache(tmp_path / "disk", 2 * size + 10)
    for number in range(2):
        assert not hub_source(cache).fetch(AdapterRef("hub", f"org/a{number}"), None).cached
    gc.collect()
    again = DiskCache(tmp_path / "disk", 2 * size + 10)
    assert sorted(names(again)) == ["org/a0", "org/a1"]
    assert hub_source(again).fetch(AdapterRef("hub", "org/a0"), None).cached
    for entry in again._entries.values():  # as if it were a while ago
        entry.last_used -= 100 if entry.adapter_id == "org/a0" else 200
        os.utime(entry.folder, (entry.last_used,) * 2)
    hub_source(again).fetch(AdapterRef("hub", "org/a2"), None)
    assert sorted(names(again)) == ["org/a0", "org/a2"]
    assert not (tmp_path / "disk" / "hub" / "models--org--a1").exists(), "blobs too"


def test_one_revision_of_a_repository_can_go_without_the_files_it_shares(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    cache = DiskCache(tmp_path / "disk", 1 << 30)
    source = hub_source(cache)
    hub.commit("org/a", files)
    first = source.fetch(AdapterRef("hub", "org/a"), None).folder
    hub.commit("org/a", {**files, "adapter_config.json": files["adapter_config.json"] + b"\n"})
    second = source.fetch(AdapterRef("hub", "org/a"), None).folder
    gc.collect()
    entry = cache._entries.pop(first)
    disk_files.remove_snapshot(entry.folder)
    assert (second / "adapter_model.safetensors").read_bytes() == files["adapter_model.safetensors"]
    assert len(list((second.parent.parent / "blobs").iterdir())) == 2


def test_a_cached_file_cut_short_is_downloaded_again(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.commit("org/a", files)
    source = hub_source(DiskCache(tmp_path / "disk", 1 << 30))
    folder = source.fetch(AdapterRef("hub", "org/a"), None).folder
    weights = folder / "adapter_model.safetensors"
    weights.resolve().write_bytes(files[weights.name][:-5])
    fetched = source.fetch(AdapterRef("hub", "org/a"), None)
    assert not fetched.cached
    assert (fetched.folder / weights.name).read_bytes() == files[weights.name]


@pytest.mark.parametrize(
    ("place", "times"),
    [("adapter_config.json", 1), ("adapter_model.safetensors", 1), ("adapter_model.safetensors", 9)],
)
def test_a_hub_repository_removed_between_its_files_is_downloaded_again_a_few_times(
    place: str,
    times: int,
    hub: HubServer,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lorax_backend.adapters.sources import hub as module

    hub.commit("org/a", files)
    download, left = module.hf_hub_download, [times]

    def removed_between(*args: object, **options: object) -> str:
        path = download(*args, **options)  # type: ignore[arg-type]
        if args[1] == place and options["revision"] != "main" and left[0]:
            left[0] -= 1
            shutil.rmtree(tmp_path / "disk" / "hub" / "models--org--a")
        return path  # type: ignore[return-value]

    monkeypatch.setattr(module, "hf_hub_download", removed_between)
    source = hub_source(DiskCache(tmp_path / "disk", 1 << 30))
    if times == 1:
        fetched = source.fetch(AdapterRef("hub", "org/a"), None)
        assert {path.name: path.read_bytes() for path in fetched.folder.iterdir()} == files
    else:
        with pytest.raises(AdapterDownloadError, match="removes its files"):
            source.fetch(AdapterRef("hub", "org/a"), None)


def test_a_full_disk_is_told_with_a_remedy(hub: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.commit("org/a", {**files, "adapter_model.safetensors": b"0" * 5000})
    source = hub_source(DiskCache(tmp_path / "disk", 1 << 30))
    with (
        small_files(),
        pytest.raises(AdapterDownloadError, match=r"could not be stored: .*adapter_disk_cache"),
    ):
        source.fetch(AdapterRef("hub", "org/a"), None)


def test_a_full_disk_costs_the_least_recently_used_their_place(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    cache = DiskCache(tmp_path / "disk", 1 << 30)
    for index, name in enumerate("abcd"):
        store(cache, name, age_s=100 - index)
    hub.commit("org/full", files)
    from lorax_backend.adapters.sources import hub as module

    download, failures = module.hf_hub_download, [OSError(errno.ENOSPC, "No space left on device")]

    def full_once(*args: object, **options: object) -> str:
        if failures and args[0] == "org/full":
            raise failures.pop()
        return download(*args, **options)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(module, "hf_hub_download", full_once)
    assert hub_source(cache).fetch(AdapterRef("hub", "org/full"), None).folder.is_dir()
    assert "a" not in names(cache)
    assert {"b", "c", "d"} < set(names(cache))
