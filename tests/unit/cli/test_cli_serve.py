"""`serve` with a fake in place of tritonserver: what it checks first, how it stops, what it says."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorax_backend.cli import serve as serve_module
from lorax_backend.cli.display import PlainDisplay
from lorax_backend.cli.main import build_parser, main
from lorax_backend.cli.options import read_serve_options
from lorax_backend.cli.serve import Interrupted, ServeError, serve
from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.server.installation import ServerNotFoundError
from lorax_backend.server.launch import ServerExit, ServerFailedError, ServerOptions

TIMEOUT_S = 20.0


class FakeServer:
    """Plays a server's life in the main thread, as `serve` calls it; `signals` are sent to this process in it."""

    http_address, grpc_address, metrics_address = "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"
    load_error = ""
    death = ""
    signals_while_loading: tuple[int, ...] = ()
    signals_when_ready: tuple[int, ...] = ()
    drains = True

    def __init__(self, repository: Path, options: ServerOptions, on_line) -> None:
        self.repository, self.options, self.on_line = repository, options, on_line
        self.calls: list[str] = []
        self.config = ""
        self._called = threading.Condition()

    def start(self) -> None:
        self.config = (self.repository / "lorax" / "config.pbtxt").read_text()

    def wait_ready(self, timeout: float) -> None:
        self.on_line("lorax: loading weights 50 %")
        self.on_line("E1121 00:00:00.000000 1 model.py:1] an error while loading is part of the reason")
        for signum in self.signals_while_loading:
            os.kill(os.getpid(), signum)
            self._wait_for("kill")
            raise ServerFailedError("it ended")
        if self.load_error:
            raise ServerFailedError(self.load_error)

    def wait(self) -> ServerExit:
        self.on_line("lorax: progress nobody needs now")
        self.on_line("E1121 00:00:00.000000 1 model.py:1] an error while serving")
        for count, signum in enumerate(self.signals_when_ready):
            os.kill(os.getpid(), signum)
            self._wait_for("interrupt" if count == 0 else "kill")
        return ServerExit(-9 if self.death else 0, self.death or None)

    def interrupt(self) -> None:
        self._note("interrupt")

    def kill(self) -> None:
        self._note("kill")

    def _note(self, call: str) -> None:
        with self._called:
            self.calls.append(call)
            self._called.notify_all()

    def _wait_for(self, call: str) -> None:
        with self._called:
            assert self._called.wait_for(lambda: call in self.calls, TIMEOUT_S)


class Stage:
    """Runs `serve` on FakeServers."""

    def __init__(self) -> None:
        self.servers: list[FakeServer] = []
        self.output = io.StringIO()

    def make_server(self, *arguments, **keywords) -> FakeServer:
        self.servers.append(FakeServer(*arguments, **keywords))
        return self.servers[-1]

    def serve(self, *flags: str, gateway: bool = False) -> int:
        if not gateway:
            flags = (*flags, "--no-gateway")
        options = read_serve_options(build_parser().parse_args(["serve", *flags]))
        return serve(options, PlainDisplay(self.output))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage()
    monkeypatch.setattr(serve_module, "TritonServer", stage.make_server)
    monkeypatch.setattr(serve_module, "find_tritonserver", lambda: None)
    monkeypatch.setattr(serve_module, "taken_ports", lambda options: [])
    monkeypatch.setattr(serve_module, "_fetch_model", lambda options, display: None)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield stage
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def test_flags_reach_the_server_and_its_repository(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeServer, "signals_when_ready", (signal.SIGTERM,))
    stage.serve(
        "--hostname", "127.0.0.1", "--grpc-port", "9001", "--drain-timeout-s", "5", "--block-size", "8"
    )
    (server,) = stage.servers
    assert (server.options.host, server.options.grpc_port, server.options.exit_timeout_s) == (
        "127.0.0.1",
        9001,
        5,
    )
    assert 'key: "block_size" value { string_value: "8" }' in server.config
    assert 'key: "model_id"' not in server.config
    assert not server.repository.exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains_and_the_stop_is_a_success(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    monkeypatch.setattr(FakeServer, "signals_when_ready", (signum,))
    assert stage.serve() == 0
    assert stage.servers[0].calls[0] == "interrupt"
    assert "running requests may finish" in stage.output.getvalue()


def test_the_second_signal_kills(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeServer, "signals_when_ready", (signal.SIGINT, signal.SIGINT))
    assert stage.serve() == 0
    assert stage.servers[0].calls[:2] == ["interrupt", "kill"]


def test_a_signal_while_the_weights_load_kills_at_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeServer, "signals_while_loading", (signal.SIGTERM,))
    assert stage.serve() == 128 + signal.SIGTERM
    assert stage.servers[0].calls[0] == "kill"


