"""Adapters in S3 buckets, over real HTTP."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from adapter_files import read_files
from s3_server import S3Server

from lorax_backend.adapters.disk_cache import DiskCache
from lorax_backend.adapters.sources.s3 import S3Source, split_id
from lorax_backend.errors import (
    AdapterDownloadError,
    AdapterError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    ValidationError,
)
from lorax_backend.types import AdapterRef

REF = AdapterRef("s3", "s3://loras/team/shout")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def files(make_adapter: Callable[..., Path]) -> dict[str, bytes]:
    return {**read_files(make_adapter()), "optimizer.pt": b"0" * 1000}


@pytest.fixture
def disk(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "disk", 1 << 30)


@pytest.fixture
def source(disk: DiskCache) -> S3Source:
    return S3Source(disk, sleep=lambda seconds: None)


def failure(source: S3Source, kind: type[AdapterError], ref: AdapterRef = REF) -> str:
    with pytest.raises(AdapterError) as caught:
        source.fetch(ref, None)
    assert type(caught.value) is kind, caught.value
    assert "the-secret" not in caught.value.message
    assert "127.0.0.1" not in caught.value.message
    return caught.value.message


def test_only_the_adapters_files_are_downloaded(
    s3: S3Server, files: dict[str, bytes], source: S3Source
) -> None:
    s3.put("loras", "team/shout", files)
    fetched = source.fetch(REF, None)
    assert sorted(path.name for path in fetched.folder.iterdir()) == ["adapter_config.json", WEIGHTS]
    assert (fetched.folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert not fetched.cached
    again = source.fetch(REF, None)
    assert (again, again.cached) == (fetched, True)
    assert s3.count("GET /loras/team") == 2, "one download"


@pytest.mark.parametrize(
    ("adapter_id", "bucket", "folder", "expected"),
    [
        ("s3://loras/foobar", "", "", ("loras", "foobar")),
        ("s3://loras/foo/bar", "bucket", "", ("loras", "foo/bar")),
        ("loras/foo/bar", "", "", ("loras", "foo/bar")),
        ("loras/foo/bar/", "bucket", "", ("bucket", "loras/foo/bar")),
        ("loras/foo/bar", "bucket", "models", ("bucket", "models/loras/foo/bar")),
    ],
)
def test_ids_name_buckets_as_lorax_reads_them(
    adapter_id: str,
    bucket: str,
    folder: str,
    expected: tuple[str, str],
    s3: S3Server,
    source: S3Source,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if bucket:
        monkeypatch.setenv("PREDIBASE_MODEL_BUCKET", bucket)
        monkeypatch.setenv("PREDIBASE_MODEL_FOLDER", folder)
    assert split_id(adapter_id) == expected
    once = source.canonical(AdapterRef("s3", adapter_id))
    assert source.canonical(once) == once
    assert once.id == f"s3://{expected[0]}/{expected[1]}"


@pytest.mark.parametrize("bad", ["", "bucket", "s3://", "s3:///key", "bucket/", "s3://bucket/a\0b"])
def test_an_id_without_bucket_or_prefix_is_refused(bad: str, s3: S3Server, source: S3Source) -> None:
    with pytest.raises(ValidationError, match="adapter_id"):
        source.canonical(AdapterRef("s3", bad))


def test_a_prefix_finds_no_siblings(s3: S3Server, files: dict[str, bytes], source: S3Source) -> None:
    s3.put("loras", "run/10", files)
    s3.put("loras", "run/1", {**files, WEIGHTS: files[WEIGHTS] + b" ", "deep/x.safetensors": b""})
    fetched = source.fetch(AdapterRef("s3", "loras/run/1"), None)
    assert (fetched.folder / WEIGHTS).read_bytes() == files[WEIGHTS] + b" "
    failure(source, AdapterNotFoundError, AdapterRef("s3", "loras/run"))


@pytest.mark.parametrize("variable", ["S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_is_read_from_the_environment(
    variable: str,
    s3: S3Server,
    files: dict[str, bytes],
    source: S3Source,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lorax_backend.adapters.sources import s3 as module

    s3.put("loras", "team/shout", files)
    monkeypatch.delenv("S3_ENDPOINT_URL")
    monkeypatch.setenv(variable, s3.url)
    module._client.cache_clear()
    assert source.fetch(REF, None).folder.is_dir()
    module._client.cache_clear()
    monkeypatch.delenv(variable)
    monkeypatch.setenv("R2_ACCOUNT_ID", "account")
    assert module._endpoint() == "https://account.r2.cloudflarestorage.com"


def test_a_changed_object_is_another_revision(
    s3: S3Server, files: dict[str, bytes], source: S3Source
) -> None:
    s3.put("loras", "team/shout", files)
    first = source.fetch(REF, None)
    s3.put("loras", "team/shout", {**files, "adapter_config.json": files["adapter_config.json"] + b"\n"})
    second = source.fetch(REF, None)
    assert second.revision != first.revision
    assert first.folder.is_dir()
    pinned = AdapterRef("s3", REF.id, second.revision)
    assert source.fetch(pinned, None) == second
    former = source.fetch(AdapterRef("s3", REF.id, first.revision), None)
    assert (former, former.cached) == (first, True), "requests that began with it can end with it"
    for unknown in ("0" * 40, "main", f"../snapshots/{first.revision}"):
        assert "revision" in failure(source, AdapterNotFoundError, AdapterRef("s3", REF.id, unknown))


def test_a_missing_bucket_key_or_right_reads_the_same(
    s3: S3Server, files: dict[str, bytes], source: S3Source
) -> None:
    bucket = failure(source, AdapterNotFoundError)
    s3.put("loras", "team/shout", files)
    s3.add_fault("GET /loras", status=403)
    assert failure(source, AdapterNotFoundError) == bucket
    other = failure(source, AdapterNotFoundError, AdapterRef("s3", "s3://loras/team/none"))
    assert "does not exist" in other


def test_pickles_and_giants_are_not_downloaded(s3: S3Server, disk: DiskCache) -> None:
    s3.put("loras", "team/shout", {"adapter_config.json": b"{}", "adapter_model.bin": b"cos\nsystem"})
    assert "pickle" in failure(S3Source(disk), AdapterIncompatibleError)
    s3.put("loras", "big", {"adapter_config.json": b"{}", WEIGHTS: b"0" * 5000})
    message = failure(S3Source(disk, max_bytes=4000), AdapterTooLargeError, AdapterRef("s3", "loras/big"))
    assert "max_adapter_bytes" in message
    assert s3.count("GET /loras/team/shout/") == s3.count("GET /loras/big/") == 0


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("step", ["GET /loras?list", "GET /loras/team"])
def test_a_passing_fault_is_retried(
    status: int, step: str, s3: S3Server, files: dict[str, bytes], source: S3Source
) -> None:
    s3.put("loras", "team/shout", files)
    s3.add_fault(step, status=status)
    assert (source.fetch(REF, None).folder / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_lasting_fault_is_told_as_one_worth_retrying(s3: S3Server, disk: DiskCache) -> None:
    s3.put("loras", "x", {"a": b""})
    s3.add_fault("GET /loras?list", times=9, status=503)
    assert "503" in failure(S3Source(disk, attempts=2, sleep=lambda seconds: None), AdapterDownloadError)


def test_a_server_that_is_not_there_is_told(
    s3: S3Server, disk: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    source = S3Source(disk, attempts=2, sleep=lambda seconds: None)
    assert "could not be reached" in failure(source, AdapterDownloadError)


def test_a_file_cut_short_is_taken_up_where_it_ended(
    s3: S3Server, files: dict[str, bytes], source: S3Source
) -> None:
    s3.put("loras", "team/shout", files)
    s3.add_fault(f"GET /loras/team/shout/{WEIGHTS}", cut=100)
    assert (source.fetch(REF, None).folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    ranges = [asked for line, asked in s3.requests if line.startswith(f"GET /loras/team/shout/{WEIGHTS}")]
    assert ranges == ["", "bytes=100-"]


def test_another_process_takes_up_what_broke_off(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache
) -> None:
    s3.put("loras", "team/shout", files)
    s3.add_fault(f"GET /loras/team/shout/{WEIGHTS}", cut=100)
    failure(S3Source(disk, attempts=1), AdapterDownloadError)
    later = S3Source(DiskCache(disk.root, 1 << 30))
    assert (later.fetch(REF, None).folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert ("bytes=100-") in [asked for _, asked in s3.requests]


def test_many_threads_fetching_one_adapter_download_it_once(
    s3: S3Server, files: dict[str, bytes], source: S3Source
) -> None:
    s3.put("loras", "team/shout", files)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(source.fetch(REF, None))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 6
    assert s3.count(f"GET /loras/team/shout/{WEIGHTS}") == 1
    assert os.listdir(found[0].folder.parent) == [found[0].revision]


def test_two_servers_that_share_a_disk_cache_download_an_adapter_once(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache
) -> None:
    s3.put("loras", "team/shout", files)
    sources = [S3Source(DiskCache(disk.root, 1 << 30), deadline_s=30) for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda source: source.fetch(REF, None), sources))
    assert s3.count(f"GET /loras/team/shout/{WEIGHTS}") == 1
    assert sorted(adapter.cached for adapter in found) == [False, True, True, True]
    assert (found[0].folder / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_download_that_another_server_never_ends_is_told(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache
) -> None:
    s3.put("loras", "team/shout", files)
    release = threading.Event()
    s3.add_fault(f"GET /loras/team/shout/{WEIGHTS}", hold=release)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(S3Source(disk).fetch, REF, None)
        while not s3.count(f"GET /loras/team/shout/{WEIGHTS}"):
            assert not first.done()
        second = S3Source(DiskCache(disk.root, 1 << 30), deadline_s=0.2)
        assert "does not end" in failure(second, AdapterDownloadError)
        release.set()
        assert not first.result().cached
