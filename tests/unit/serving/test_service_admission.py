"""What a service takes and what it refuses: caps, deadlines, aliases, default and preloaded adapters, admin keys."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes_serving import WAIT_S, FakeEngine, RecordingChannel

from lorax_backend.adapters.sources.local import LocalSource
from lorax_backend.config import ServerConfig
from lorax_backend.errors import (
    AdapterNotFoundError,
    OverloadedError,
    UnauthorizedError,
    ValidationError,
    error_from_dict,
    error_table,
)
from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.service import GenerationService
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import AdapterRef, FinishReason, GenerateRequest, SamplingParams

MakeService = Callable[..., GenerationService]
OPEN = {"allow_unauthenticated_admin": True}


class ControlledEngine(FakeEngine):
    """Remembers the commands it was given; `refuse` makes it refuse them."""

    def __init__(self, refuse: bool = False) -> None:
        super().__init__()
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self._refuse = refuse

    def control(self, command: str, arguments: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
        self.commands.append((command, arguments))
        if self._refuse:
            raise AdapterNotFoundError("no such adapter")
        return {"status": "loading"}


def submit(service: GenerationService, request_id: str = "", **parameters: Any) -> RecordingChannel:
    channel = RecordingChannel()
    service.submit(RawRequest(request_id, {"text_input": "hello"}, parameters), channel)
    return channel


def test_e02_the_request_beyond_the_cap_is_refused_at_once_with_a_time_to_retry(
    make_service: MakeService,
) -> None:
    engine = FakeEngine()
    service = make_service(engine, max_concurrent_requests=2)
    for _ in range(2):
        submit(service)
    engine.wait_submitted(2)
    error = submit(service).error
    assert (error["error_type"], error["http_status"]) == ("overloaded", 429)
    assert error["retry_after_s"] >= 1
    rebuilt = error_from_dict(error)
    assert isinstance(rebuilt, OverloadedError)
    assert rebuilt.retry_after_s == error["retry_after_s"]


def test_e02_one_adapters_crowd_is_refused_and_costs_the_others_nothing(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine, max_requests_per_adapter=1, default_adapter_source="local")
    first = submit(service, adapter_id="a")
    handle = engine.wait_submitted(1)[0].handle
    error = submit(service, adapter_id="a").error
    assert error["error_type"] == "overloaded"
    assert "max_requests_per_adapter" in error["error"]
    submit(service, adapter_id="b")
    submit(service)
    submit(service)
    engine.wait_submitted(4)
    engine.emit(handle, [5], FinishReason.LENGTH)
    first.wait_final()
    submit(service, adapter_id="a")
    engine.wait_submitted(5)


def test_a_refused_or_cancelled_request_gives_its_place_back(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine, max_requests_per_adapter=1)
    for _ in range(3):
        assert "error" in submit(service, adapter_id="a", max_new_tokens=100_000).error
    channel = submit(service, "x", adapter_id="a")
    engine.wait_submitted(1)
    service.cancel("x")
    channel.wait_final()
    assert service.drain(WAIT_S)
    assert not service.admission._by_adapter


def test_the_queue_deadline_and_priority_reach_the_engine(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine, queue_timeout_s=7.0)
    submit(service)
    submit(service, queue_timeout_s=0.5, priority=3)
    requests = engine.wait_submitted(2)
    assert sorted((request.queue_timeout_s, request.priority) for request in requests) == [(0.5, 3), (7.0, 0)]


def test_e01_to_e12_every_kind_of_error_has_its_status_and_survives_the_wire() -> None:
    table = error_table()
    expected = {
        "validation": (422, "INVALID_ARG"),
        "overloaded": (429, "UNAVAILABLE"),
        "generation": (424, "INTERNAL"),
        "incomplete_generation": (500, "INTERNAL"),
        "template_error": (422, "INVALID_ARG"),
        "missing_template_variable": (422, "INVALID_ARG"),
        "tool_error": (422, "INVALID_ARG"),
        "embedding_failure": (500, "INTERNAL"),
        "classification_failure": (500, "INTERNAL"),
        "healthcheck": (503, "UNAVAILABLE"),
        "no fast tokenizer": (404, "NOT_FOUND"),
        "invalid_input": (400, "INVALID_ARG"),
        "adapter_not_found": (404, "NOT_FOUND"),
        "adapter_unauthorized": (403, "INVALID_ARG"),
        "adapter_incompatible": (422, "INVALID_ARG"),
        "adapter_too_large": (422, "INVALID_ARG"),
        "adapter_download_failed": (503, "UNAVAILABLE"),
        "unauthorized": (401, "INVALID_ARG"),
    }
    for error_type, (status, code) in expected.items():
        kind = table[error_type]
        assert (kind.http_status, kind.triton_code) == (status, code), error_type
        error = kind("text")
        assert json.loads(error.to_json())["error"] == "text"
        assert type(error_from_dict(error.to_dict())) is kind
    assert len({kind.error_type for kind in table.values()}) == len(table)


# ---- aliases ----


def target(request: GenerateRequest, service: GenerationService) -> AdapterRef | None:
    return service.aliases.resolve(request)


def test_an_alias_leads_to_an_adapter_and_can_be_switched(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine, **OPEN)
    answer = service.control("alias_set", {"alias": "live", "adapter_id": "org/a@v1"})
    assert answer["targets"] == [
        {"adapter_id": "org/a", "adapter_source": "hub", "revision": "v1", "weight": 1.0}
    ]
    submit(service, adapter_id="live")
    service.control("alias_set", {"alias": "live", "adapter_id": "/b", "adapter_source": "local"})
    assert engine.wait_submitted(1)[0].adapter == AdapterRef("hub", "org/a", "v1")
    submit(service, adapter_id="live")
    assert engine.wait_submitted(2)[1].adapter == AdapterRef("local", "/b")
    assert list(service.control("aliases")["aliases"]) == ["live"]
    assert service.control("alias_delete", {"alias": "live"}) == {"deleted": True}
    assert service.control("alias_delete", {"alias": "live"}) == {"deleted": False}
    submit(service, adapter_id="live")
    assert engine.wait_submitted(3)[2].adapter == AdapterRef("hub", "live")


def test_weighted_targets_share_the_traffic_and_a_request_sent_again_meets_the_same(
    make_service: MakeService,
) -> None:
    service = make_service(FakeEngine(), **OPEN)
    targets = [{"adapter_id": "org/old", "weight": 90}, {"adapter_id": "__base_model__", "weight": 10}]
    service.control("alias_set", {"alias": "canary", "targets": targets})
    ref = AdapterRef("hub", "canary")

    def choose(request_id: str = "", seed: int | None = None) -> AdapterRef | None:
        params = SamplingParams(max_new_tokens=1, seed=seed or 0)
        return target(GenerateRequest(request_id, params, adapter=ref, seed_given=seed is not None), service)

    counts = Counter(choose(f"request {i}") for i in range(2000))
    assert 140 < counts[None] < 260
    assert counts[None] + counts[AdapterRef("hub", "org/old")] == 2000
    assert all(choose(f"request {i}") == choose(f"request {i}") for i in range(50))
    assert all(choose(f"any {i}", seed=7) == choose("other", seed=7) for i in range(20))
    assert 20 < sum(choose() is None for _ in range(500)) < 100  # nothing to go by: drawn


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"adapter_id": "a"}, "alias"),
        ({"alias": "__base_model__", "adapter_id": "a"}, "alias"),
        ({"alias": "x"}, "adapter_id"),
        ({"alias": "x", "targets": []}, "targets"),
        ({"alias": "x", "targets": [{"adapter_id": "a", "weight": 0}]}, "weight"),
        ({"alias": "x", "targets": [{"adapter_id": "a", "wait": 1}]}, "wait"),
        ({"alias": "x", "targets": [5]}, r"targets\[0\]"),
        ({"alias": "x", "adapter_id": "a", "adapter_source": "ftp"}, "adapter_source"),
        ({"alias": "x", "adapter_id": "a", "targets": [{"adapter_id": "b"}]}, "one form"),
    ],
)
def test_a_bad_alias_is_refused_and_changes_nothing(
    arguments: dict[str, Any], word: str, make_service: MakeService
) -> None:
    service = make_service(FakeEngine(), **OPEN)
    with pytest.raises(ValidationError, match=word):
        service.control("alias_set", arguments)
    assert service.control("aliases") == {"aliases": {}}


def test_aliases_of_the_configuration_are_there_from_the_start(
    make_service: MakeService, byte_level: TokenizerPool
) -> None:
    text = '{"one": "org/a", "two": [{"adapter_id": "org/b", "weight": 2}, "org/c"]}'
    engine = FakeEngine()
    service = make_service(engine, adapter_aliases=text, adapter_id="one")
    assert set(service.aliases.describe()) == {"one", "two"}
    submit(service)  # the default adapter is an alias too
    assert engine.wait_submitted(1)[0].adapter == AdapterRef("hub", "org/a")
    for bad in ("{", "[]", '{"x": []}'):
        with pytest.raises(ValidationError):
            GenerationService(FakeEngine(), byte_level, ServerConfig(adapter_aliases=bad))


# ---- admin ----


@pytest.mark.parametrize(
    "command", ["alias_set", "alias_delete", "adapter_preload", "adapter_purge", "reset_prefix_cache"]
)
def test_commands_that_change_something_need_the_admins_key(command: str, make_service: MakeService) -> None:
    engine = ControlledEngine()
    service = make_service(engine, admin_api_key="sesame")
    arguments = {"alias": "x", "adapter_id": "a"}
    for key in ({}, {"admin_key": "guess"}, {"admin_key": 5}, {"admin_key": None}):
        with pytest.raises(UnauthorizedError) as caught:
            service.control(command, arguments | key)
        assert "sesame" not in caught.value.message
    assert engine.commands == []
    service.control(command, {**arguments, "admin_key": "sesame"})
    assert all("admin_key" not in given for _, given in engine.commands)
    keyless = make_service(ControlledEngine())
    with pytest.raises(UnauthorizedError, match="admin_api_key"):
        keyless.control(command, arguments)


def test_commands_that_only_look_need_no_key(make_service: MakeService) -> None:
    service = make_service(ControlledEngine(), admin_api_key="sesame")
    for command in ("info", "metrics", "aliases", "adapters", "stats"):
        service.control(command)
    assert service.control("tokenize", {"inputs": "a"})["tokens"]


def test_a60_only_administrators_are_told_of_adapters_that_not_everybody_may_use(
    make_service: MakeService,
) -> None:
    rows = [
        {"id": "org/open", "public": True},
        {"id": "org/private", "public": False},
        {"id": "org/on-its-way"},
    ]
    tiers = {"on_host": 2, "running": ["hub:org/private"], "waiting": [], "popular": {"hub:org/private": 3}}

    class Engine(ControlledEngine):
        def control(self, command: str, arguments: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
            super().control(command, arguments, timeout)
            return {"adapters": rows} if command == "adapters" else {"running": 1, "adapter_tiers": tiers}

    service = make_service(Engine(), admin_api_key="sesame")
    for key in ({}, {"admin_key": "guess"}, {"admin_key": ""}, {"admin_key": None}, {"admin_key": "\udc80"}):
        assert service.control("adapters", dict(key)) == {"adapters": rows[:1]}
        assert service.control("stats", dict(key)) == {"running": 1, "adapter_tiers": {"on_host": 2}}
    assert service.control("adapters", {"admin_key": "sesame"}) == {"adapters": rows}
    assert service.control("stats", {"admin_key": "sesame"})["adapter_tiers"] == tiers
    assert make_service(Engine()).control("adapters") == {"adapters": rows[:1]}, "a server without a key"
    assert make_service(Engine(), **OPEN).control("adapters") == {"adapters": rows}


def test_the_engine_hears_of_adapters_by_id_source_and_revision(make_service: MakeService) -> None:
    engine = ControlledEngine()
    service = make_service(engine, **OPEN)
    service.control("alias_set", {"alias": "live", "adapter_id": "org/a@v1"})
    service.control("adapter_pin", {"adapter_id": "live", "tier": "host"})
    service.control("adapter_unload", {"adapter_id": "/x", "adapter_source": "LOCAL"})
    service.control("adapter_purge", {"all": True})
    assert engine.commands == [
        ("adapter_pin", {"adapter_id": "org/a", "adapter_source": "hub", "revision": "v1", "tier": "host"}),
        ("adapter_unload", {"adapter_id": "/x", "adapter_source": "local"}),
        ("adapter_purge", {"all": True}),
    ]
    for arguments in (
        {"adapter_id": "__base_model__"},
        {"adapter_id": 5},
        {"adapter_id": "a", "revision": 1},
    ):
        with pytest.raises(ValidationError):
            service.control("adapter_pin", arguments)


def test_a61_a62_adapters_of_the_configuration_are_preloaded_and_pinned_and_others_load_as_before(
    make_service: MakeService,
) -> None:
    engine = ControlledEngine()
    service = make_service(
        engine, preloaded_adapter_ids="org/a, org/b@v2,", adapter_id="/own", adapter_source="local"
    )
    assert engine.commands == [
        ("adapter_preload", {"adapter_id": "org/a", "adapter_source": "hub", "pin": True}),
        ("adapter_preload", {"adapter_id": "org/b", "adapter_source": "hub", "revision": "v2", "pin": True}),
        ("adapter_preload", {"adapter_id": "/own", "adapter_source": "local", "pin": True}),
    ]
    submit(service, adapter_id="org/c")
    submit(service)
    submit(service, adapter_id="__base_model__")
    adapters = {request.adapter for request in engine.wait_submitted(3)}
    assert adapters == {AdapterRef("hub", "org/c"), AdapterRef("local", "/own"), None}


def test_a_preload_that_is_refused_ends_the_start(byte_level: TokenizerPool) -> None:
    service = GenerationService(
        ControlledEngine(refuse=True), byte_level, ServerConfig(preloaded_adapter_ids="org/a")
    )
    with pytest.raises(RuntimeError, match="org/a"):
        service.start()
    assert not service.ready


# ---- templates ----


@pytest.fixture
def templated(tmp_path: Path) -> Path:
    """An adapter folder with a chat template of its own."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"chat_template": "own:{{ messages[0].content }}{{ eos_token }}", "eos_token": {"content": "!"}}
        )
    )
    return folder


