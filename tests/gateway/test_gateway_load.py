"""Many streams at once, many of them left in the middle; perf/gateway_soak.py does the same with a thousand."""

from __future__ import annotations

import asyncio

import pytest
from gateway_calls import GatewayCaller, wait_until
from gateway_soak import gateway_metrics, load
from triton_calls import TritonCaller

pytestmark = [pytest.mark.triton, pytest.mark.slow]
REQUESTS, STREAMS = 150, 40


def test_streams_that_are_left_leave_nothing_behind_and_counts_agree(
    gateway: GatewayCaller, triton_caller: TritonCaller
) -> None:
    address = (gateway.host, gateway.port)
    before, stats_before = gateway_metrics(address), triton_caller.control("stats")
    seen = asyncio.run(load(address, REQUESTS, STREAMS, seed=3))
    wait_until(lambda: triton_caller.control("info")["live_requests"] == 0)
    wait_until(lambda: triton_caller.control("stats")["blocks_used"] == 0)
    assert triton_caller.control("stats")["running"] == 0
    assert triton_caller.control("check") is not None  # the engine's own invariants
    assert set(seen.ends) <= {"whole", "left by the caller"}
    assert sum(seen.ends.values()) == REQUESTS
    assert seen.ends["left by the caller"] > 10

    wait_until(lambda: gateway_metrics(address)["lorax_gateway_streams_in_flight"] == 0)
    after = gateway_metrics(address)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('lorax_gateway_requests_total{route="generate_stream",status="2xx"}') == REQUESTS
    assert 0 < grown("lorax_gateway_disconnects_total") <= seen.ends["left by the caller"]
    generated = triton_caller.control("stats")["generated_tokens"] - stats_before["generated_tokens"]
    counted = grown("lorax_gateway_generated_tokens_total")
    assert seen.tokens_of_whole_answers <= counted <= generated
