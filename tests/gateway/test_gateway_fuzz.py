"""Requests made up from the OpenAPI description, sound and broken ones: no 500, no hang, errors always of one shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_calls import GatewayCaller, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_calls import TritonCaller

pytestmark = pytest.mark.triton

TEXTS = st.one_of(
    st.sampled_from(["", "hello", "__base_model__", "/", "a" * 3000, "\x00", "😀 日本", "local", "linear"]),
    st.text(max_size=20),
)  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, -1, 0.5, 1.0, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**30]), st.integers(0, 9)
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
_DESCRIPTIONS: dict[str, dict[str, Any]] = {}


def values(schema: dict[str, Any], schemas: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Mostly what a schema allows, now and then anything at all."""
    return st.integers(0, 9).flatmap(lambda dice: ANYTHING if dice == 0 else _fitting(schema, schemas))


def _fitting(schema: dict[str, Any], schemas: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "$ref" in schema:
        return _fitting(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if "anyOf" in schema:
        return st.sampled_from(schema["anyOf"]).flatmap(lambda option: _fitting(option, schemas))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        required = set(schema.get("required", ()))
        fields = {name: values(field, schemas) for name, field in schema["properties"].items()}
        return st.fixed_dictionaries(
            {name: field for name, field in fields.items() if name in required},
            optional={name: field for name, field in fields.items() if name not in required},
        )
    if kind == "array":
        return st.lists(values(schema["items"], schemas), max_size=4)
    simple = {"string": TEXTS, "integer": st.integers(-2, 40), "number": NUMBERS, "boolean": st.booleans()}
    return simple.get(str(kind), ANYTHING)


@pytest.fixture
def description(gateway: GatewayCaller) -> dict[str, Any]:
    return _DESCRIPTIONS.setdefault(gateway.url, gateway.get("/api-doc/openapi.json").json)


def short(body: Any) -> Any:
    """The same body, but one that never generates for long."""
    if isinstance(body, dict):
        if isinstance(body.get("parameters"), dict):
            body["parameters"].setdefault("max_new_tokens", 3)
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int):
                body[name] = min(body[name], 3)
    return body


CHAT = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["", "base", "/no/such"]),
        "messages": st.lists(st.fixed_dictionaries({"role": TEXTS, "content": ANYTHING}), max_size=3)
        | ANYTHING,
    },
    optional=dict.fromkeys(
        ("temperature", "top_p", "n", "stop", "stream", "tools", "response_format", "logprobs", "logit_bias"),
        ANYTHING,
    ),
)
COMPLETION = st.fixed_dictionaries(
    {"model": st.sampled_from(["", "/no/such"]), "prompt": ANYTHING},
    optional=dict.fromkeys(
        ("echo", "n", "best_of", "stop", "logprobs", "stream", "suffix", "seed"), ANYTHING
    ),
)


@st.composite
def http_requests(draw: st.DrawFn, description: dict[str, Any]) -> tuple[str, bytes]:
    """A path to POST to, and a body."""
    paths = sorted(path for path, operations in description["paths"].items() if "post" in operations)
    path = draw(st.sampled_from(paths))
    schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    known = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}
    bodies = known[path] if path in known else values(schema, description["components"]["schemas"])
    body = short(json.loads(json.dumps(draw(bodies))))
    if path in known and isinstance(body, dict):
        body.setdefault("max_tokens", 3)
    sent = json.dumps(body).encode()
    if draw(st.integers(0, 19)) == 0:
        place = draw(st.integers(0, len(sent)))
        sent = sent[:place] + draw(st.binary(max_size=4)) + sent[place + 1 :]
    return path.replace("{action}", draw(st.sampled_from(["load", "pin", "unload", "x"]))), sent


@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_no_request_of_the_description_makes_a_500_or_hangs(
    gateway: GatewayCaller, description: dict[str, Any], data: st.DataObject
) -> None:
    path, sent = data.draw(http_requests(description))
    answer = gateway.post(path, sent)
    assert answer.status < 500, (path, sent, answer.body)
    if answer.status >= 400:
        error = answer.json
        if path.startswith("/v1/") and "lora_adapter" not in path:
            assert set(error["error"]) >= {"message", "type"}
        else:
            assert set(error) == {"error", "error_type"}
    elif answer.headers["content-type"].startswith("text/event-stream") and not path.startswith("/v1/"):
        last = answer.events[-1]
        assert "error_type" in last or last["generated_text"] is not None
        assert last.get("error_type") != "generation", (sent, last)


def test_after_all_that_nothing_is_left_on_the_server(
    gateway: GatewayCaller, triton_caller: TritonCaller
) -> None:
    assert gateway.generate(max_new_tokens=1).status == 200
    wait_until(lambda: triton_caller.control("info")["live_requests"] == 0)
    wait_until(lambda: triton_caller.control("stats")["running"] == 0)
