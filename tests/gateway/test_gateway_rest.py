"""LoRAX's REST routes over a real tritonserver: routes R01-R15, bodies P01-P10, headers, events X01-X09, errors."""

from __future__ import annotations

import json
import time

import pytest
from gateway_calls import GatewayCaller, read_event, wait_until
from triton_calls import TritonCaller

pytestmark = pytest.mark.triton

TOKEN_FIELDS = {"id", "text", "logprob", "special", "skipped"}
DETAIL_FIELDS = {
    "finish_reason",
    "prompt_tokens",
    "generated_tokens",
    "skipped_tokens",
    "seed",
    "prefill",
    "tokens",
}
LONG = {"max_new_tokens": 3000, "ignore_eos_token": True}


def error_of(answer) -> tuple[int, str]:
    """Status and kind of an ErrorResponse, which has these two fields and no others."""
    assert set(answer.json) == {"error", "error_type"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["error"]
    return answer.status, answer.json["error_type"]


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_r01_r02_the_compat_routes_answer_a_list_of_one(gateway: GatewayCaller, path: str) -> None:
    answer = gateway.post(path, {"inputs": "hello", "parameters": {"max_new_tokens": 3}})
    assert answer.status == 200
    (only,) = answer.json
    assert set(only) == {"generated_text"}  # details were not asked for


def test_r01_the_compat_route_streams_if_the_body_says_so(gateway: GatewayCaller) -> None:
    answer = gateway.post(
        "/",
        {"inputs": "hello", "stream": True, "parameters": {"max_new_tokens": 4, "ignore_eos_token": True}},
    )
    assert answer.headers["content-type"] == "text/event-stream"
    assert len(answer.events) == 4


def test_r03_generate_answers_what_the_engine_says(
    gateway: GatewayCaller, triton_caller: TritonCaller
) -> None:
    answer = gateway.generate("hello there", max_new_tokens=6, ignore_eos_token=True)
    sampling = json.dumps({"ignore_eos_token": True})
    direct = triton_caller.generate(
        {"text_input": "hello there", "max_tokens": 6, "sampling_parameters": sampling}
    )
    assert answer.status == 200
    assert answer.json == {"generated_text": direct.text}


def test_p01_p02_p04_p07_details_have_loraxs_fields(gateway: GatewayCaller) -> None:
    body = gateway.generate("hello", max_new_tokens=5, ignore_eos_token=True, details=True).json
    details = body["details"]
    assert set(details) == DETAIL_FIELDS
    assert details["finish_reason"] == "length"
    assert (details["generated_tokens"], details["skipped_tokens"], details["seed"]) == (5, 0, None)
    assert details["prompt_tokens"] == len(gateway.post("/tokenize", {"inputs": "hello"}).json)
    assert len(details["tokens"]) == 5
    assert all(set(token) == TOKEN_FIELDS for token in details["tokens"])
    assert all(token["logprob"] <= 0 for token in details["tokens"])
    shown = "".join(token["text"] for token in details["tokens"] if not token["special"])
    assert shown == body["generated_text"]


def test_p05_alternative_tokens_come_when_asked_for_best_first(gateway: GatewayCaller) -> None:
    tokens = gateway.generate(max_new_tokens=2, details=True, return_k_alternatives=3).json["details"][
        "tokens"
    ]
    for token in tokens:
        logprobs = [other["logprob"] for other in token["alternative_tokens"]]
        assert len(logprobs) == 3
        assert logprobs == sorted(logprobs, reverse=True)
        assert set(token["alternative_tokens"][0]) == {"id", "text", "logprob"}


def test_p08_p09_x01_x03_a_stream_is_one_event_a_token_and_the_last_ends_it(gateway: GatewayCaller) -> None:
    answer = gateway.generate(
        "hello", "/generate_stream", max_new_tokens=5, ignore_eos_token=True, details=True
    )
    assert answer.body.startswith(b"data:{")
    events = answer.events
    assert len(events) == 5
    assert all(set(event) == {"token", "generated_text", "details"} for event in events)
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    whole = gateway.generate("hello", max_new_tokens=5, ignore_eos_token=True).json["generated_text"]
    assert events[-1]["generated_text"] == whole
    assert events[-1]["details"].keys() == {"finish_reason", "prompt_tokens", "generated_tokens", "seed"}
    assert b"[DONE]" not in answer.body


def test_p09_details_stay_away_from_streams_that_did_not_ask(gateway: GatewayCaller) -> None:
    events = gateway.generate("hello", "/generate_stream", max_new_tokens=2).events
    assert events[-1]["details"] is None
    assert events[-1]["generated_text"] is not None


def test_p10_the_stop_string_stays_in_the_text(gateway: GatewayCaller) -> None:
    free = gateway.generate(max_new_tokens=12, ignore_eos_token=True).json["generated_text"]
    stop = free[3:5]
    body = gateway.generate(max_new_tokens=12, ignore_eos_token=True, stop=[stop], details=True).json
    assert body["details"]["finish_reason"] == "stop_sequence"
    assert body["generated_text"] == free[: free.index(stop) + len(stop)]


def test_full_text_begins_with_the_prompt_also_at_the_end_of_a_stream(gateway: GatewayCaller) -> None:
    whole = gateway.generate("hello", max_new_tokens=3, return_full_text=True).json["generated_text"]
    events = gateway.generate("hello", "/generate_stream", max_new_tokens=3, return_full_text=True).events
    assert whole.startswith("hello")
    assert events[-1]["generated_text"] == whole


def test_the_timing_headers_are_whole_milliseconds_that_add_up(gateway: GatewayCaller) -> None:
    headers = gateway.generate("hello", max_new_tokens=5, ignore_eos_token=True).headers
    names = ("compute", "total", "validation", "queue", "inference")
    numbers = {name: int(headers[f"x-{name}-time"]) for name in names}
    assert numbers["compute"] == numbers["total"] >= numbers["inference"] >= 0
    for name in ("x-time-per-token", "x-time-to-first-token", "x-time-per-output-token", "x-skipped-tokens"):
        assert int(headers[name]) >= 0
    assert headers["x-generated-tokens"] == "5"
    assert int(headers["x-total-tokens"]) == 5 + int(headers["x-prompt-tokens"])
    assert headers["x-compute-characters"] == "5"
    assert headers["x-compute-type"] == "cpu"
    assert headers["x-model-id"] == gateway.get("/info").json["model_id"]
    assert "x-adapter-id" not in headers


def test_an_adapter_changes_the_answer_and_is_named_in_the_headers(
    gateway: GatewayCaller, gateway_adapter: str
) -> None:
    options = {"max_new_tokens": 8, "ignore_eos_token": True}
    with_it = gateway.generate("hello", **options, adapter_id=gateway_adapter, adapter_source="local")
    assert with_it.status == 200, with_it.body
    assert with_it.json != gateway.generate("hello", **options).json
    assert (with_it.headers["x-adapter-id"], with_it.headers["x-adapter-source"]) == (
        gateway_adapter,
        "local",
    )
    stream = gateway.generate("hello", "/generate_stream", **options, adapter_id=gateway_adapter)
    assert stream.headers["x-adapter-id"] == gateway_adapter
    assert stream.headers["x-accel-buffering"] == "no"
    assert stream.events[-1]["generated_text"] == with_it.json["generated_text"]
    assert gateway_adapter in {adapter["id"] for adapter in gateway.get("/adapters").json["adapters"]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"inputs": "hello"}),
        ("/classify", {"inputs": "hello"}),
        ("/classify_batch", {"inputs": ["hello", "there"]}),
    ],
)
def test_r08_r09_r10_what_this_model_cannot_do_is_refused_clearly(
    gateway: GatewayCaller, path: str, body: object
) -> None:
    answer = gateway.post(path, body)
    assert error_of(answer) == (422, "unsupported")
    assert "not served by this model" in answer.json["error"]


