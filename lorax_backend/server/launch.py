"""TritonServer: one tritonserver process from start to end, as the command line, the demo and the tests use
it."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from lorax_backend.server import processes
from lorax_backend.server.failure import ENGINE_DEAD_MARK, failure_reason, load_failures
from lorax_backend.server.installation import Installation, ServerNotFoundError, find_tritonserver
from lorax_backend.server.repository import ENGINE_MODEL

__all__ = ["ServerExit", "ServerFailedError", "ServerNotFoundError", "ServerOptions", "TritonServer"]

_LOG_LINES = 5000
_POLL_S = 0.1
_LAST_WORDS_S = 1.0  # for errors to reach their callers before a server without an engine is ended


class ServerFailedError(RuntimeError):
    """The server did not become ready; the message is the reason a user can act on."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to start a tritonserver. A port of 0 is replaced by a free one.

    `models` empty loads every model of the repository, otherwise only those named. `env` is added to this
    process's environment. `exit_timeout_s` is how long running requests may go on after SIGTERM. `arguments`
    are further ones of tritonserver's; those by default spare it a second start of every model only to ask
    for its configuration.
    """

    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    models: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    exit_timeout_s: int = 30
    arguments: tuple[str, ...] = ("--disable-auto-complete-config",)


@dataclass(frozen=True, slots=True)
class ServerExit:
    """How a server ended: its exit status (negative: the signal) and, if it was not asked to, why."""

    returncode: int
    reason: str | None = None


class TritonServer:
    """Starts tritonserver in a session of its own, so that Ctrl-C reaches only its owner, which then decides.

    The server ends when the thread that called `start` ends: call it from one that lives as long as the
    server should. `on_line` gets every line of the server's output, from a thread of this object.
    """

    def __init__(
        self,
        repository: Path,
        options: ServerOptions | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self.repository = repository
        self.options = options or ServerOptions()
        self.http_port, self.grpc_port, self.metrics_port = self._choose_ports()
        self._on_line = on_line
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._folder: Path | None = None
        self._regions: set[Path] = set()
        self._stopping = False
        self._engine_death: str | None = None

    def _choose_ports(self) -> tuple[int, int, int]:
        asked = (self.options.http_port, self.options.grpc_port, self.options.metrics_port)
        free = iter(processes.free_ports(asked.count(0), self.options.host))
        first, second, third = (port or next(free) for port in asked)
        return first, second, third

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def http_address(self) -> str:
        return f"{self._client_host}:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"{self._client_host}:{self.grpc_port}"

    @property
    def metrics_address(self) -> str:
        return f"{self._client_host}:{self.metrics_port}"

    @property
    def _client_host(self) -> str:
        return "127.0.0.1" if self.options.host in ("0.0.0.0", "::") else self.options.host

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.terminate()

    def start(self, installation: Installation | None = None) -> None:
        """Start the process; returns at once.

        Raises:
            ServerNotFoundError: there is no tritonserver to start.
        """
        installation = installation or find_tritonserver()
        self._folder = Path(tempfile.mkdtemp(prefix="lorax-triton-"))
        arguments, env = installation.prepare(self._folder)
        self._process = subprocess.Popen(
            [str(installation.executable), *self._arguments(), *arguments],
            env=env | dict(self.options.env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=processes.die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, name="tritonserver-log", daemon=True)
        self._reader.start()

    def _arguments(self) -> list[str]:
        options = self.options
        arguments = [
            f"--model-repository={self.repository}",
            f"--http-address={options.host}",
            f"--grpc-address={options.host}",
            f"--metrics-address={options.host}",
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            f"--exit-timeout-secs={options.exit_timeout_s}",
        ]
        if options.models:
            arguments.append("--model-control-mode=explicit")
            arguments.extend(f"--load-model={model}" for model in options.models)
        return [*arguments, *options.arguments]

    def _read(self) -> None:
        process = self._running()
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                text = line.rstrip("\n")
                self._lines.append(text)
                if text.startswith(ENGINE_DEAD_MARK):
                    self._engine_death = text.removeprefix(ENGINE_DEAD_MARK)
                if self._on_line is not None:
                    self._on_line(text)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise RuntimeError("the server has not been started")
        return self._process

    def log_tail(self, count: int = 50) -> str:
        """The last `count` lines the server has written."""
        return "\n".join(list(self._lines)[-count:])

    def wait_ready(self, timeout: float = 600.0) -> None:
        """Wait until the models are ready.

        Raises:
            ServerFailedError: the server ended, a model could not be loaded, or time ran out; says why.
        """
        deadline = time.monotonic() + timeout
        wanted = self.options.models or (ENGINE_MODEL,)
        while not self._all_ready(wanted):
            ended = self._running().poll() is not None
            if ended:
                self._join_reader()
            lines = list(self._lines)
            if ended or load_failures(lines).keys() & set(wanted):
                raise ServerFailedError(failure_reason(lines))
            if time.monotonic() > deadline:
                raise ServerFailedError(f"not ready after {timeout:.0f} s; last output:\n{self.log_tail(5)}")
            self._pause()
        self._note_shared_memory()

    def _all_ready(self, models: tuple[str, ...]) -> bool:
        return self._http_ok("/v2/health/ready") and all(self.is_ready(model) for model in models)

    def _pause(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running().wait(_POLL_S)

    def _http_ok(self, path: str) -> bool:
        connection = http.client.HTTPConnection(self._client_host, self.http_port, timeout=2.0)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def is_ready(self, model: str = ENGINE_MODEL) -> bool:
        """True if the model takes requests, as far as the server says."""
        return self._http_ok(f"/v2/models/{model}/ready")

    def wait(self, poll_s: float = 1.0) -> ServerExit:
        """Wait until the server ends. A server whose engine or model process died is ended here: it could answer none
        of its callers and still call itself healthy, while a closed connection tells them at once."""
        process = self._running()
        suspects: set[int] = set()
        while process.poll() is None:
            dead = {pid for pid in processes.stubs(process.pid) if processes.is_dead(pid)}
            if self._engine_death is not None:
                return self._end_for(f"the engine died: {self._engine_death}")
            if dead & suspects and not self._stopping:
                return self._end_for("the model's process died")
            suspects = dead
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(poll_s)
            self._note_shared_memory()
        self._join_reader()
        code = process.wait()
        reason = None if self._stopping or code == 0 else failure_reason(list(self._lines))
        return ServerExit(code, reason)

    def _end_for(self, reason: str) -> ServerExit:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running().wait(_LAST_WORDS_S)
        last_words = self.log_tail(20)
        self.kill()
        return ServerExit(self._running().wait(), f"{reason}; its last words:\n{last_words}")

    def interrupt(self) -> None:
        """Ask the server to finish what runs and end (SIGTERM); `wait` or `terminate` sees it through."""
        self._stopping = True
        if self._running().poll() is None:
            self._note_shared_memory()
            self._running().send_signal(signal.SIGTERM)

    def terminate(self, timeout: float | None = None) -> int:
        """Drain and end the server, then clean up after it; its exit status. Killed after `timeout` seconds
        (default: its exit timeout and 10 more). May be called more than once."""
        if self._process is None:
            return 0
        self.interrupt()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self.options.exit_timeout_s + 10.0 if timeout is None else timeout)
        self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """End the server and everything it started at once, and remove the shared memory they leave
        behind."""
        process = self._running()
        self._stopping = True
        self._note_shared_memory()
        if process.poll() is None:
            process.kill()
            process.wait()
        processes.kill(processes.session_members(process.pid))
        self._join_reader()
        processes.remove_files(self._regions)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _note_shared_memory(self) -> None:
        """Remember what shared memory the server maps: once it is dead nothing leads to it any more."""
        for member in processes.session_members(self._running().pid):
            self._regions |= processes.shared_memory_regions(member)

    def _join_reader(self) -> None:
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(5.0)