def test_a_signal_during_the_download_ends_it(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        serve_module, "_fetch_model", lambda options, display: os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(Interrupted) as stopped:
        stage.serve()
    assert stopped.value.exit_code == 130
    assert stage.servers == []


def test_a_model_that_cannot_load_is_a_failure_with_the_models_reason(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeServer, "load_error", "config.json: architecture 'gpt9' is not supported")
    with pytest.raises(ServeError, match=r"did not start: config.json: architecture 'gpt9'"):
        stage.serve()
    assert stage.servers[0].calls == ["kill"]
    assert not stage.servers[0].repository.exists()


def test_a_server_that_ends_by_itself_is_a_failure_with_its_reason(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeServer, "death", "the model's process died")
    with pytest.raises(ServeError, match=r"ended by itself \(exit status -9\): the model's process died"):
        stage.serve()


def test_progress_is_shown_while_loading_and_errors_while_serving(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeServer, "signals_when_ready", (signal.SIGTERM,))
    stage.serve()
    text = stage.output.getvalue()
    assert "loading weights 50 %" in text
    assert "an error while serving" in text
    assert "an error while loading" not in text
    assert "progress nobody needs" not in text


def test_verbose_shows_the_whole_log(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeServer, "signals_when_ready", (signal.SIGTERM,))
    stage.serve("--verbose")
    assert "an error while loading" in stage.output.getvalue()


class FakeGateway:
    """Plays a gateway's process; `log` holds what happens to it and, by its owner, to the server."""

    failure = ""
    dies = False
    last_words = "it fell over"

    def __init__(self, config: GatewayConfig, on_line, on_death) -> None:
        self.config, self.died = config, False
        self.calls: list[str] = []
        self._on_death = on_death

    def start(self) -> None:
        if self.failure:
            raise RuntimeError(self.failure)
        if self.dies:
            self.died = True
            self._on_death()

    def drain(self, timeout: float) -> None:
        self.calls.append(f"drain {timeout:g}")

    def kill(self) -> None:
        self.calls.append("kill")


@pytest.fixture
def gateways(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[FakeGateway]:
    made: list[FakeGateway] = []

    def make(*arguments) -> FakeGateway:
        made.append(FakeGateway(*arguments))
        return made[-1]

    monkeypatch.setattr(serve_module, "GatewayProcess", make)
    return made


def test_the_gateway_gets_the_servers_addresses_and_is_drained_before_it(
    stage: Stage, gateways: list[FakeGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeServer, "signals_when_ready", (signal.SIGTERM,))
    flags = ("--port", "8081", "--grpc-port", "9001", "--metrics-port", "9002", "--drain-timeout-s", "7")
    assert stage.serve(*flags, "--cors-allow-origin", "https://a.example", gateway=True) == 0
    (gateway,) = gateways
    assert (gateway.config.port, gateway.config.triton_urls) == (8081, ("127.0.0.1:9001",))
    assert gateway.config.metrics_urls == ("http://127.0.0.1:9002/metrics",)
    assert gateway.config.cors.origins == ("https://a.example",)
    assert gateway.calls[0] == "drain 7"
    text = stage.output.getvalue()
    assert FakeServer.grpc_address in text
    assert ":8081/playground" in text


def test_a_gateway_that_does_not_start_is_a_failure_with_its_reason(
    stage: Stage, gateways: list[FakeGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGateway, "failure", "cannot listen on 0.0.0.0:8080")
    with pytest.raises(ServeError, match=r"the gateway did not start: cannot listen on 0.0.0.0:8080"):
        stage.serve(gateway=True)
    assert stage.servers[0].calls == ["kill"]


def test_a_gateway_that_dies_ends_the_server_with_its_last_words(
    stage: Stage, gateways: list[FakeGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGateway, "dies", True)
    with pytest.raises(ServeError, match="the gateway ended by itself: it fell over"):
        stage.serve(gateway=True)
    assert stage.servers[0].calls[0] == "kill"


def test_without_a_gateway_its_port_is_not_looked_at(stage: Stage) -> None:
    with_it, without = (
        read_serve_options(build_parser().parse_args(["serve", *flags])) for flags in ([], ["--no-gateway"])
    )
    assert "--port" in with_it.ports
    assert "--port" not in without.ports


@pytest.mark.parametrize(
    ("name", "replacement", "reason"),
    [
        ("taken_ports", lambda options: ["--grpc-port 8001: Address already in use"], "--grpc-port 8001"),
        ("_SERVER_LIBRARIES", ("no_such_library",), r"pip install 'lorax-triton\[server\]'"),
    ],
)
def test_what_is_missing_is_said_before_the_model_is_fetched(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, name: str, replacement: object, reason: str
) -> None:
    monkeypatch.setattr(serve_module, name, replacement)
    monkeypatch.setattr(serve_module, "_fetch_model", lambda options, display: pytest.fail("fetched"))
    with pytest.raises(ServeError, match=reason):
        stage.serve()


def test_a_missing_tritonserver_is_one_readable_line(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise ServerNotFoundError("no tritonserver here")

    monkeypatch.setattr(serve_module, "find_tritonserver", missing)
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == "lorax-triton: no tritonserver here\n"