def test_r11_tokens_have_ids_pieces_and_places_in_characters(gateway: GatewayCaller) -> None:
    text = "hello wörld"
    tokens = gateway.post("/tokenize", {"inputs": text}).json
    assert all(set(token) == {"id", "text", "start", "stop"} for token in tokens)
    assert tokens[-1]["stop"] == len(text)
    bare = gateway.post("/tokenize", {"inputs": text, "add_special_tokens": False}).json
    assert [token["id"] for token in tokens][-len(bare) :] == [token["id"] for token in bare]


def test_r12_info_has_loraxs_facts(gateway: GatewayCaller) -> None:
    info = gateway.get("/info").json
    wanted = (
        "model_id model_sha model_dtype model_device_type model_pipeline_tag max_concurrent_requests max_best_of "
        "max_stop_sequences max_input_length max_total_tokens waiting_served_ratio max_batch_total_tokens "
        "max_waiting_tokens validation_workers eager_prefill version sha docker_label request_logger_url"
    )
    assert set(wanted.split()) <= set(info)
    assert (info["max_total_tokens"], info["model_device_type"]) == (4096, "cpu")
    assert info["servers"][0]["healthy"] is True


@pytest.mark.parametrize("path", ["/health", "/ping", "/", "/startup"])
def test_r13_r14_a_serving_gateway_is_healthy(gateway: GatewayCaller, path: str) -> None:
    answer = gateway.get(path)
    assert (answer.status, answer.body) == (200, b"")


