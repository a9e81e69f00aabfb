"""`lorax-triton serve`: fetch the model, write its repository, run tritonserver, and see it to its end."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import queue
import signal
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from lorax_backend.cli.control import ServerUnreachableError, ask, info_rows
from lorax_backend.cli.display import Display, Row, table
from lorax_backend.cli.gateway import GatewayUsageError, check_libraries
from lorax_backend.cli.log import progress_message, worth_showing
from lorax_backend.cli.options import ServeOptions, taken_ports
from lorax_backend.config import split_secrets
from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.process import GatewayProcess
from lorax_backend.server.installation import ServerNotFoundError, find_tritonserver
from lorax_backend.server.launch import ServerFailedError, ServerOptions, TritonServer
from lorax_backend.server.repository import write_repository

_SERVER_LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub")
# A model may take as long as its weights take; a server that dies or fails says so much earlier.
_LOAD_TIMEOUT_S = 24 * 3600.0


class ServeError(Exception):
    """The server cannot run; the message is one readable paragraph."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came before there was a server to pass it to."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class SignalForwarder:
    """Passes SIGINT and SIGTERM on to the server: the first drains it, the second kills it.

    Handlers only note the signal; a thread acts on it, since the main thread may be inside the server object.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._server: TritonServer | None = None
        self._gateway: GatewayProcess | None = None
        self._drain_timeout = 0.0
        self._ready = False
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.first_signal: int | None = None

    def install(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)
        threading.Thread(target=self._run, name="signals", daemon=True).start()

    def attach(self, server: TritonServer) -> None:
        """From now on signals go to this server."""
        self._server = server

    def attach_gateway(self, gateway: GatewayProcess, drain_timeout: float) -> None:
        """From now on signals go to this gateway first."""
        self._gateway, self._drain_timeout = gateway, drain_timeout

    def server_is_ready(self) -> None:
        """From now on the first signal drains instead of killing."""
        self._ready = True

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._server is None:
            raise Interrupted(signum)
        if self.first_signal is None:
            self.first_signal = signum
        self._signals.put(signum)

    def _run(self) -> None:
        asked = False
        while True:
            self._signals.get()
            server = self._server
            if server is None:
                continue
            if self._ready and not asked:
                self._say("stopping: running requests may finish; a second signal ends them at once")
                threading.Thread(target=self._drain, args=(server,), name="drain", daemon=True).start()
            else:
                if self._gateway is not None:
                    self._gateway.kill()
                server.kill()
            asked = True

    def _drain(self, server: TritonServer) -> None:
        """First those who came through the gateway, so that their answers still find their way."""
        if self._gateway is not None:
            self._gateway.drain(self._drain_timeout)
        server.interrupt()


def serve(options: ServeOptions, display: Display) -> int:
    """Run a server until it ends or is stopped; the exit status for the shell.

    Raises:
        ServeError: it could not be started, or ended by itself.
        Interrupted: a signal came while the model was being fetched.
    """
    forwarder = SignalForwarder(display.line)
    forwarder.install()
    try:
        _check_machine(options)
        _fetch_model(options, display)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorax-triton-repository-")))
            write_repository(folder, split_secrets(options.parameters)[0])
            return _run_server(folder, options, display, forwarder)
    finally:
        display.close()


def _check_machine(options: ServeOptions) -> None:
    """Fail before minutes of download if something small is missing."""
    missing = [name for name in _SERVER_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ServeError(
            f"the server's libraries are not installed ({', '.join(missing)}); "
            "run: pip install 'lorax-triton[server]'"
        )
    if options.gateway is not None:
        try:
            check_libraries()
        except GatewayUsageError as error:
            raise ServeError(f"{error}, or leave the gateway out with --no-gateway") from error
    taken = taken_ports(options)
    if taken:
        raise ServeError(
            f"cannot listen on {options.hostname}: {'; '.join(taken)}. Choose other ports with these flags"
        )
    try:
        find_tritonserver()
    except ServerNotFoundError as error:
        raise ServeError(str(error)) from error


def _fetch_model(options: ServeOptions, display: Display) -> None:
    from lorax_backend.model_source import resolve_model

    model = options.config.model_id
    display.progress(f"looking for {model}")
    try:
        folder = resolve_model(options.config, display.progress)
    except (RuntimeError, ValueError, OSError) as error:
        raise ServeError(f"cannot get the model {model!r}: {error}") from error
    display.line(f"model {model}: {folder}")


def _run_server(folder: Path, options: ServeOptions, display: Display, forwarder: SignalForwarder) -> int:
    watcher = _LogWatcher(options, display)
    server = TritonServer(
        folder,
        ServerOptions(
            host=options.hostname,
            http_port=options.triton_http_port,
            grpc_port=options.grpc_port,
            metrics_port=options.metrics_port,
            exit_timeout_s=options.drain_timeout_s,
            env=split_secrets(options.parameters)[1],
        ),
        on_line=watcher.on_line,
    )
    gateway: GatewayProcess | None = None
    display.progress("starting tritonserver")
    server.start()
    forwarder.attach(server)
    try:
        try:
            server.wait_ready(_LOAD_TIMEOUT_S)
        except ServerFailedError as error:
            if forwarder.first_signal is not None:
                return 128 + forwarder.first_signal
            raise ServeError(f"the server did not start: {error}") from error
        watcher.loaded()
        if options.gateway is not None:
            gateway = _start_gateway(options.gateway, display, server, forwarder)
        forwarder.server_is_ready()
        display.close()
        display.line(_ready_table(server, options))
        ended = server.wait()
    finally:
        if gateway is not None:
            gateway.kill()
        server.kill()
    if forwarder.first_signal is not None:
        display.line("stopped")
        return 0
    if gateway is not None and gateway.died:
        raise ServeError(f"the gateway ended by itself: {gateway.last_words}")
    raise ServeError(
        f"the server ended by itself (exit status {ended.returncode}): {ended.reason or 'no reason given'}"
    )


def _start_gateway(
    config: GatewayConfig, display: Display, server: TritonServer, forwarder: SignalForwarder
) -> GatewayProcess:
    # Without its gateway a server would look alive and be out of reach, so they end together.
    gateway = GatewayProcess(config, display.line, server.kill)
    display.progress("starting the gateway")
    forwarder.attach_gateway(gateway, config.drain_timeout)
    try:
        gateway.start()
    except RuntimeError as error:
        raise ServeError(f"the gateway did not start: {error}") from error
    return gateway


class _LogWatcher:
    """Turns the server's log into progress until it is ready, and into lines worth showing afterwards."""

    def __init__(self, options: ServeOptions, display: Display) -> None:
        self._verbose = options.verbose
        self._display = display
        self._loading = True

    def loaded(self) -> None:
        self._loading = False

    def on_line(self, line: str) -> None:
        message = progress_message(line)
        if self._verbose:
            self._display.line(line)
        elif message is not None:
            if self._loading:
                self._display.progress(message)
        elif not self._loading and worth_showing(line):
            self._display.line(line)


