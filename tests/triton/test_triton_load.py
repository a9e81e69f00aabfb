"""Many requests at once, and requests whose callers go away."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection

import grpc
import pytest

pytestmark = pytest.mark.triton

PATIENCE_S = 60.0
EXACT = {"ignore_eos_token": True}
LONG = {"text_input": "hello world", "max_tokens": 4000, "stream": True}
# A client in a process of its own: says when its stream has begun, then reads on until it is killed.
CLIENT = """
import sys
from triton_calls import TritonCaller
inputs = {"text_input": "hello world", "max_tokens": 4000, "stream": True}
stream = iter(TritonCaller(sys.argv[1]).stream(inputs, parameters={"ignore_eos_token": True}))
next(stream)
print("begun", flush=True)
for _ in stream:
    pass
"""


def wait_until_idle(caller):
    """Ask for the engine's state until nothing runs and no block is held; the tokens it has generated so far."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        stats = caller.control("stats")
        if stats["running"] == stats["waiting"] == stats["blocks_used"] == 0:
            return stats["generated_tokens"]
        assert time.monotonic() < deadline, stats


@contextmanager
def freed_early(caller):
    """The one long request within is ended long before its answer would be: told by tokens, not by the clock, which on
    a busy machine says nothing."""
    before = wait_until_idle(caller)
    yield
    assert wait_until_idle(caller) - before < LONG["max_tokens"] - 100


def test_64_concurrent_streams_get_what_each_gets_alone(caller, tiny_adapters):
    adapters = ["", *tiny_adapters]
    requests = [
        {
            "text_input": f"{'the world is ' * (i % 7)}word number {i}",
            "max_tokens": 16 + i % 33,
            "adapter_id": adapters[i % len(adapters)],
            "stream": True,
            "return_token_ids": True,
        }
        for i in range(64)
    ]

    streams = [caller.stream(request, parameters=EXACT) for request in requests]
    together = [stream.rest() for stream in streams]
    alone = [caller.generate({**request, "stream": False}, parameters=EXACT) for request in requests]

    assert [answer.error for answer in together] == [None] * 64
    for request, answer, expected in zip(requests, together, alone, strict=True):
        assert len(answer.token_ids) == request["max_tokens"]
        assert answer.token_ids == expected.token_ids
        assert answer.text == expected.text
        assert [part.final for part in answer.responses] == [False] * (len(answer.responses) - 1) + [True]
    wait_until_idle(caller)
    caller.control("check")


def test_a_cancelled_call_frees_its_blocks(caller):
    with freed_early(caller):
        stream = caller.stream(LONG, parameters=EXACT)
        stream.first_text()
        assert caller.control("stats")["blocks_used"] > 0

        stream.cancel()


def test_a_killed_client_frees_its_blocks(server, caller, request):
    tests = str(request.config.rootpath / "tests")
    with (
        freed_early(caller),
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path.insert(0, {tests!r})\n{CLIENT}",
                server.grpc_address,
            ],
            stdout=subprocess.PIPE,
            text=True,
        ) as client,
    ):
        assert client.stdout.readline() == "begun\n"
        assert caller.control("stats")["blocks_used"] > 0
        client.send_signal(signal.SIGKILL)


def test_an_http_client_that_hangs_up_frees_its_blocks(server, caller):
    body = json.dumps(
        {"text_input": "hello world", "max_tokens": 4000, "stream": True, "ignore_eos_token": True}
    )
    with freed_early(caller), closing(HTTPConnection(server.http_address, timeout=30.0)) as connection:
        connection.request("POST", "/v2/models/lorax/generate_stream", body)
        assert connection.getresponse().readline().startswith(b"data: ")
        assert caller.control("stats")["blocks_used"] > 0


def test_an_ensemble_caller_cancels_by_its_request_id(caller):
    request_id = str(uuid.uuid4())
    with freed_early(caller):
        stream = caller.stream(LONG, parameters=EXACT, model="lorax_ensemble", request_id=request_id)
        stream.first_text()

        assert caller.control("cancel", request_id=request_id) == {"cancelled": True}

        assert stream.rest().error["error_type"] == "cancelled"
    assert caller.control("cancel", request_id=request_id) == {"cancelled": False}


def test_a_deadline_of_the_caller_frees_its_blocks(caller):
    with freed_early(caller):
        stream = caller.stream(LONG, parameters=EXACT, timeout=0.5)

        with pytest.raises(grpc.RpcError) as caught:
            stream.rest()

        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_clients_that_come_and_go_leave_nothing_behind(caller, tiny_adapters):
    def visit(i):
        stream = caller.stream({**LONG, "adapter_id": ["", *tiny_adapters][i % 4]}, parameters=EXACT)
        if i % 3:
            stream.first_text()
        stream.cancel()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(48)))

    wait_until_idle(caller)
    caller.control("check")