def test_r14_startup_really_generates(gateway: GatewayCaller, triton_caller: TritonCaller) -> None:
    before = triton_caller.control("stats")["generated_tokens"]
    gateway.get("/startup")
    wait_until(lambda: triton_caller.control("stats")["generated_tokens"] == before + 1)


def test_r15_metrics_are_tritons_and_the_gateways_as_text_and_as_json(gateway: GatewayCaller) -> None:
    text = gateway.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    for name in (b"nv_inference_request_success", b"lorax_request_count", b"lorax_gateway_requests_total"):
        assert name in text.body
    by_header = gateway.get("/metrics", {"accept": "application/json"}).json
    by_query = gateway.get("/metrics?format=json").json
    assert by_header.keys() == by_query.keys()
    duration = by_query["lorax_request_duration"]
    assert duration["type"] == "histogram"
    assert {"sum", "count"} <= {item["key"].partition("{")[0].rpartition("_")[2] for item in duration["data"]}
    assert error_of(gateway.get("/metrics?format=xml")) == (422, "validation")


def test_r16_the_description_and_its_page_are_served_without_anything_from_elsewhere(
    gateway: GatewayCaller,
) -> None:
    description = gateway.get("/api-doc/openapi.json").json
    assert description["openapi"].startswith("3.")
    assert {"/embed", "/classify", "/generate", "/v1/chat/completions"} <= set(description["paths"])
    for path in ("/docs", "/playground"):
        page = gateway.get(path)
        assert page.headers["content-type"].startswith("text/html")
        assert b"http://" not in page.body
        assert b"https://" not in page.body


def test_x05_x06_failures_of_a_stream_are_events_after_a_status_of_200(gateway: GatewayCaller) -> None:
    answer = gateway.generate("hello", "/generate_stream", temperature=-1.0)
    assert answer.status == 200
    (event,) = answer.events
    assert event["error_type"] == "validation"
    assert "temperature" in event["error"]
    (event,) = gateway.generate("hello", "/generate_stream", adapter_id="/no/such/adapter").events
    assert event["error_type"] == "adapter_not_found"


@pytest.mark.parametrize("parameters", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}])
def test_x09_what_streams_cannot_do_is_a_validation_event(gateway: GatewayCaller, parameters: dict) -> None:
    (event,) = gateway.generate("hello", "/generate_stream", **parameters).events
    assert event["error_type"] == "validation"
    assert next(iter(parameters)) in event["error"]


def test_x07_leaving_a_stream_ends_it_on_the_server_at_once(
    gateway: GatewayCaller, triton_caller: TritonCaller
) -> None:
    waits = []
    for _ in range(5):
        with gateway.open_stream(**LONG) as stream:
            read_event(stream)
            assert triton_caller.control("stats")["running"] == 1
        waits.append(wait_until(lambda: triton_caller.control("info")["live_requests"] == 0, pause=0.002))
    assert sorted(waits)[2] < 0.25, waits  # perf/gateway_overhead.py measures it on a quiet machine
    wait_until(lambda: triton_caller.control("stats")["blocks_used"] == 0)


def test_x07_leaving_while_a_whole_answer_is_made_ends_it_too(
    gateway: GatewayCaller, triton_caller: TritonCaller
) -> None:
    body = json.dumps({"inputs": "hello", "parameters": LONG}).encode()
    head = "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    with gateway.raw(head.encode() + body):
        wait_until(lambda: triton_caller.control("stats")["running"] == 1)
    assert wait_until(lambda: triton_caller.control("info")["live_requests"] == 0) < 1.0


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"temperature": -1.0}, "temperature"), ({"top_p": 1.5}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": ["a"] * 20}, "stop"), ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": 100000}, "max_new_tokens"),
        ({"adapter_source": "moon", "adapter_id": "x"}, "adapter_source"),
        ({"truncate": 0}, "truncate"), ({"best_of": 2}, "best_of"), ({"top_k": "5"}, "top_k"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"), ({"do_sample": "yes"}, "do_sample"), ({"stop": "x"}, "stop"),
        ({"merged_adapters": {"ids": "a"}}, "merged_adapters.ids"), ({"seed": -1}, "seed"),
    ],
)  # fmt: skip
def test_e01_a_bad_parameter_is_a_validation_error_that_names_it(
    gateway: GatewayCaller, parameters: dict, field: str
) -> None:
    answer = gateway.generate("hello", **parameters)
    assert error_of(answer) == (422, "validation")
    assert field in answer.json["error"]


