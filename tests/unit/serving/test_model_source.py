"""Where models come from, and the errors when they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorax_backend.config import ServerConfig
from lorax_backend.model_source import resolve_model, resolve_tokenizer
from lorax_backend.smollm2 import ModelSourceError


def resolve(model_id: str, **options: Any) -> Path:
    return resolve_model(ServerConfig(model_id=model_id, **options))


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tiny_model_path: Callable[..., Path]) -> list[dict[str, Any]]:
    """Calls of the hub's download, which answers with a tiny model."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(tiny_model_path())

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def test_a_folder_is_used_as_it_is(tiny_model_path: Callable[..., Path]) -> None:
    assert resolve(str(tiny_model_path())) == tiny_model_path().resolve()


def test_the_built_in_model_is_the_converted_folder(smollm2_path: Path) -> None:
    assert resolve("smollm2") == smollm2_path


@pytest.mark.parametrize(
    ("model_id", "options", "name", "revision"),
    [
        ("org/model", {}, "org/model", None),
        ("org/model@v1", {}, "org/model", "v1"),
        ("org/model", {"revision": "v2"}, "org/model", "v2"),
        ("org/model@v1", {"revision": "v1"}, "org/model", "v1"),
    ],
)
def test_a_hub_id_is_fetched_at_its_revision(
    downloads: list[dict[str, Any]], model_id: str, options: dict[str, Any], name: str, revision: str | None
) -> None:
    resolve(model_id, hub_cache="/somewhere", **options)
    assert (downloads[0]["name"], downloads[0]["revision"]) == (name, revision)
    assert downloads[0]["cache_dir"] == "/somewhere"
    assert "*.safetensors" in downloads[0]["allow_patterns"]
    assert "*/*" in downloads[0]["ignore_patterns"]


def test_two_revisions_contradict_each_other(downloads: list[dict[str, Any]]) -> None:
    with pytest.raises(ModelSourceError, match="another revision"):
        resolve("org/model@v1", revision="v2")
    assert not downloads


def test_what_is_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="no such folder"):
        resolve(str(tmp_path / "missing"))
    with pytest.raises(ModelSourceError, match="neither a folder nor a valid hub id"):
        resolve("not a name!")
    with pytest.raises(ModelSourceError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelSourceError, match="safetensors"):
        resolve(str(tmp_path))
    assert resolve(str(tmp_path), load_format="dummy") == tmp_path.resolve()


def hub_error(kind: str) -> Exception:
    from huggingface_hub import errors

    if kind == "LocalEntryNotFoundError":
        return errors.LocalEntryNotFoundError("offline")
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    return getattr(errors, kind)("message", response=response)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("RepositoryNotFoundError", "no such repository"),
        ("GatedRepoError", "access must be granted"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "cannot be reached"),
    ],
)
def test_each_failure_of_the_hub_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, kind: str, text: str
) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelSourceError, match=text) as caught:
        resolve("org/model@v9")
    assert "org/model" in str(caught.value)


def test_any_other_failure_of_the_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise ConnectionError("broken pipe")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelSourceError, match="download failed: ConnectionError: broken pipe"):
        resolve("org/model")


def test_the_tokenizer_is_the_models_unless_another_is_named(
    tiny_model_path: Callable[..., Path], downloads: list[dict[str, Any]]
) -> None:
    model = tiny_model_path()
    assert resolve_tokenizer(ServerConfig(), model) == model
    other = tiny_model_path(tokenizer="byte_fallback")
    assert resolve_tokenizer(ServerConfig(tokenizer_id=str(other)), model) == other.resolve()
    resolve_tokenizer(ServerConfig(tokenizer_id="org/tokenizer"), model)
    assert "*.safetensors" not in downloads[0]["allow_patterns"]
