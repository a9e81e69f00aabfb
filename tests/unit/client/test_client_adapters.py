"""`client.adapters`: the control requests it sends, waiting for adapters, and the admin key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_triton_server import Call, FakeTriton, Script, error_json, error_response, response

from lorax_triton import (
    AdapterError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AsyncClient,
    Client,
    RequestTimeoutError,
    UnauthorizedError,
    ValidationError,
)

Serve = Callable[[Script], FakeTriton]
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def controls(fake: FakeTriton) -> list[dict[str, Any]]:
    """Every command so far."""
    return [json.loads(call.inputs["control"][0]) for call in fake.calls]


def answering(answer: Answer) -> Script:
    def script(call: Call) -> Iterator[Any]:
        yield response(True, details=[json.dumps(answer(json.loads(call.inputs["control"][0])))])

    return script


def row(status: str, tier: str | None, **more: Any) -> dict[str, Any]:
    return {"id": "a", "source": "hub", "revision": None, "status": status, "tier": tier} | more


def loading(*rows: list[dict[str, Any]]) -> Answer:
    """A server that starts to load, and then lists the given rows, one list a question."""
    left = iter(rows)

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        if command["command"] == "adapters":
            return {"adapters": next(left)}
        return {"id": "a", "source": "hub", "revision": None, "status": "loading"}

    return answer


def test_every_method_sends_its_command_with_the_adapter_and_the_key(serve: Serve) -> None:
    fake = serve(
        answering(lambda command: {"status": "ready", "deleted": True, "adapters": [], "aliases": {}})
    )
    with Client(fake.url, admin_key="k") as client:
        adapters = client.adapters
        adapters.preload("a", "hub", revision="v1", api_token="t", tier="host", pin=True)
        adapters.pin("a")
        adapters.unpin("a", "local")
        adapters.unload("a", revision="v1")
        adapters.reload("a", api_token="t")
        adapters.purge("a")
        adapters.purge()
        adapters.set_alias("x", "a")
        adapters.set_alias("x", {"a": 0.9, "b": 0.1})
        adapters.set_alias("x", [{"adapter_id": "a", "revision": "v1"}])
        assert adapters.delete_alias("x") is True
        assert adapters.aliases() == {}
        assert adapters() == adapters.list() == []
    key = {"admin_key": "k"}
    assert controls(fake) == [
        {
            "command": "adapter_preload",
            "adapter_id": "a",
            "adapter_source": "hub",
            "revision": "v1",
            "api_token": "t",
            "tier": "host",
            "pin": True,
        }
        | key,
        {"command": "adapter_pin", "adapter_id": "a"} | key,
        {"command": "adapter_unpin", "adapter_id": "a", "adapter_source": "local"} | key,
        {"command": "adapter_unload", "adapter_id": "a", "revision": "v1"} | key,
        {"command": "adapter_reload", "adapter_id": "a", "api_token": "t"} | key,
        {"command": "adapter_purge", "adapter_id": "a"} | key,
        {"command": "adapter_purge", "all": True} | key,
        {"command": "alias_set", "alias": "x", "targets": [{"adapter_id": "a"}]} | key,
        {
            "command": "alias_set",
            "alias": "x",
            "targets": [{"adapter_id": "a", "weight": 0.9}, {"adapter_id": "b", "weight": 0.1}],
        }
        | key,
        {"command": "alias_set", "alias": "x", "targets": [{"adapter_id": "a", "revision": "v1"}]} | key,
        {"command": "alias_delete", "alias": "x"} | key,
        {"command": "aliases"},
        {"command": "adapters"} | key,
        {"command": "adapters"} | key,
    ]


def test_the_key_comes_from_the_environment_and_goes_only_where_it_is_needed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = serve(answering(lambda command: {"status": "ready"}))
    monkeypatch.setenv("LORAX_ADMIN_KEY", "from-env")
    with Client(fake.url) as client:
        client.adapters.pin("a")
        client.info()
    monkeypatch.delenv("LORAX_ADMIN_KEY")
    with Client(fake.url) as client:
        client.adapters.pin("a")
    assert [command.get("admin_key") for command in controls(fake)] == ["from-env", None, None]


def test_preload_waits_until_the_adapter_is_where_it_was_wanted(serve: Serve) -> None:
    old = row("on_device", "device", retired=True)
    steps = [[old, row("fetching", "remote")], [row("reading", "disk")], [row("on_host", "host")]]
    fake = serve(answering(loading(*steps, [row("on_device", "device")])))
    with Client(fake.url) as client:
        answer = client.adapters.preload("a")
    assert (answer["status"], answer["tier"]) == ("ready", "device")
    assert [command["command"] for command in controls(fake)] == ["adapter_preload", *["adapters"] * 4]


def test_reload_waits_while_new_weights_load_beside_the_old(serve: Serve) -> None:
    old = row("on_device", "device")
    fake = serve(answering(loading([old, row("fetching", "remote")], [old])))
    with Client(fake.url) as client:
        assert client.adapters.reload("a")["status"] == "ready"
    assert [command["command"] for command in controls(fake)] == ["adapter_reload", "adapters", "adapters"]


def test_without_waiting_the_answer_says_that_it_loads(serve: Serve) -> None:
    fake = serve(answering(loading()))
    with Client(fake.url) as client:
        assert client.adapters.preload("a", wait=False)["status"] == "loading"
    assert len(fake.calls) == 1


@pytest.mark.parametrize(
    ("fields", "kind"),
    [({}, AdapterError), ({"error_type": "adapter_not_found"}, AdapterNotFoundError)],
)
def test_an_adapter_that_fails_to_load_raises_what_the_server_says(
    serve: Serve, fields: dict[str, str], kind: type[Exception]
) -> None:
    failed = row("failed", None, error="no such repository", **fields)
    fake = serve(answering(loading([row("fetching", "remote")], [failed])))
    with Client(fake.url) as client, pytest.raises(kind, match="no such repository"):
        client.adapters.preload("a")


def test_an_adapter_that_was_dropped_meanwhile_ends_the_wait(serve: Serve) -> None:
    fake = serve(answering(loading([])))
    with Client(fake.url) as client:
        assert client.adapters.preload("a")["status"] == "not_loaded"


def test_an_adapter_wanted_on_disk_is_ready_once_its_files_are_there(serve: Serve) -> None:
    cached = row("on_disk", "disk") | {"revision": "4f9c"}
    fake = serve(answering(loading([row("fetching", "remote")], [cached])))
    with Client(fake.url) as client:
        assert client.adapters.preload("a", tier="disk")["status"] == "ready"


def test_a_reload_that_fails_says_why_though_the_old_weights_go_on(serve: Serve) -> None:
    old = row("on_device", "device")
    failed = old | {"last_error": "wrong shapes", "error_type": "adapter_incompatible"}
    fake = serve(answering(loading([old, row("reading", "disk")], [failed])))
    with Client(fake.url) as client, pytest.raises(AdapterIncompatibleError, match="wrong shapes"):
        client.adapters.reload("a")


def test_waiting_ends_with_the_timeout(serve: Serve) -> None:
    fake = serve(answering(loading(*[[row("fetching", "remote")]] * 1000)))
    with Client(fake.url) as client, pytest.raises(RequestTimeoutError, match="'a' is still loading"):
        client.adapters.preload("a", timeout=0.2)


def test_a_missing_key_is_an_unauthorized_error(serve: Serve) -> None:
    message = error_json("control.admin_key: is missing", "unauthorized", 401)
    fake = serve(lambda call: iter([error_response(message)]))
    with Client(fake.url) as client, pytest.raises(UnauthorizedError, match="admin_key") as caught:
        client.adapters.unload("a")
    assert caught.value.status == 401


def test_bad_arguments_are_refused_before_anything_is_sent(serve: Serve) -> None:
    fake = serve(answering(lambda command: {}))
    with Client(fake.url) as client:
        for call in (
            lambda: client.adapters.preload(""),
            lambda: client.adapters.preload("a", "moon"),
            lambda: client.adapters.preload("a", tier="attic"),
            lambda: client.adapters.set_alias("", "a"),
            lambda: client.adapters.set_alias("x", {}),
            lambda: client.adapters.set_alias("x", {"a": 0.0}),
        ):
            with pytest.raises(ValidationError):
                call()
    assert not fake.calls


def test_the_asynchronous_namespace_does_the_same(serve: Serve) -> None:
    steps = [[row("fetching", "remote")], [row("on_device", "device")]]
    listed = [row("on_device", "device")]
    fake = serve(answering(loading(*steps, listed, listed)))

    async def main() -> None:
        async with AsyncClient(fake.url, admin_key="k") as client:
            assert (await client.adapters.preload("a"))["status"] == "ready"
            assert await client.adapters() == await client.adapters.list() == listed
            adapters = client.adapters
            await asyncio.gather(
                adapters.pin("a"),
                adapters.unpin("a"),
                adapters.unload("a"),
                adapters.reload("a", wait=False),
                adapters.purge("a"),
                adapters.purge(),
                adapters.set_alias("x", {"a": 1.0}),
                adapters.delete_alias("x"),
                adapters.aliases(),
            )

    asyncio.run(main())
    sent = controls(fake)
    assert {command["command"] for command in sent} == {
        *("adapters", "adapter_preload", "adapter_pin", "adapter_unpin", "adapter_unload", "adapter_reload"),
        *("adapter_purge", "alias_set", "alias_delete", "aliases"),
    }
    assert all((command["command"] == "aliases") != ("admin_key" in command) for command in sent)
