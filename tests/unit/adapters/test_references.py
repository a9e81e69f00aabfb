"""References to adapters, however they are written, and pickled weights where the server allows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_files import Base, lora_tensors

from lorax_backend.adapters.references import References, normalize_uri
from lorax_backend.adapters.sources.hub import HubSource
from lorax_backend.adapters.sources.local import LocalSource
from lorax_backend.errors import AdapterIncompatibleError, AdapterNotFoundError, ValidationError
from lorax_backend.types import AdapterRef


@pytest.mark.parametrize(
    ("written", "source", "adapter_id"),
    [
        ("org/name", "hub", "org/name"),
        ("hf://org/name@v2", "hub", "org/name@v2"),
        ("HF://org/name", "hub", "org/name"),
        ("s3://bucket/a/b", "s3", "s3://bucket/a/b"),
        ("file:///srv/adapters/a%20b", "local", "/srv/adapters/a b"),
        ("file://localhost/srv", "local", "/srv"),
        ("pbase://shout/1", "pbase", "shout/1"),
    ],
)
def test_a_uri_names_its_source(written: str, source: str, adapter_id: str) -> None:
    assert normalize_uri(AdapterRef("HUB", written)) == AdapterRef(source, adapter_id)


@pytest.mark.parametrize("bad", ["gs://bucket/a", "file://host/folder", "file://"])
def test_a_uri_that_no_source_understands_is_refused(bad: str) -> None:
    with pytest.raises(ValidationError, match="adapter_id"):
        normalize_uri(AdapterRef("hub", bad))


def test_uris_and_plain_ids_are_one_adapter() -> None:
    references = References({"hub": HubSource(), "local": LocalSource()})
    plain = references.resolve(AdapterRef("hub", "org/name", "v2"))
    assert references.resolve(AdapterRef("hub", "hf://org/name@v2")) == plain
    assert references.resolve(AdapterRef("hub", "file:///a/b/")) == AdapterRef("local", "/a/b")


def test_generations_begin_anew_when_nothing_is_left_of_an_adapter() -> None:
    references = References({"local": LocalSource()})
    base = AdapterRef("local", "/a")
    fresh = references.next_generation(base)
    assert references.resolve(base) == base
    references.make_current(fresh)
    assert references.resolve(base) == fresh
    assert references.resolve(fresh) == fresh
    assert references.exact(base) == base
    references.forget(base, [fresh])
    assert references.resolve(base) == fresh
    references.forget(fresh, [AdapterRef("local", "/b")])
    assert references.resolve(base) == base
    assert len(references) == 0


def test_folders_outside_all_roots_read_like_missing_ones(
    make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    good = make_adapter("one/good")
    outside = make_adapter("outside")
    linked = make_adapter("two/linked")
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    source = LocalSource((tmp_path / "one", tmp_path / "two"))
    assert source.fetch(AdapterRef("local", "good"), None).folder == good
    for path in (outside, tmp_path / "one" / "none", "../outside"):
        with pytest.raises(AdapterNotFoundError, match="does not exist on the server, or it is outside"):
            source.fetch(AdapterRef("local", str(path)), None)
    with pytest.raises(AdapterNotFoundError, match="outside"):
        source.fetch(AdapterRef("local", str(linked)), None)


class _Runs:
    """What a malicious pickle would call."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code has run",)


def test_a_pickle_is_read_only_where_allowed_and_only_as_tensors(
    tiny: Base, make_adapter: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    modules = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    folder = make_adapter()
    expected = tiny.load(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(lora_tensors(tiny.targets, modules, 4, 0), folder / "adapter_model.bin")

    def load(allowed: bool) -> torch.Tensor:
        return tiny.inspector(allow_pickle=allowed).inspect(folder).load().pages

    assert torch.equal(load(True), expected.pages)
    with pytest.raises(AdapterIncompatibleError, match="allow_pickle_adapters"):
        load(False)
    for wrong in ({"a": _Runs()}, [torch.zeros(1)], {"a": 1}):
        torch.save(wrong, folder / "adapter_model.bin")
        with pytest.raises(AdapterIncompatibleError, match="damaged"):
            load(True)
    assert "code has run" not in capsys.readouterr().out
