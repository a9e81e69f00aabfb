"""Adapters administered over HTTP on a real server: load, pin, list, names, unload."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gateway_calls import GatewayCaller, wait_until

pytestmark = pytest.mark.triton
ADMIN = {"authorization": "Bearer the-server-s-own-key"}


@pytest.fixture
def adapter(gateway: GatewayCaller, gateway_adapter: str) -> Iterator[dict[str, Any]]:
    """The adapter's body, unloaded before and after the test."""
    body = {"adapter_id": gateway_adapter, "adapter_source": "local"}
    yield body
    for action in ("unpin", "unload"):
        gateway.post(f"/adapters/{action}", body, ADMIN)


def entry(gateway: GatewayCaller, adapter: dict[str, Any]) -> dict[str, Any]:
    listed = gateway.get("/adapters").json["adapters"]
    return next((item for item in listed if item["id"] == adapter["adapter_id"]), {})


def test_r18_an_administrator_loads_pins_and_unloads_an_adapter(
    gateway: GatewayCaller, adapter: dict[str, Any]
) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}):
        refused = gateway.post("/adapters/load", adapter, headers)
        assert (refused.status, refused.json["error_type"]) == (401, "unauthorized")
    loaded = gateway.post("/adapters/load", adapter, ADMIN)
    assert loaded.status == 200, loaded.body
    wait_until(lambda: entry(gateway, adapter).get("tier") == "device")
    assert gateway.post("/adapters/pin", adapter, ADMIN).status == 200
    wait_until(lambda: bool(entry(gateway, adapter).get("pinned")))
    assert gateway.post("/adapters/unpin", adapter, ADMIN).status == 200
    wait_until(lambda: not entry(gateway, adapter).get("pinned"))
    assert gateway.post("/adapters/reload", adapter, ADMIN).status == 200
    answer = gateway.generate(max_new_tokens=2, **adapter)
    assert answer.status == 200, answer.body
    wait_until(lambda: gateway.post("/adapters/unload", adapter, ADMIN).status == 200)
    wait_until(lambda: entry(gateway, adapter).get("tier") != "device")


def test_r17_r18_vllms_routes_give_an_adapter_a_name_that_openais_routes_know(
    gateway: GatewayCaller, adapter: dict[str, Any]
) -> None:
    body = {"lora_name": "tiny-name", "lora_path": adapter["adapter_id"]}
    loaded = gateway.post("/v1/load_lora_adapter", body, ADMIN)
    assert loaded.status == 200, loaded.body
    assert b"Success" in loaded.body
    assert "tiny-name" in gateway.get("/adapters").json["aliases"]
    assert "tiny-name" in {model["id"] for model in gateway.get("/v1/models").json["data"]}
    options = {"max_new_tokens": 6, "ignore_eos_token": True}
    by_name = gateway.generate("hello", adapter_id="tiny-name", **options)
    assert by_name.json == gateway.generate("hello", **adapter, **options).json
    completion = {
        "model": "tiny-name",
        "prompt": "hello",
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos_token": True,
    }
    text = gateway.post("/v1/completions", completion).json["choices"][0]["text"]
    assert text == by_name.json["generated_text"]
    unloaded = gateway.post("/v1/unload_lora_adapter", {"lora_name": "tiny-name"}, ADMIN)
    assert unloaded.status == 200, unloaded.body
    assert "tiny-name" not in gateway.get("/adapters").json["aliases"]


def test_what_cannot_be_loaded_is_an_error_of_its_kind(gateway: GatewayCaller) -> None:
    answer = gateway.post("/adapters/load", {"adapter_id": "", "adapter_source": "local"}, ADMIN)
    assert (answer.status, answer.json["error_type"]) == (422, "validation")
    answer = gateway.post("/adapters/load", {"adapter_id": "x", "adapter_source": "moon"}, ADMIN)
    assert (answer.status, answer.json["error_type"]) == (422, "validation")
