"""A gateway that speaks TLS to its servers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_triton_server
import grpc
import pytest
from gateway_calls import GatewayCaller, wait_until
from tls_files import TlsFiles, write_tls_files

from lorax_backend.cli.gateway import GatewayUsageError, add_gateway_flags, run_gateway
from lorax_backend.cli.main import main
from lorax_backend.gateway.config import GatewayConfig, TlsOptions
from lorax_backend.gateway.process import GatewayProcess


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return write_tls_files(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def server(files: TlsFiles) -> Iterator[fake_triton_server.FakeTriton]:
    """A real gRPC server that wants to see its callers' certificates."""

    def script(call: fake_triton_server.Call) -> Iterator[Any]:
        if "control" in call.inputs:
            facts = json.dumps({"model_id": "base", "ready": True, "adapters": [], "aliases": {}})
            return iter([fake_triton_server.response(True, details=[facts])])
        return fake_triton_server.answer("a", "b")

    pair = (files.server_key.read_bytes(), files.server_cert.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], files.ca.read_bytes(), require_client_auth=True)
    fake = fake_triton_server.FakeTriton(script, credentials=credentials)
    yield fake
    fake.stop()


@pytest.fixture
def start_process() -> Iterator[Callable[[GatewayConfig], GatewayCaller]]:
    """`start_process(config)` -> a caller of a gateway process, ended with the test."""
    started: list[GatewayProcess] = []

    def start(config: GatewayConfig) -> GatewayCaller:
        process = GatewayProcess(config, lambda line: None, lambda: None)
        started.append(process)
        process.start()
        return GatewayCaller("127.0.0.1", int(process.address.rpartition(":")[2]))

    yield start
    for process in started:
        process.kill()


def config_of(url: str, workers: int = 1, **tls: Any) -> GatewayConfig:
    options = TlsOptions(**{name: None if value is None else str(value) for name, value in tls.items()})
    return GatewayConfig(triton_urls=(url,), host="127.0.0.1", port=0, workers=workers, tls=options)


@pytest.mark.parametrize("workers", [1, 2])
def test_with_authority_and_certificate_it_reaches_the_server(
    server: fake_triton_server.FakeTriton, files: TlsFiles, start_process: Any, workers: int
) -> None:
    own = {"ca_file": files.ca, "cert_file": files.client_cert, "key_file": files.client_key}
    gateway = start_process(config_of(f"grpcs://{server.url}", workers, **own))
    wait_until(lambda: gateway.get("/health").status == 200)
    assert gateway.generate(max_new_tokens=2).json["generated_text"] == "ab"


@pytest.mark.parametrize("missing", ["authority", "certificate", "name"])
def test_without_one_of_them_it_says_that_there_is_no_connection(
    server: fake_triton_server.FakeTriton, files: TlsFiles, start_process: Any, missing: str
) -> None:
    own: dict[str, Any] = {"ca_file": files.ca, "cert_file": files.client_cert, "key_file": files.client_key}
    if missing == "authority":
        own["ca_file"] = files.other_ca
    elif missing == "certificate":
        own = {"ca_file": files.ca}
    else:
        own["server_name"] = "triton.example"
    gateway = start_process(config_of(f"grpcs://{server.url}", **own))
    assert gateway.get("/health").status == 503
    told = gateway.generate(max_new_tokens=2)
    assert (told.status, told.json["error_type"]) == (503, "unavailable")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--triton-ca-file CA", "--triton-ca-file: is for encrypted connections; .* grpcs://host:port"),
        ("--triton-url grpcs://a:1 --triton-cert-file CA", "--triton-cert-file and --triton-key-file need"),
        (
            "--triton-url grpcs://a:1 --triton-ca-file NONE",
            "--triton-ca-file .*: cannot be read: No such file",
        ),
        ("--triton-url grpcs://a:1 --triton-ca-file TEXT", "--triton-ca-file .*: is no PEM file"),
    ],
)
def test_flags_of_tls_that_make_no_sense_are_refused_by_name(
    files: TlsFiles, tmp_path: Path, flags: str, message: str
) -> None:
    (tmp_path / "text").write_text("hello")
    places = {"CA": str(files.ca), "NONE": str(tmp_path / "none"), "TEXT": str(tmp_path / "text")}
    parser = argparse.ArgumentParser()
    add_gateway_flags(parser)
    arguments = parser.parse_args([places.get(word, word) for word in flags.split()])
    with pytest.raises(GatewayUsageError, match=message):
        run_gateway(arguments)


def test_the_command_line_reaches_an_encrypted_server(
    server: fake_triton_server.FakeTriton, files: TlsFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--ca-file", files.ca, "--cert-file", files.client_cert, "--key-file", files.client_key]
    url = ["--url", f"grpcs://{server.url}"]
    assert main(["adapters", "list", *url, *map(str, own)]) == 0
    capsys.readouterr()
    assert main(["adapters", "list", *url]) != 0
    assert "No connection" in capsys.readouterr().err
    assert main(["adapters", "list", "--url", server.url, "--ca-file", str(files.ca)]) != 0
    assert "grpcs://" in capsys.readouterr().err
