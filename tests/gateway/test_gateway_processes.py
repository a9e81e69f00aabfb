"""The gateway as processes: several workers on one port, draining, and its words on the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gateway_calls import GatewayCaller, read_event, wait_until
from triton_calls import TritonCaller

from lorax_backend.cli.main import main
from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.process import GatewayProcess
from lorax_backend.server.launch import TritonServer
from lorax_backend.server.processes import free_ports

pytestmark = pytest.mark.triton


@pytest.fixture
def start_process() -> Iterator[Callable[[GatewayConfig], tuple[GatewayProcess, GatewayCaller]]]:
    """`start_process(config)` -> a running gateway process, ended with the test, and a caller of it."""
    started: list[GatewayProcess] = []

    def start(config: GatewayConfig) -> tuple[GatewayProcess, GatewayCaller]:
        process = GatewayProcess(config, lambda line: None, lambda: None)
        started.append(process)
        process.start()
        return process, GatewayCaller("127.0.0.1", int(process.address.rpartition(":")[2]))

    yield start
    for process in started:
        process.kill()


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_several_workers_share_the_port_and_their_counts_and_a_dead_one_is_replaced(
    triton: TritonServer, config_for: Callable[..., GatewayConfig], start_process
) -> None:
    process, caller = start_process(config_for(triton, workers=2))
    owner = process._process.pid
    wait_until(lambda: caller.get("/health").status == 200)
    workers = children(owner)
    assert len(workers) == 2
    for _ in range(10):
        assert caller.generate(max_new_tokens=1).status == 200
    # Whichever worker answers, it reports all ten.
    assert b'requests_total{route="generate",status="2xx"} 10\n' in caller.get("/metrics").body
    os.kill(workers[0], signal.SIGKILL)
    wait_until(lambda: len(children(owner)) == 2 and workers[0] not in children(owner))
    for _ in range(10):
        assert caller.generate(max_new_tokens=1).status == 200
    pids = children(owner)
    process.drain(20.0)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_sigterm_lets_a_stream_finish_and_takes_nobody_new(
    triton: TritonServer, config_for: Callable[..., GatewayConfig], start_process
) -> None:
    process, caller = start_process(config_for(triton))
    with caller.open_stream(max_new_tokens=400, ignore_eos_token=True) as stream:
        assert read_event(stream)["token"]
        process._stopping = True
        process._process.send_signal(signal.SIGTERM)
        count = 1
        while (event := read_event(stream)) is not None:
            count, last = count + 1, event
    assert (count, last["generated_text"] is not None) == (400, True)
    assert process._process.wait(20.0) == 0
    with pytest.raises(OSError, match="refused"):
        caller.get("/health")


def test_draining_does_not_wait_for_ever(
    triton: TritonServer, triton_caller: TritonCaller, config_for: Callable[..., GatewayConfig], start_process
) -> None:
    process, caller = start_process(config_for(triton, drain_timeout=1.0))
    with caller.open_stream(max_new_tokens=4000, ignore_eos_token=True) as stream:
        read_event(stream)
        process.drain(30.0)
    wait_until(lambda: triton_caller.control("info")["live_requests"] == 0)


def test_a_gateway_ends_with_its_owner(
    triton: TritonServer, config_for: Callable[..., GatewayConfig], start_process
) -> None:
    process, _ = start_process(config_for(triton))
    process._stopping = True
    process._process.stdin.close()
    assert process._process.wait(20.0) == 0


def test_requests_reach_the_server_that_is_there_when_another_is_not(
    triton: TritonServer, start_process
) -> None:
    (nobody,) = free_ports(1, "127.0.0.1")
    urls = (f"127.0.0.1:{nobody}", triton.grpc_address)
    _, caller = start_process(GatewayConfig(triton_urls=urls, host="127.0.0.1", port=0))
    for adapter in ("", "/no/such/a", "/no/such/b", "/no/such/c"):
        status = caller.generate(max_new_tokens=1, adapter_id=adapter, adapter_source="local").status
        assert status == (404 if adapter else 200)
    assert {server["healthy"] for server in caller.get("/info").json["servers"]} == {True, False}


def test_the_command_starts_a_gateway_that_says_where_and_stops_at_sigterm(triton: TritonServer) -> None:
    (port,) = free_ports(1, "127.0.0.1")
    command = [sys.executable, "-m", "lorax_backend.cli", "gateway", "--hostname", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, f"--port={port}", f"--triton-url={triton.grpc_address}"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"gateway on http://127.0.0.1:{port} for {triton.grpc_address}" in line
        caller = GatewayCaller("127.0.0.1", port)
        wait_until(lambda: caller.generate(max_new_tokens=1).status == 200)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20.0)
        process.stdout.close()
    assert process.returncode == 0


def test_the_command_says_readably_why_it_cannot_start(
    gateway: GatewayCaller, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gateway", "--hostname", "127.0.0.1", "--port", str(gateway.port)]) == 1
    message = capsys.readouterr().err
    assert (
        f"cannot listen on 127.0.0.1:{gateway.port}: Address already in use; choose another port" in message
    )
    assert main(["gateway", "--cors-allow-credentials"]) == 1
    assert "--cors-allow-origin" in capsys.readouterr().err
    assert main(["gateway", "--api-key-file", "/no/such/file"]) == 1
    assert "cannot read keys from /no/such/file" in capsys.readouterr().err
