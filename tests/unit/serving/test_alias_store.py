"""Aliases set by command: still there after a restart, unless the configuration has changed since."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorax_backend.config import ServerConfig
from lorax_backend.errors import LoraxError, ValidationError
from lorax_backend.serving.adapter_fields import adapter_ref
from lorax_backend.serving.alias_store import AliasStore
from lorax_backend.serving.aliases import AliasTable


def start(path: Path | None, configured: str = "") -> AliasTable:
    """The table of a server that starts now."""
    config = ServerConfig()
    table = AliasTable(
        lambda name, source, revision: adapter_ref(name, source, revision, config),
        None if path is None else AliasStore(path),
    )
    table.load(configured)
    return table


def leads(table: AliasTable) -> dict[str, list[str]]:
    return {name: [target["adapter_id"] for target in targets] for name, targets in table.describe().items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "aliases.json"


def test_aliases_set_by_command_survive_a_restart_with_their_weights(path: Path) -> None:
    table = start(path)
    targets = [{"adapter_id": "org/old@v1", "weight": 9}, {"adapter_id": "/new", "adapter_source": "local"}]
    table.set("canary", targets)
    table.set("gone", [{"adapter_id": "org/x"}])
    assert table.delete("gone")
    table.set("base", [{"adapter_id": "__base_model__"}])
    again = start(path)
    assert again.describe() == table.describe()
    assert set(again.describe()) == {"canary", "base"}
    assert again.describe()["canary"][0] == {
        "adapter_id": "org/old", "adapter_source": "hub", "revision": "v1", "weight": 9.0,
    }  # fmt: skip


def test_a_command_holds_as_long_as_the_configuration_says_what_it_said_then(path: Path) -> None:
    configured = '{"live": "org/a", "other": "org/o"}'
    table = start(path, configured)
    table.set("live", [{"adapter_id": "org/b"}])
    assert table.delete("other")
    assert leads(start(path, configured)) == {"live": ["org/b"]}
    respelled = '{"other": {"adapter_id": "org/o", "adapter_source": "hub"}, "live": ["org/a"]}'
    assert leads(start(path, respelled)) == {"live": ["org/b"]}, "other words for the same"
    changed = '{"live": "org/c", "other": "org/p"}'
    assert leads(start(path, changed)) == {"live": ["org/c"], "other": ["org/p"]}, "the later word"
    assert leads(start(path, configured)) == {"live": ["org/a"], "other": ["org/o"]}, "and for good"


def test_what_agrees_with_the_configuration_again_is_forgotten(path: Path) -> None:
    table = start(path, '{"live": "org/a"}')
    table.set("live", [{"adapter_id": "org/b"}])
    table.set("live", [{"adapter_id": "org/a"}])
    assert json.loads(path.read_text()) == {"aliases": {}}
    assert leads(start(path, '{"live": "org/c"}')) == {"live": ["org/c"]}


def test_without_a_file_aliases_last_as_long_as_the_server(tmp_path: Path) -> None:
    start(None).set("live", [{"adapter_id": "org/a"}])
    assert leads(start(None)) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"aliases": 5}', '{"aliases": {"a": 5}}', '{"aliases": {"a": {}}}', "\udc80"]
)
def test_a_damaged_file_is_put_aside_and_ends_no_start(
    text: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_text(text, errors="surrogateescape")
    table = start(path, '{"live": "org/a"}')
    assert leads(table) == {"live": ["org/a"]}
    assert "damaged" in caplog.text
    assert path.with_name("aliases.json.broken").exists()
    table.set("new", [{"adapter_id": "org/n"}])
    assert leads(start(path)) == {"new": ["org/n"]}


def test_an_alias_that_this_server_cannot_serve_any_more_is_left_out_and_the_rest_stay(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(path).set("good", [{"adapter_id": "org/a"}])
    kept = json.loads(path.read_text())
    for name, targets in (("bad", [{"adapter_id": "x", "adapter_source": "ftp"}]), ("worse", 5), ("", [])):
        kept["aliases"][name] = {"targets": targets, "configured": None}
    path.write_text(json.dumps(kept))
    assert leads(start(path)) == {"good": ["org/a"]}
    assert "'bad'" in caplog.text
    assert "'worse'" in caplog.text


def test_a_change_that_cannot_be_written_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = start(tmp_path / "file" / "aliases.json", '{"live": "org/a"}')
    with pytest.raises(LoraxError, match="nothing was changed"):
        table.set("live", [{"adapter_id": "org/b"}])
    with pytest.raises(LoraxError, match="adapter_alias_file"):
        table.delete("live")
    assert leads(table) == {"live": ["org/a"]}
    with pytest.raises(ValidationError):
        table.set("live", [])


def test_a_write_that_breaks_off_leaves_the_old_file_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = start(path)
    table.set("live", [{"adapter_id": "org/a"}])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LoraxError, match="No space left"):
            table.set("live", [{"adapter_id": "org/b"}])
    assert leads(table) == leads(start(path)) == {"live": ["org/a"]}
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".aliases.json.lock", "aliases.json"]


def test_servers_that_share_a_file_lose_none_of_each_others_aliases(path: Path) -> None:
    tables = [start(path) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: tables[n % 4].set(f"a{n}", [{"adapter_id": f"org/{n}"}]), range(40)))
    assert leads(start(path)) == {f"a{n}": [f"org/{n}"] for n in range(40)}


def test_only_the_servers_user_may_read_the_file(path: Path) -> None:
    start(path).set("live", [{"adapter_id": "org/a"}])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_options_say_where_the_file_is(tmp_path: Path) -> None:
    assert AliasStore.of(ServerConfig()) is None
    disk = str(tmp_path / "disk")
    beside = [AliasStore.of(ServerConfig(adapter_disk_cache=disk, model_id=model)) for model in "ab"]
    assert {store.path.parent for store in beside if store} == {tmp_path / "disk"}
    assert len({store.path for store in beside if store}) == 2, "each model has aliases of its own"
    named = AliasStore.of(ServerConfig(adapter_disk_cache=disk, adapter_alias_file=str(tmp_path / "x.json")))
    assert named is not None
    assert named.path == tmp_path / "x.json"