@pytest.mark.parametrize(
    "body", [{}, {"inputs": ""}, {"inputs": None}, {"inputs": 3}, {"inputs": ["a"]}, [], "text", None, 5,
             {"inputs": "a", "parameters": 3}, {"inputs": "\ud800"}]
)  # fmt: skip
def test_e01_e12_a_body_of_the_wrong_shape_is_a_validation_error(
    gateway: GatewayCaller, body: object
) -> None:
    for path in ("/generate", "/generate_stream", "/"):
        answer = gateway.post(path, json.dumps(body).encode())
        if answer.status == 200:  # a stream tells of empty texts in an event
            assert answer.events[0]["error_type"] == "validation"
        else:
            assert error_of(answer) == (422, "validation")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"inputs": NaN}', b"[" * 50_000])
def test_malformed_json_is_a_400(gateway: GatewayCaller, body: bytes) -> None:
    assert error_of(gateway.post("/generate", body)) == (400, "invalid_json")


def test_a_body_that_is_not_json_by_its_header_is_a_415(gateway: GatewayCaller) -> None:
    for kind in ("text/plain", "", "application/x-www-form-urlencoded"):
        answer = gateway.call("POST", "/generate", b'{"inputs": "a"}', {"content-type": kind})
        assert error_of(answer) == (415, "unsupported_media_type")
    assert gateway.call(
        "POST", "/generate", b'{"inputs": "a", "parameters": {"max_new_tokens": 1}}',
        {"content-type": "Application/JSON; charset=utf-8"},
    ).status == 200  # fmt: skip


def test_a_body_that_is_too_long_is_a_413_whether_it_says_so_or_not(gateway: GatewayCaller) -> None:
    answer = gateway.post("/generate", {"inputs": "a" * (3 << 20)})
    assert error_of(answer) == (413, "payload_too_large")
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    with gateway.raw(head) as connection:
        for _ in range(40):
            connection.sendall(b"10000\r\n" + b"a" * 65536 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_arrive_is_a_408(gateway: GatewayCaller) -> None:
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    started = time.monotonic()
    with gateway.raw(head) as connection, connection.makefile("rb") as file:
        answered = file.read()  # to the connection's end
    assert answered.startswith(b"HTTP/1.1 408")
    assert b'"error_type": "request_timeout"' in answered
    assert time.monotonic() - started < 10


def test_unknown_paths_and_methods_are_errors_of_the_same_shape(gateway: GatewayCaller) -> None:
    assert error_of(gateway.get("/nothing")) == (404, "not_found")
    assert error_of(gateway.get("/generate")) == (405, "method_not_allowed")
    assert error_of(gateway.post("/adapters/fly", {"adapter_id": "x"})) == (404, "not_found")


def test_e03_a_missing_adapter_is_a_404_of_its_own_kind(gateway: GatewayCaller) -> None:
    answer = gateway.generate("hello", adapter_id="/no/such/adapter", adapter_source="local")
    assert error_of(answer) == (404, "adapter_not_found")
    assert "/no/such/adapter" in answer.json["error"]


def test_parameters_nobody_knows_are_ignored_as_in_lorax_and_named_in_a_header(
    gateway: GatewayCaller,
) -> None:
    body = {
        "inputs": "hello",
        "frob": 1,
        "parameters": {"max_new_tokens": 1, "temprature": 0.5, "top_k": None},
    }
    answer = gateway.post("/generate", body)
    assert answer.status == 200
    assert answer.headers["x-ignored-parameters"] == "temprature"


def test_every_answer_carries_a_request_id_and_a_sensible_one_of_the_callers_is_kept(
    gateway: GatewayCaller,
) -> None:
    assert gateway.get("/health", {"x-request-id": "my-request.7"}).headers["x-request-id"] == "my-request.7"
    made = {gateway.get("/nothing").headers["x-request-id"] for _ in range(3)}
    made.add(gateway.get("/health", {"x-request-id": "a" * 500}).headers["x-request-id"])
    assert len(made) == 4
    assert all(len(request_id) == 32 for request_id in made)


def test_two_requests_of_one_id_do_not_end_each_other(gateway: GatewayCaller) -> None:
    headers = {"x-request-id": "twin"}
    with gateway.open_stream(headers=headers, max_new_tokens=200, ignore_eos_token=True) as first:
        read_event(first)
        with gateway.open_stream(headers=headers, **LONG) as second:
            read_event(second)
        events = []
        while (event := read_event(first)) is not None:
            events.append(event)
    assert events[-1]["generated_text"] is not None


def test_browsers_of_any_origin_may_call(gateway: GatewayCaller) -> None:
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    answer = gateway.call("OPTIONS", "/generate", headers=asked)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "POST" in answer.headers["access-control-allow-methods"]
