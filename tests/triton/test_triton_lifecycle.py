"""Servers from start to end: configuration, readiness, failures, draining."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from triton_calls import http_get, http_post

from lorax_backend.server import processes
from lorax_backend.server.installation import find_tritonserver
from lorax_backend.server.launch import ServerFailedError

pytestmark = pytest.mark.triton

CHECKOUT = Path(__file__).parents[2] / "model_repository"
PROMPT = {"text_input": "hello world", "return_token_ids": True}
EXACT = {"ignore_eos_token": True}
LONG = {**PROMPT, "max_tokens": 4000, "stream": True}


def wait_for(condition, seconds):
    """Look until `condition` holds; the looking itself is what waits."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"


def engine_processes(server):
    """Python processes below the stubs."""
    stubs = processes.stubs(server.pid)
    return [pid for pid in processes.session_members(server.pid) if pid not in (server.pid, *stubs)]


def test_an_engine_in_a_process_of_its_own_answers_alike_and_its_death_reaches_every_caller(
    caller, start_tiny
):
    server, own = start_tiny(engine_process="true")
    inputs = {**PROMPT, "max_tokens": 20}
    assert (
        own.generate(inputs, parameters=EXACT).token_ids
        == caller.generate(inputs, parameters=EXACT).token_ids
    )
    streams = [own.stream(LONG, parameters=EXACT) for _ in range(4)]
    for stream in streams:
        stream.first_text()

    processes.kill(engine_processes(server))

    assert [stream.rest().error["error_type"] for stream in streams] == ["engine_dead"] * 4
    assert own.generate(inputs).error["error_type"] == "engine_dead"
    assert "the engine died" in server.wait(poll_s=0.2).reason


def test_after_kill_9_of_the_stub_no_caller_hangs_and_nothing_is_left(start_tiny):
    server, caller = start_tiny(engine_process="true")
    patient, brief = (caller.stream(LONG, parameters=EXACT, timeout=seconds) for seconds in (60.0, 4.0))
    for stream in (patient, brief):
        stream.first_text()
    children = engine_processes(server)
    regions = processes.shared_memory_regions(server.pid)
    assert children
    assert regions

    processes.kill(processes.stubs(server.pid))

    with pytest.raises(grpc.RpcError) as caught:
        brief.rest()
    # The server keeps its callers waiting, unless losing its model brings it down as well.
    assert caught.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
    wait_for(lambda: all(processes.is_dead(pid) for pid in children), 60.0)
    # Whoever watches the server ends it, which tells the callers that would still wait.
    ended = server.wait(poll_s=0.2)
    assert "process died" in ended.reason
    with pytest.raises(grpc.RpcError):
        patient.rest()
    assert not [path for path in regions if path.exists()]
    assert all(processes.is_dead(pid) for pid in processes.session_members(server.pid))


def test_sigterm_lets_a_running_stream_have_all_its_tokens(start_tiny):
    server, caller = start_tiny()
    stream = caller.stream({**LONG, "max_tokens": 1500}, parameters=EXACT)
    first = stream.first_text()

    os.kill(server.pid, signal.SIGTERM)
    rest = stream.rest()

    assert rest.error is None
    assert len(first.outputs["token_ids"]) + len(rest.token_ids) == 1500
    caller.close()
    assert server.wait().returncode == 0


def test_the_checked_in_repository_starts_with_plain_tritonserver_and_the_environment(
    start_server, connect, tiny_llama, tiny_adapters
):
    server = start_server(
        {},
        repository=CHECKOUT,
        arguments=(),
        env={
            "MODEL_ID": str(tiny_llama),
            "DEVICE": "cpu",
            "MAX_TOTAL_TOKENS": "99",
            "NUM_BLOCKS": "40",
            "DEFAULT_ADAPTER_SOURCE": "local",
        },
    )
    caller = connect(server)

    info = caller.control("info")
    answer = caller.generate(
        {**PROMPT, "max_tokens": 5, "adapter_id": tiny_adapters[0]}, model="lorax_ensemble"
    )

    assert (info["model_id"], info["max_total_tokens"], info["num_blocks"]) == (str(tiny_llama), 99, 40)
    assert answer.error is None


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("model_id", "/no/such/folder", ["/no/such/folder"]),
        ("max_total_tokens", "many", ["max_total_tokens", "many"]),
        ("num_blocs", "3", ["num_blocs", "did you mean num_blocks"]),
    ],
)
def test_a_model_that_cannot_load_says_why(start_tiny, option, value, words):
    with pytest.raises(ServerFailedError) as caught:
        start_tiny(**{option: value})

    for word in words:
        assert word in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "At:" not in str(caught.value)