def test_c22_the_adapters_own_template_wins_over_the_base_models(
    templated: Path, tmp_path: Path, byte_level: TokenizerPool
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (plain / name).write_text("{}")
    engine = FakeEngine()
    config = ServerConfig(default_adapter_source="local", cancel_poll_interval_s=0.005)
    service = GenerationService(engine, byte_level, config, lambda: {"local": LocalSource()})
    service.start()
    try:
        for adapter in (str(templated), str(plain), str(templated), None):
            channel = RecordingChannel()
            fields = {"messages": '[{"role": "user", "content": "hi"}]', "adapter_id": adapter}
            service.submit(RawRequest("", {k: v for k, v in fields.items() if v}), channel)
        requests = engine.wait_submitted(4)
        prompts = {
            (r.adapter.id if r.adapter else ""): byte_level.decode(r.prompt_ids, False) for r in requests
        }
        base = byte_level.render_chat([{"role": "user", "content": "hi"}])
        assert prompts == {str(templated): "own:hi!", str(plain): base, "": base}
        missing = RecordingChannel()
        service.submit(RawRequest("", fields | {"adapter_id": str(tmp_path / "none")}), missing)
        assert missing.error["error_type"] == "adapter_not_found"
    finally:
        service.stop()


def test_c22_everyone_waits_for_one_fetch_and_a_slow_adapter_delays_no_other(
    templated: Path, byte_level: TokenizerPool
) -> None:
    gate = threading.Event()
    fetched: list[str] = []

    class SlowSource(LocalSource):
        def fetch(self, ref: AdapterRef, token: str | None) -> Any:
            fetched.append(ref.id)
            if ref.id == "slow":
                assert gate.wait(WAIT_S)
                raise AdapterNotFoundError("slow is not there")
            return super().fetch(ref, token)

    engine = FakeEngine()
    config = ServerConfig(default_adapter_source="local", adapter_loader_threads=2, validation_workers=1)
    service = GenerationService(engine, byte_level, config, lambda: {"local": SlowSource()})
    service.start()
    try:
        chat = {"messages": '[{"role": "user", "content": "hi"}]'}
        slow = [RecordingChannel() for _ in range(20)]
        for channel in slow:
            service.submit(RawRequest("", chat | {"adapter_id": "slow"}), channel)
        service.submit(RawRequest("", chat | {"adapter_id": str(templated)}), RecordingChannel())
        service.submit(RawRequest("", chat), RecordingChannel())
        engine.wait_submitted(2)
        gate.set()
        assert {channel.error["error_type"] for channel in slow} == {"adapter_not_found"}
        assert fetched.count("slow") == 1
    finally:
        gate.set()
        service.stop()


def test_c22_a_plain_prompt_never_waits_for_an_adapters_files(make_service: MakeService) -> None:
    engine = FakeEngine()
    service = make_service(engine)  # it has no sources: asking one would fail
    submit(service, adapter_id="org/a")
    engine.wait_submitted(1)


def test_e06_a_template_that_needs_a_guideline_says_so(make_service: MakeService, tmp_path: Path) -> None:
    from lorax_backend.errors import MissingTemplateVariableError
    from lorax_backend.serving.chat import ChatTemplate

    template = ChatTemplate("{{ guideline }}: {{ messages[0].content }}", {})
    chat = [{"role": "user", "content": "hi"}]
    assert template.render(chat, guideline="be kind") == "be kind: hi"
    with pytest.raises(MissingTemplateVariableError, match="guideline"):
        template.render(chat)
    assert ChatTemplate("{{ messages[0].content }}", {}).render(chat, guideline="unused") == "hi"
