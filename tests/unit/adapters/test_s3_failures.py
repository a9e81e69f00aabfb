"""What goes wrong between a bucket and this machine's disk, over real HTTP, and what is left of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_files import read_files
from s3_server import S3Server
from small_disk import small_files

from lorax_backend.adapters.disk_cache import DiskCache
from lorax_backend.adapters.sources.s3 import S3Source
from lorax_backend.errors import AdapterDownloadError, AdapterError, AdapterNotFoundError
from lorax_backend.types import AdapterRef

REF = AdapterRef("s3", "s3://loras/team/shout")
WEIGHTS = "adapter_model.safetensors"
GET_WEIGHTS = f"GET /loras/team/shout/{WEIGHTS}"


@pytest.fixture
def files(s3: S3Server, make_adapter: Callable[..., Path]) -> dict[str, bytes]:
    """An adapter's, which are in the bucket."""
    files = read_files(make_adapter())
    s3.put("loras", "team/shout", files)
    return files


@pytest.fixture
def disk(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "disk", 1 << 30)


def source(disk: DiskCache, **options: Any) -> S3Source:
    return S3Source(disk, sleep=lambda seconds: None, **options)


def failure(source: S3Source, kind: type[AdapterError]) -> str:
    with pytest.raises(AdapterError) as caught:
        source.fetch(REF, None)
    assert type(caught.value) is kind, caught.value
    assert "the-secret" not in caught.value.message
    assert "127.0.0.1" not in caught.value.message
    return caught.value.message


def left(disk: DiskCache) -> list[str]:
    """The files of adapters on the disk, whole or in part."""
    return sorted(path.name for path in disk.root.glob("s3/*/snapshots/*/*"))


def test_a_download_that_trickles_ends_with_its_time_and_the_next_goes_on(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache
) -> None:
    enough = threading.Event()
    s3.add_fault(GET_WEIGHTS, trickle=enough)
    # On a busy machine the time may be over before the weights are asked for.
    for deadline_s in (0.3, 2.0, 10.0):
        begun = time.monotonic()
        message = failure(source(disk, deadline_s=deadline_s), AdapterDownloadError)
        assert f"within {deadline_s:g} s" in message
        if s3.count(GET_WEIGHTS):
            break
    assert time.monotonic() - begun < len(files[WEIGHTS]) * 0.02, "it did not wait for the file"
    assert disk.entries() == [], "half an adapter is none"
    enough.set()
    assert (source(disk).fetch(REF, None).folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    first, second = [asked for line, asked in s3.requests if line.startswith(GET_WEIGHTS)]
    assert first == ""
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) < len(files[WEIGHTS])


def test_a_server_that_cuts_every_answer_short_is_told_and_no_half_adapter_is_used(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache
) -> None:
    s3.add_fault(GET_WEIGHTS, times=3, cut=10)
    assert "broke off" in failure(source(disk, attempts=3), AdapterDownloadError)
    assert s3.count(GET_WEIGHTS) == 3
    assert disk.entries() == []


@pytest.mark.parametrize("cut", [None, 50])
def test_a_file_that_does_not_match_its_checksum_is_downloaded_anew(
    cut: int | None, s3: S3Server, files: dict[str, bytes], disk: DiskCache
) -> None:
    """Of the right length, it would be taken for whole by the next try."""
    s3.add_fault(GET_WEIGHTS, garble=True)
    if cut is not None:
        s3.add_fault(GET_WEIGHTS, cut=cut)
    assert (source(disk).fetch(REF, None).folder / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_an_object_changed_between_listing_and_download_is_never_mixed_with_the_old(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache
) -> None:
    new = {**files, WEIGHTS: files[WEIGHTS][:-1] + b"\0"}
    s3.add_fault(GET_WEIGHTS, first=lambda: s3.put("loras", "team/shout", new))
    assert "changed while" in failure(source(disk), AdapterDownloadError)
    assert s3.count(GET_WEIGHTS) == 1, "another try of the same would not help"
    assert left(disk) == []
    fetched = source(disk).fetch(REF, None)
    assert (fetched.folder / WEIGHTS).read_bytes() == new[WEIGHTS]


def test_an_object_changed_while_its_download_is_broken_off_is_never_mixed_with_the_old(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache
) -> None:
    new = {**files, WEIGHTS: files[WEIGHTS][:-1] + b"\0"}
    s3.add_fault(GET_WEIGHTS, cut=100)
    s3.add_fault(GET_WEIGHTS, first=lambda: s3.put("loras", "team/shout", new))
    assert "changed while" in failure(source(disk), AdapterDownloadError)
    assert left(disk) == []
    assert (source(disk).fetch(REF, None).folder / WEIGHTS).read_bytes() == new[WEIGHTS]


def test_an_object_deleted_between_listing_and_download_is_missing(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache
) -> None:
    def delete() -> None:
        s3.client.delete_object(Bucket="loras", Key=f"team/shout/{WEIGHTS}")

    s3.add_fault(GET_WEIGHTS, first=delete)
    failure(source(disk), AdapterNotFoundError)
    assert left(disk) == []


def test_a_full_disk_is_told_with_a_remedy_and_not_filled_further(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache
) -> None:
    s3.put("loras", "team/shout", {**files, WEIGHTS: b"0" * 5000})
    with small_files():
        message = failure(source(disk), AdapterDownloadError)
    assert "could not be stored" in message
    assert "adapter_disk_cache" in message
    assert left(disk) == [], "what has come is no use, and takes room"
    assert source(disk).fetch(REF, None).folder.is_dir(), "now that there is room"


def test_a_full_disk_costs_the_least_recently_used_their_place(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "new"):
        s3.put("loras", name, files)
        source(disk).fetch(AdapterRef("s3", f"s3://loras/{name}"), None)
    s3.put("loras", "team/shout", {**files, WEIGHTS: b"0" * 5000})
    with small_files():
        failure(source(disk), AdapterDownloadError)
    assert disk.entries() == [], "all that nobody uses made room, one after the other"
    assert disk.stats()["evictions"] == 2


def test_wrong_credentials_are_the_operators_and_tell_nothing_about_adapters(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(disk).fetch(REF, None)
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    message = failure(source(disk), AdapterDownloadError)
    assert "InvalidAccessKeyId" in message
    assert "AWS_ACCESS_KEY_ID" in message
    assert failure(S3Source(DiskCache(disk.root / "other", 1 << 30)), AdapterDownloadError) == message
    with pytest.raises(AdapterDownloadError, match="AWS_ACCESS_KEY_ID"):
        source(disk).authorize(REF, None)
    assert s3.count("GET /loras?list") == 4, "none was tried again"


def test_a_right_that_the_servers_keys_lack_reads_like_a_missing_adapter(
    s3: S3Server, files: dict[str, bytes], disk: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    iam = boto3.session.Session().client("iam", endpoint_url=s3.url)
    iam.create_user(UserName="server")
    key = iam.create_access_key(UserName="server")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    from lorax_backend.adapters.sources import s3 as module

    module._client.cache_clear()
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    refused = failure(source(disk), AdapterNotFoundError)
    rights = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [rights]})
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", float("inf"))
    iam.put_user_policy(UserName="server", PolicyName="p", PolicyDocument=policy)
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    assert source(disk).fetch(REF, None).folder.is_dir()
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", float("inf"))
    module._client.cache_clear()
    s3.reset()
    assert failure(source(disk), AdapterNotFoundError) == refused, "as if there were no such bucket"
    module._client.cache_clear()
