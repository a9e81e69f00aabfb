"""Adapters in folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lorax_backend.adapters.sources.local import LocalSource
from lorax_backend.errors import AdapterNotFoundError, ValidationError
from lorax_backend.types import AdapterRef


def local(path: Path | str) -> AdapterRef:
    return AdapterRef("local", str(path))


def test_a_folder_is_used_where_it_lies(make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter()
    fetched = LocalSource().fetch(local(folder), None)
    assert fetched.folder == folder
    assert fetched.public


def test_all_spellings_of_a_folder_are_one_adapter(
    make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter("spelled")
    monkeypatch.chdir(folder.parent)
    spellings = [
        str(folder),
        f"{folder}/",
        "spelled",
        "./spelled/",
        "spelled/../spelled",
        f"{folder.parent}//spelled",
    ]
    assert {LocalSource().canonical(local(text)) for text in spellings} == {local(folder)}
    assert LocalSource().fetch(local("spelled"), None).folder == folder


def test_a_read_only_folder_is_enough(make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter()
    before = sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert LocalSource().fetch(local(folder), None).folder == folder
        assert sorted(path.name for path in folder.iterdir()) == before
    finally:
        folder.chmod(0o755)


def test_the_revision_follows_the_content(make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter()
    weights = folder / "adapter_model.safetensors"

    def revision() -> str:
        return LocalSource().fetch(local(folder), None).revision

    first = revision()
    assert revision() == first
    (folder / "README.md").write_text("not part of it")
    assert revision() == first
    make_adapter(seed=1)
    os.utime(weights, ns=(1, 1))
    second = revision()
    assert second != first, "weights of the same size, written later"
    make_adapter(seed=1, lora_alpha=3)
    os.utime(weights, ns=(1, 1))
    assert revision() not in (first, second), "another configuration"


def test_weights_written_again_with_the_same_size_and_time_are_another_revision(
    make_adapter: Callable[..., Path],
) -> None:
    folder = make_adapter(seed=1)
    weights = folder / "adapter_model.safetensors"
    os.utime(weights, ns=(1, 1))
    before, first = weights.stat(), LocalSource().fetch(local(folder), None).revision
    make_adapter(seed=2)
    os.utime(weights, ns=(1, 1))
    after = weights.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert LocalSource().fetch(local(folder), None).revision != first


def test_content_is_sampled_for_file_systems_that_keep_no_time_of_change(
    make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter()
    weights = folder / "adapter_model.safetensors"

    class Frozen:
        name, path = weights.name, str(weights)

        def stat(self) -> os.stat_result:
            return os.stat_result((0o644, 1, 1, 1, 0, 0, os.stat(self.path).st_size, 1, 1, 1))

    monkeypatch.setattr(os, "scandir", lambda path: [Frozen()])

    def revision(content: bytes) -> str:
        weights.write_bytes(content)
        return LocalSource().fetch(local(folder), None).revision

    size = 3_000_000
    contents = [bytes(size), b"1" + bytes(size - 1), bytes(size - 1) + b"1", b"2" * size, bytes(size + 1)]
    assert len({revision(content) for content in contents}) == len(contents)
    assert revision(contents[0]) == revision(contents[0])


@pytest.mark.parametrize("path", ["/no/such/folder", "no/such/folder", "~/adapters"])
def test_a_missing_folder_is_named_in_full(path: str) -> None:
    with pytest.raises(AdapterNotFoundError, match=os.path.abspath(path)):
        LocalSource().fetch(local(path), None)


def test_a_file_and_an_empty_folder_are_no_adapters(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterNotFoundError, match="not a folder"):
        LocalSource().fetch(local(tmp_path / "file"), None)
    with pytest.raises(AdapterNotFoundError, match=r"adapter_config\.json"):
        LocalSource().fetch(local(tmp_path), None)


def test_ids_that_cannot_be_folders_are_refused_at_once() -> None:
    with pytest.raises(ValidationError, match="no revisions"):
        LocalSource().canonical(AdapterRef("local", "/a", "main"))
    for bad in ("", "a\0b"):
        with pytest.raises(ValidationError, match="adapter_id"):
            LocalSource().canonical(local(bad))


def test_a_root_keeps_callers_inside(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    inside = make_adapter("served/good")
    outside = make_adapter("private")
    (tmp_path / "served" / "link").symlink_to(outside)
    source = LocalSource((tmp_path / "served",))
    assert source.fetch(local(inside), None).folder == inside
    for path in (outside, tmp_path / "served" / "link", f"{tmp_path}/served/../private"):
        with pytest.raises(AdapterNotFoundError, match="outside"):
            source.fetch(local(path), None)


def test_tokens_play_no_part() -> None:
    assert LocalSource().credential("secret") == LocalSource().credential(None) == ""