def _ready_table(server: TritonServer, options: ServeOptions) -> str:
    url = f"http://{server.http_address}"
    try:
        info = ask(url, "info")
        rows = info_rows(info, options.config.max_active_adapters)
        title = (
            f"lorax-triton {_version()} is ready; the model loaded in {info.get('load_seconds', 0.0):.1f} s"
        )
    except ServerUnreachableError as error:
        rows = [("model", options.config.model_id), ("details", f"not available: {error}")]
        title = f"lorax-triton {_version()} is ready"
    rows.extend(_url_rows(server, options))
    return "\n" + table(title, rows) + "\n\nStop it with Ctrl-C.\n"


def _url_rows(server: TritonServer, options: ServeOptions) -> list[Row]:
    host = server.http_address.rpartition(":")[0]
    gateway = (
        []
        if options.gateway is None
        else [
            ("gateway", f"http://{host}:{options.port}  (LoRAX's REST, OpenAI's /v1, /docs)"),
            ("playground", f"http://{host}:{options.port}/playground"),
        ]
    )
    return [
        *gateway,
        ("gRPC", f"{server.grpc_address}  (lorax_triton.Client, tritonclient, perf_analyzer)"),
        ("HTTP", f"http://{server.http_address}/v2/models/lorax/generate"),
        ("metrics", f"http://{server.metrics_address}/metrics"),
    ]


def _version() -> str:
    try:
        return importlib.metadata.version("lorax-triton")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