def test_weights_that_do_not_fit_their_configuration_say_so(start_tiny, tmp_path, tiny_llama):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_llama.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = broken / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 96'))

    with pytest.raises(ServerFailedError, match=r"gate_proj|up_proj|down_proj"):
        start_tiny(engine_process="true", model_id=str(broken))


def test_the_metrics_page_shows_the_services_counters(server, caller):
    def counted():
        page = http_get(server.metrics_address, "/metrics")
        lines = [line for line in page.splitlines() if line.startswith("lorax_") and 'model="lorax"' in line]
        return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}

    answer = caller.generate({**PROMPT, "max_tokens": 7}, parameters=EXACT)
    assert answer.error is None

    wait_for(lambda: any(value >= 7 for name, value in counted().items() if "generated_tokens" in name), 60.0)
    assert len(counted()) >= 5


def test_the_metrics_page_follows_adapters_and_forgets_which_ran_before(server, caller, tiny_adapters):
    def lines(name):
        page = http_get(server.metrics_address, "/metrics")
        return [line for line in page.splitlines() if line.startswith(name + "{")]

    def listed():
        return [line for line in lines("lorax_lora_requests_info") if tiny_adapters[0] in line]

    long = {**PROMPT, "max_tokens": 1500, "adapter_id": tiny_adapters[0], "stream": True}
    stream = caller.stream(long, parameters=EXACT)
    wait_for(listed, 60.0)
    assert len(lines("lorax_lora_requests_info")) <= 2  # the one before goes right after
    assert stream.rest().error is None

    wait_for(lambda: not listed(), 60.0)
    wait_for(lambda: len(lines("lorax_lora_requests_info")) == 1, 60.0)
    adapter = f'adapter="local:{tiny_adapters[0]}"'
    wait_for(lambda: any(adapter in line for line in lines("lorax_adapter_generated_tokens_total")), 60.0)
    loads = [line for line in lines("lorax_adapter_load_duration_count") if 'tier="device"' in line]
    assert float(loads[0].rpartition(" ")[2]) >= 1
    assert len(lines("lorax_cache_config_info")) == 1


def test_an_unloaded_model_finishes_its_streams_and_can_be_loaded_and_stopped(start_tiny):
    server, caller = start_tiny()
    stream = caller.stream({**LONG, "max_tokens": 1500}, parameters=EXACT)
    first = stream.first_text()

    def repository(action):
        return http_post(server.http_address, f"/v2/repository/{action}", {})

    assert repository("models/lorax/unload") == (200, "")
    rest = stream.rest()
    assert len(first.outputs["token_ids"]) + len(rest.token_ids) == 1500
    wait_for(lambda: '"UNAVAILABLE"' in repository("index")[1], 60.0)

    assert repository("models/lorax/load") == (200, "")
    assert caller.generate({**PROMPT, "max_tokens": 3}, parameters=EXACT).error is None

    caller.close()
    assert server.terminate() == 0
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        http_get(server.http_address, "/v2/health/live")
    assert all(processes.is_dead(pid) for pid in processes.session_members(server.pid))


def test_without_room_in_shared_memory_the_large_answer_fails_and_the_others_go_on(
    start_server, connect, tiny_llama, tmp_path
):
    own_memory = 'mount -t tmpfs -o size=2500k tmpfs /dev/shm && exec "$0" "$@"'
    may_mount = subprocess.run(
        ["unshare", "-m", "sh", "-c", own_memory, "true"], capture_output=True, check=False
    )
    if may_mount.returncode != 0:
        pytest.skip("this user may not mount a small /dev/shm")
    real = find_tritonserver()
    wrapper = tmp_path / "tritonserver"
    wrapper.write_text(f"#!/bin/sh\nexec unshare -m sh -c '{own_memory}' '{real.executable}' \"$@\"\n")
    wrapper.chmod(0o755)
    server = start_server(
        {"model_id": str(tiny_llama)}, installation=replace(real, executable=wrapper), models=("lorax",)
    )
    caller = connect(server)
    other = caller.stream({**LONG, "max_tokens": 2500}, parameters=EXACT)
    first = other.first_text()

    sampling = json.dumps({"return_k_alternatives": 30, **EXACT})
    large = caller.generate({**PROMPT, "max_tokens": 1000, "sampling_parameters": sampling})

    assert large.error["error_type"] == "generation"
    assert "shared memory" in large.error["error"]
    rest = other.rest()
    assert rest.error is None
    assert len(first.outputs["token_ids"]) + len(rest.token_ids) == 2500
    caller.control("check")
