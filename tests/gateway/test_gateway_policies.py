"""What the gateway decides by itself: keys, failover, errors, keep-alive, health. Behind it play functions."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from fakes_gateway import FakeTriton, StartGateway
from gateway_calls import wait_until

from lorax_backend import errors as engine_errors
from lorax_backend.gateway.config import CorsOptions, GatewayConfig, read_keys
from lorax_triton._transport import InferRequest, InferResponse
from lorax_triton.errors import ServerConnectionError


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def api_token(request: InferRequest) -> str | None:
    tensor = request.inputs.get("api_token")
    return tensor.values[0] if tensor else None


def test_g05_without_keys_the_bearer_token_is_the_hubs(start: StartGateway) -> None:
    server = FakeTriton()
    gateway = start(server)
    body = {"inputs": "x", "parameters": {}}
    gateway.post("/generate", body, bearer("hf_1"))
    gateway.post("/generate_stream", body, {"x-hub-token": "hf_2", **bearer("hf_1")})
    gateway.post("/generate", {"inputs": "x", "parameters": {"api_token": "hf_3"}}, bearer("hf_1"))
    gateway.post("/generate", body)
    assert [api_token(request) for request in server.generations] == ["hf_1", "hf_2", "hf_3", None]


def test_with_keys_only_those_who_have_one_generate_and_keys_never_leave_the_gateway(
    start: StartGateway,
) -> None:
    server = FakeTriton()
    gateway = start(server, api_keys=("user-1", "user-2"), admin_api_keys=("boss",))
    body = {"inputs": "x"}
    for headers in ({}, bearer("wrong"), {"authorization": "Basic user-1"}, {"authorization": "Bearer"}):
        for path in (
            "/generate",
            "/generate_stream",
            "/",
            "/tokenize",
            "/v1/completions",
            "/v1/chat/completions",
        ):
            answer = gateway.post(path, body, headers)
            assert answer.status == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
    assert gateway.get("/adapters").status == 401
    assert gateway.get("/v1/models").status == 401
    assert server.generations == []
    assert gateway.get("/health").status == 200  # probes have no keys
    for key in ("user-1", "user-2", "boss"):
        assert gateway.post("/generate", body, bearer(key)).status == 200
    gateway.post("/generate", body, {"x-hub-token": "hf_1", **bearer("user-1")})
    chat = {"model": "some/adapter", "messages": [{"role": "user", "content": "x"}]}
    gateway.post("/v1/chat/completions", chat, bearer("user-1"))
    assert [api_token(request) for request in server.generations] == [None, None, None, "hf_1", None]


def test_only_administrators_change_adapters_once_there_are_keys(start: StartGateway) -> None:
    server = FakeTriton()
    gateway = start(server, api_keys=("user",), admin_api_keys=("boss",), backend_admin_key="inner")
    body = {"adapter_id": "some/adapter", "pin": True}
    assert gateway.post("/adapters/load", body).status == 401
    assert gateway.post("/adapters/load", body, bearer("user")).status == 403
    assert (
        gateway.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"}, bearer("user")).status
        == 403
    )
    assert server.commands == []
    assert gateway.post("/adapters/load", body, bearer("boss")).status == 200
    assert server.commands == [{"command": "adapter_preload", "admin_key": "inner", **body}]


def test_without_administrators_keys_the_server_judges_the_callers(start: StartGateway) -> None:
    server = FakeTriton()
    gateway = start(server)
    gateway.post("/adapters/unpin", {"adapter_id": "some/adapter"}, bearer("what-the-server-knows"))
    gateway.post("/adapters/unpin", {"adapter_id": "some/adapter"})
    assert [command.get("admin_key") for command in server.commands] == ["what-the-server-knows", None]


def test_users_keys_alone_make_nobody_an_administrator(start: StartGateway) -> None:
    gateway = start(FakeTriton(), api_keys=("user",))
    assert gateway.post("/adapters/load", {"adapter_id": "x"}, bearer("user")).status == 403


def test_vllms_names_load_and_forget_an_adapter(start: StartGateway) -> None:
    server = FakeTriton()
    gateway = start(server)
    answer = gateway.post("/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": "/adapters/sql"})
    assert answer.body == b"Success: LoRA adapter 'sql' added successfully."
    target = {"adapter_id": "/adapters/sql", "adapter_source": "local"}
    assert server.commands == [
        {"command": "alias_set", "alias": "sql", **target},
        {"command": "adapter_preload", **target},
    ]
    assert gateway.post("/v1/unload_lora_adapter", {"lora_name": "sql"}).status == 200
    assert [command["command"] for command in server.commands[2:]] == ["adapter_unload", "alias_delete"]


def test_e01_to_e12_every_kind_of_the_engines_errors_keeps_its_kind_and_status(start: StartGateway) -> None:
    server = FakeTriton()
    gateway = start(server)
    kinds = {kind.error_type: kind for kind in _all_kinds(engine_errors.LoraxError)}
    assert len(kinds) > 12
    for kind in kinds.values():
        server.refusal = f"Triton says: {kind('what happened').to_json()}"
        answer = gateway.post("/generate", {"inputs": "x"})
        assert (answer.status, answer.json) == (
            kind.http_status, {"error": "what happened", "error_type": kind.error_type},
        )  # fmt: skip
        (event,) = gateway.post("/generate_stream", {"inputs": "x"}).events
        assert event == answer.json


def _all_kinds(root: type[engine_errors.LoraxError]) -> list[type[engine_errors.LoraxError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in _all_kinds(child))]


def test_e02_an_overloaded_server_is_a_429_that_says_when_to_come_back(start: StartGateway) -> None:
    server = FakeTriton()
    server.refusal = engine_errors.OverloadedError("8 requests are in flight").to_json()
    answer = start(server).post("/generate", {"inputs": "x"})
    assert (answer.status, answer.json["error_type"], answer.headers["retry-after"]) == (
        429,
        "overloaded",
        "1",
    )


def test_e04_x08_a_stream_that_ends_early_says_so(start: StartGateway) -> None:
    server = FakeTriton()
    server.cut = True
    gateway = start(server)
    answer = gateway.post("/generate", {"inputs": "x"})
    assert (answer.status, answer.json["error_type"]) == (500, "incomplete_generation")
    events = gateway.post("/generate_stream", {"inputs": "x"}).events
    assert events[0]["token"]["text"] == "a"
    assert events[-1]["error_type"] == "incomplete_generation"


def test_e09_r13_without_a_server_health_is_a_503_and_comes_back_with_it(start: StartGateway) -> None:
    server = FakeTriton()
    server.refusal = ServerConnectionError("nobody there")
    gateway = start(server)
    for path in ("/health", "/ping", "/"):
        answer = gateway.get(path)
        assert (answer.status, answer.json) == (503, {"error": "unhealthy", "error_type": "healthcheck"})
        assert "retry-after" in answer.headers
    assert gateway.get("/startup").status == 500
    assert gateway.post("/generate", {"inputs": "x"}).status == 503
    assert gateway.get("/info").status == 503
    server.refusal = None
    assert gateway.get("/health").status == 200
    server.ready = False  # its engine has died
    wait_until(lambda: gateway.get("/health").status == 503)


def test_r07_embeddings_are_refused_in_openais_words(start: StartGateway) -> None:
    answer = start(FakeTriton()).post("/v1/embeddings", {"model": "", "input": "x"})
    assert 400 <= answer.status < 500
    assert answer.json["error"]["message"]


def test_r05_r06_r17_openais_routes_answer(start: StartGateway) -> None:
    server = FakeTriton()
    gateway = start(server)
    chat = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
    answer = gateway.post("/v1/chat/completions", chat, {"x-request-id": "mine"})
    assert answer.status == 200, answer.body
    assert answer.json["choices"][0]["message"]["content"] == "aa"
    assert answer.headers["x-request-id"] == "mine"
    streamed = gateway.post("/v1/chat/completions", {**chat, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.body.endswith(b"data: [DONE]\n\n")
    assert (
        gateway.post("/v1/completions", {"model": "base", "prompt": "x"}).json["choices"][0]["text"] == "aa"
    )
    assert [model["id"] for model in gateway.get("/v1/models").json["data"]] == ["base"]
    malformed = gateway.post("/v1/chat/completions", b"{")
    assert malformed.status == 400
    assert malformed.json["error"]["type"] == "invalid_request_error"
    wrong_kind = gateway.call("POST", "/v1/completions", b"{}", {"content-type": "text/plain"})
    assert (wrong_kind.status, wrong_kind.json["error"]["code"]) == (415, "unsupported_media_type")


def test_a_request_goes_on_to_the_next_server_when_one_cannot_take_it(start: StartGateway) -> None:
    refusals = [
        ServerConnectionError("refused"),
        engine_errors.ShuttingDownError("drains").to_json(),
        engine_errors.OverloadedError("full").to_json(),
    ]
    for refusal in refusals:
        one, two = FakeTriton("one:1"), FakeTriton("two:1")
        gateway = start(one, two, health_interval=60.0)
        one.refusal = refusal
        for _ in range(4):
            assert gateway.post("/generate", {"inputs": "x"}).status == 200
            assert len(gateway.post("/generate_stream", {"inputs": "x"}).events) == 2
        assert len(two.generations) == 8
        assert b"lorax_gateway_failovers_total 0\n" not in gateway.get("/metrics").body


def test_a_bad_request_is_not_tried_on_every_server(start: StartGateway) -> None:
    one, two = FakeTriton("one:1"), FakeTriton("two:1")
    gateway = start(one, two)
    one.refusal = two.refusal = engine_errors.ValidationError("temperature: wrong").to_json()
    assert gateway.post("/generate", {"inputs": "x"}).status == 422
    assert len(one.generations + two.generations) == 1


def test_after_its_first_token_a_request_is_never_sent_again(start: StartGateway) -> None:
    one, two = FakeTriton("one:1"), FakeTriton("two:1")
    one.after_first = two.after_first = ServerConnectionError("the connection broke")
    events = start(one, two).post("/generate_stream", {"inputs": "x"}).events
    assert [sorted(event) for event in events] == [
        ["details", "generated_text", "token"],
        ["error", "error_type"],
    ]
    assert len(one.generations + two.generations) == 1


def test_an_adapters_requests_stay_with_one_server(start: StartGateway) -> None:
    servers = [FakeTriton(f"host-{index}:8001") for index in range(3)]
    gateway = start(*servers)
    for adapter in range(12):
        before = [len(server.generations) for server in servers]
        for _ in range(3):
            gateway.post("/generate", {"inputs": "x", "parameters": {"adapter_id": f"org/adapter-{adapter}"}})
        grown = [len(server.generations) - count for server, count in zip(servers, before, strict=True)]
        assert sorted(grown) == [0, 0, 3]
    assert all(server.generations for server in servers)


def test_x02_a_silent_stream_gets_comments_that_keep_it_alive(start: StartGateway) -> None:
    release = threading.Event()
    server = FakeTriton()
    inner = server.transport.open_stream

    def open_stream(request: InferRequest, total_timeout: float | None) -> Any:
        stream = inner(request, total_timeout)
        if "control" in request.inputs:
            return stream
        receive = stream.receive

        async def slow(timeout: float | None) -> InferResponse | None:
            while not release.is_set():
                await asyncio.sleep(0.01)
            return await receive(timeout)

        stream.receive = slow
        return stream

    server.transport.open_stream = open_stream  # type: ignore[method-assign]
    gateway = start(server, keep_alive=0.05)
    with gateway.open_stream() as stream:
        assert [stream.readline(), stream.readline()] == [b":\n", b"\n"]
        release.set()
        rest = stream.read()
    assert rest.count(b"data:{") == 2


def test_cors_is_what_the_options_say(start: StartGateway) -> None:
    cors = CorsOptions(origins=("https://a.example",), methods=("GET",), headers=("x-one",), credentials=True)
    gateway = start(FakeTriton(), cors=cors)
    asked = {"origin": "https://a.example", "access-control-request-method": "GET"}
    allowed = gateway.call("OPTIONS", "/info", headers=asked).headers
    assert allowed["access-control-allow-origin"] == "https://a.example"
    assert allowed["access-control-allow-credentials"] == "true"
    for change in ({"origin": "https://b.example"}, {"access-control-request-method": "POST"}):
        assert gateway.call("OPTIONS", "/info", headers=asked | change).status == 400
    any_origin = CorsOptions(credentials=True)
    with pytest.raises(ValueError, match="--cors-allow-credentials"):
        GatewayConfig(cors=any_origin)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"triton_urls": ()}, "--triton-url"), ({"triton_urls": ("a:1", "a:1")}, "twice"),
        ({"workers": 0}, "--gateway-workers"),
        ({"metrics_urls": ("a", "b")}, "--metrics-url"), ({"body_timeout": 0.0}, "body_timeout"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatewayConfig(**options)


def test_options_survive_the_way_to_another_process_and_keys_are_not_shown() -> None:
    config = GatewayConfig(
        triton_urls=("a:1", "b:2"), api_keys=("secret-1",), admin_api_keys=("secret-2",), backend_admin_key="secret-3",
        cors=CorsOptions(origins=("https://a.example",)), workers=3,
    )  # fmt: skip
    assert GatewayConfig.from_json(config.to_json()) == config
    assert "secret" not in repr(config)
    assert config.prometheus_urls == ("http://a:8002/metrics", "http://b:8002/metrics")


def test_keys_come_from_a_file_and_the_environment(tmp_path) -> None:
    file = tmp_path / "keys"
    file.write_text("# people\none\n\n two \n")
    assert read_keys("KEYS", str(file), {"KEYS": "three,one"}) == ("three", "one", "two")
    assert read_keys("KEYS", None, {}) == ()
    file.write_text("not a key\n")
    with pytest.raises(ValueError, match="printable ASCII"):
        read_keys("KEYS", str(file), {})
    with pytest.raises(ValueError, match="cannot read keys"):
        read_keys("KEYS", str(tmp_path / "none"), {})


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/files", 404, "unknown_url"),
        ("POST", "/v1/moderations", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_supported"),
        ("DELETE", "/v1/models/a/b", 405, "method_not_supported"),
    ],
)
def test_paths_below_v1_that_are_not_there_are_refused_in_openais_words(
    start: StartGateway, method: str, path: str, status: int, code: str
) -> None:
    told = start(FakeTriton()).call(method, path)
    error = told.json["error"]
    assert (told.status, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert path in error["message"]
    assert told.headers["x-request-id"]
