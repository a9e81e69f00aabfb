"""Metrics from Triton's metrics port, as text and as an object."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lorax_triton import AsyncClient, Client, LoraxError, ServerConnectionError, ValidationError
from lorax_triton.metrics import metrics_address, parse_prometheus

PAGE = """\
# HELP nv_inference_count Number of inferences
# TYPE nv_inference_count counter
nv_inference_count{model="lorax",version="1"} 3
nv_inference_count{model="a \\"b\\" \\\\ c\\n",version="2"} 4 1700000000000

# HELP lorax_queue_size Requests that wait
# TYPE lorax_queue_size gauge
lorax_queue_size 2.5
# TYPE wait_s histogram
wait_s_bucket{le="0.1"} 1
wait_s_bucket{le="+Inf"} 2
wait_s_sum 0.3
wait_s_count 2
undeclared_count -Inf
not_a_number NaN
"""


@pytest.fixture
def page() -> Iterator[str]:
    """The address of a metrics page; /broken answers with an error."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            broken = self.path != "/metrics"
            self.send_response(503 if broken else 200)
            self.end_headers()
            self.wfile.write(b"not now" if broken else PAGE.encode())

        def log_message(self, *args: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_metrics_come_as_the_servers_text_or_as_an_object(page: str) -> None:
    with Client("localhost:1", metrics_url=page) as client:
        assert client.metrics() == PAGE
        found = client.metrics("json")
    assert isinstance(found, dict)
    assert found["lorax_queue_size"] == {
        "type": "gauge",
        "help": "Requests that wait",
        "samples": [{"labels": {}, "value": 2.5}],
    }
    assert json.dumps(found)

    async def main() -> tuple[object, object]:
        async with AsyncClient("localhost:1", metrics_url=page) as client:
            return await client.metrics(), await client.metrics(format="json")

    text, same = asyncio.run(main())
    assert text == PAGE
    assert json.dumps(same) == json.dumps(found)


def test_histograms_keep_their_samples_together_and_labels_are_unescaped() -> None:
    found = parse_prometheus(PAGE)
    assert [sample["name"] for sample in found["wait_s"]["samples"]] == [
        *["wait_s_bucket"] * 2,
        "wait_s_sum",
        "wait_s_count",
    ]
    assert found["wait_s"]["samples"][1]["labels"] == {"le": "+Inf"}
    assert found["nv_inference_count"]["samples"][1] == {
        "labels": {"model": 'a "b" \\ c\n', "version": "2"},
        "value": 4.0,
    }
    assert found["undeclared_count"]["samples"][0]["value"] == -math.inf
    assert math.isnan(found["not_a_number"]["samples"][0]["value"])
    assert found["not_a_number"]["type"] == "untyped"


@pytest.mark.parametrize("line", ["no number here", "a{b=1", "1abc 2", 'a{b="c"} x'])
def test_a_page_that_is_no_metrics_is_an_error_that_shows_the_line(line: str) -> None:
    with pytest.raises(LoraxError, match="cannot be read"):
        parse_prometheus(f"ok 1\n{line}\n")


def test_every_failure_to_fetch_is_an_error_of_this_package(page: str) -> None:
    with Client("localhost:1", metrics_url=f"{page}/broken") as client:
        with pytest.raises(LoraxError, match="not now") as caught:
            client.metrics()
        assert caught.value.status == 503
        with pytest.raises(ValidationError, match="format"):
            client.metrics("xml")
    with (
        Client("localhost:1", metrics_url="http://127.0.0.1:1/metrics") as client,
        pytest.raises(ServerConnectionError, match="metrics_url"),
    ):
        client.metrics()


@pytest.mark.parametrize(
    ("target", "given", "expected"),
    [
        ("host:8001", None, "http://host:8002/metrics"),
        ("[::1]:9", None, "http://[::1]:8002/metrics"),
        ("unix:/run/triton", None, "http://localhost:8002/metrics"),
        ("host:8001", "other:9", "http://other:9/metrics"),
        ("host:8001", "https://other/m", "https://other/m"),
        ("host:8001", "http://other/", "http://other/metrics"),
    ],
)
def test_the_address_is_the_metrics_port_of_the_same_host_unless_given(
    target: str, given: str | None, expected: str
) -> None:
    assert metrics_address(target, given) == expected


def test_an_address_that_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="metrics_url"):
        Client("localhost:1", metrics_url="grpc://host:8002")
