"""The gateway's pure parts: which server owns an adapter, Prometheus pages, counts, names in errors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.counters import Counters, create_file
from lorax_backend.gateway.errors import from_lorax_error
from lorax_backend.gateway.generation import Generation, model_headers
from lorax_backend.gateway.prometheus import label_samples, merge, to_json
from lorax_backend.gateway.rendezvous import ranking
from lorax_backend.gateway.server import GatewayError, bind
from lorax_triton.errors import RequestTimeoutError, ServerConnectionError, parse_error

PAGE = """# HELP depth how deep
# TYPE depth gauge
depth 3
depth{model="a",} 4
# HELP wait how long
# TYPE wait histogram
wait_bucket{le="0.1"} 1
wait_bucket{le="+Inf"} 2
wait_sum 0.7
wait_count 2
odd NaN
"""
KEYS = [f"hub:org/adapter-{index}" for index in range(600)]


def owner(key: str, servers: list[str]) -> str:
    return servers[ranking(key, servers, [0] * len(servers))[0]]


def test_taking_a_server_away_moves_only_its_own_adapters() -> None:
    servers = ["a:1", "b:1", "c:1", "d:1"]
    before = {key: owner(key, servers) for key in KEYS}
    after = {key: owner(key, servers[:-1]) for key in KEYS}
    assert all(after[key] == before[key] for key in KEYS if before[key] != "d:1")
    shares = Counter(before.values())
    assert all(90 < shares[server] < 210 for server in servers)  # 150 each, were they dealt evenly


@given(st.permutations(["a:1", "b:1", "c:1"]), st.sampled_from(KEYS))
def test_every_gateway_agrees_whatever_the_order_of_its_options(order: list[str], key: str) -> None:
    assert owner(key, order) == owner(key, ["a:1", "b:1", "c:1"])


def test_a_server_far_busier_than_the_others_gives_way() -> None:
    servers = ["a:1", "b:1", "c:1"]
    first, second, _ = ranking(KEYS[0], servers, [0, 0, 0])
    load = [4, 4, 4]
    assert ranking(KEYS[0], servers, load)[0] == first
    load[first] = 40
    assert ranking(KEYS[0], servers, load)[0] == second


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_requests_without_an_adapter_go_to_the_least_busy(in_flight: list[int]) -> None:
    servers = [f"{index}:1" for index in range(len(in_flight))]
    order = ranking(None, servers, in_flight)
    assert sorted(order) == list(range(len(servers)))
    assert in_flight[order[0]] == min(in_flight)


def test_pages_of_several_servers_become_one_that_declares_each_metric_once() -> None:
    page = merge([label_samples(PAGE, "server", 'x"1'), label_samples(PAGE, "server", "y")])
    assert page.count("# TYPE wait histogram") == 1
    assert 'depth{server="x\\"1"} 3' in page
    assert 'depth{model="a",server="y"} 4' in page
    assert 'wait_bucket{le="+Inf",server="y"} 2' in page


def test_the_json_form_has_loraxs_keys() -> None:
    shown = to_json(PAGE)
    assert shown["depth"] == {
        "type": "gauge",
        "data": [{"key": "depth", "value": 3.0}, {"key": 'depth{model="a",}', "value": 4.0}],
    }
    assert [item["key"] for item in shown["wait"]["data"]][-2:] == ["sum", "count"]
    assert shown["odd"]["data"] == [{"key": "odd", "value": None}]


def test_counts_of_all_workers_add_up(tmp_path: Path) -> None:
    path = create_file(3, tmp_path)
    workers = [Counters(path, index) for index in range(3)]
    for index, worker in enumerate(workers):
        worker.add("disconnects", index + 1)
        worker.request("generate", 200)
    workers[0].request("generate", 429)
    workers[0].request("generate", 499)
    for worker in workers:
        assert worker.total("disconnects") == 6
        assert 'requests_total{route="generate",status="2xx"} 3' in worker.render()
        assert 'status="429"} 1' in worker.render()
        assert 'status="4xx"} 1' in worker.render()


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ServerConnectionError("gone"), 503, "unavailable"),
        (RequestTimeoutError("slow"), 504, "timeout"),
        (parse_error(404, {"error": "no such model"}), 503, "unavailable"),
        (parse_error(500, {"error": "what"}), 500, "generation"),
        (parse_error(422, {"error": "max_tokens: no", "error_type": "validation"}), 422, "validation"),
    ],
)
def test_failures_on_the_way_to_a_server_have_a_status_and_a_kind(error, status: int, kind: str) -> None:
    shown = from_lorax_error(error)
    assert (shown.status, shown.error_type) == (status, kind)


def test_errors_name_fields_as_loraxs_callers_know_them() -> None:
    text = "max_tokens: 9 (in sampling_parameters) with text_input; my_max_tokens_x stays"
    shown = from_lorax_error(parse_error(422, {"error": text, "error_type": "validation"}))
    assert shown.message == "max_new_tokens: 9 (in parameters) with inputs; my_max_tokens_x stays"


def test_only_what_the_caller_gave_travels_to_the_engine() -> None:
    parameters = {"top_k": 5, "top_p": None, "n": 3, "details": True, "frob": 1, "adapter_id": "a/b"}
    generation = Generation("x", parameters, False, "id")
    inputs = generation.encode().inputs
    assert inputs["sampling_parameters"].values == ['{"top_k": 5}']
    assert inputs["adapter_id"].values == ["a/b"]
    assert inputs["return_tokens"].values == [True]
    assert generation.ignored == ["frob", "n"]


def test_no_text_of_a_caller_makes_a_header_that_readers_choke_on() -> None:
    parameters = {
        "adapter_id": "a\r\nx-evil: 1" + "\u00fc" * 100_000,
        "adapter_source": "s" * 100_000,
        "k" * 100_000: 1,
    }
    headers = model_headers(Generation("x", parameters, False, "id"), {"model_id": "m" * 100_000})
    assert headers["x-adapter-id"].startswith("a??x-evil: 1??")
    assert headers["x-ignored-parameters"].startswith("kkk")
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    assert sum(map(len, headers.values())) < 4096  # what the strictest proxies take


def test_a_taken_port_is_named_with_a_remedy() -> None:
    first = bind(GatewayConfig(host="127.0.0.1", port=0))
    try:
        port = first.getsockname()[1]
        with pytest.raises(GatewayError, match=rf"cannot listen on 127.0.0.1:{port}: .*choose another port"):
            bind(GatewayConfig(host="127.0.0.1", port=port))
        # Only so does asyncio switch Nagle's algorithm off, which would hold first tokens back for 40 ms.
        assert first.proto != 0
    finally:
        first.close()
