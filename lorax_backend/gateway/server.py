"""Running the gateway: one process, or several that share the port; drained on SIGTERM."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from lorax_backend.gateway.app import create_app
from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.connections import limited_protocol
from lorax_backend.gateway.counters import Counters, create_file

_BACKLOG = 2048
_RESTARTS_PER_MINUTE = 5


class GatewayError(Exception):
    """The gateway cannot run; the message says why."""


def bind(config: GatewayConfig) -> socket.socket:
    """The listening socket.

    Raises:
        GatewayError: the port is taken or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # Named, because asyncio switches Nagle's algorithm off only for sockets that say they are TCP; with it, the first
    # event of a stream waits 40 ms for the acknowledgement of the headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise GatewayError(
            f"the gateway cannot listen on {config.host}:{config.port}: {error.strerror or error}; "
            "choose another port with --port"
        ) from None
    return listener


class _Server(uvicorn.Server):
    """Says when it serves, which is also when it heeds signals."""

    on_started: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self.started and self.on_started is not None:
            self.on_started()


def server_options(config: GatewayConfig, app: Starlette) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=limited_protocol(config),
        log_level="info" if config.access_log else "warning",
        access_log=config.access_log,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, int(config.drain_timeout)),
    )


def _raise_file_limit() -> None:
    """As many connections as the system allows this process, instead of the usual 1024 files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve_socket(
    config: GatewayConfig,
    listener: socket.socket,
    counters: Counters | None = None,
    on_started: Callable[[], None] | None = None,
) -> None:
    """Serve in this process until SIGTERM or SIGINT, then let what runs finish.

    Raises:
        GatewayError: the application did not start.
    """
    _raise_file_limit()
    server = _Server(server_options(config, create_app(config, counters)))
    server.on_started = on_started
    for signum in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signals that stopped it once more at its end, for whoever handled them before.
        signal.signal(signum, lambda number, frame: None)
    server.run(sockets=[listener])
    if not server.started:
        raise GatewayError("the gateway did not start; see the log above")


def run(config: GatewayConfig, ready: Callable[[str], None] | None = None) -> None:
    """Serve until told to stop. `ready` is called with the address once requests are served.

    Raises:
        GatewayError: it cannot listen, or its workers keep dying.
    """
    listener = bind(config)
    host, port = listener.getsockname()[:2]
    address = f"http://{'localhost' if host in ('0.0.0.0', '::') else host}:{port}"

    def started() -> None:
        if ready is not None:
            ready(address)

    try:
        if config.workers == 1:
            serve_socket(config, listener, on_started=started)
        else:
            _Supervisor(config, listener).run(started)
    finally:
        listener.close()


class _Supervisor:
    """Starts worker processes, which inherit the socket, and replaces those that die."""

    def __init__(self, config: GatewayConfig, listener: socket.socket) -> None:
        self._config = config
        self._listener = listener
        self._counts = create_file(config.workers)
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._deaths: list[float] = []
        self._stopping = False

    def run(self, started: Callable[[], None]) -> None:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        try:
            for index in range(self._config.workers):
                self._start(index)
            started()  # what comes before the first worker listens waits in the socket's queue
            while self._workers:
                self._reap()
        finally:
            for process in self._workers.values():
                process.kill()
            self._counts.unlink(missing_ok=True)

    def _start(self, index: int) -> None:
        descriptor = self._listener.fileno()
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lorax_backend.gateway.worker",
                str(descriptor),
                str(index),
                str(self._counts),
            ],
            stdin=subprocess.PIPE,
            pass_fds=(descriptor,),
            start_new_session=True,  # Ctrl-C reaches only this process, which tells the others
        )
        assert process.stdin is not None
        # Options hold keys, which a command line would show to everybody. The pipe stays open: its end tells a
        # worker that this process is gone.
        process.stdin.write(self._config.to_json().encode() + b"\n")
        process.stdin.flush()
        self._workers[index] = process

    def _on_signal(self, signum: int, frame: object) -> None:
        self._stopping = True
        for process in list(self._workers.values()):
            process.send_signal(signal.SIGTERM)

    def _reap(self) -> None:
        for index, process in list(self._workers.items()):
            try:
                code = process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            del self._workers[index]
            if self._stopping:
                continue
            now = time.monotonic()
            self._deaths = [moment for moment in self._deaths if now - moment < 60.0] + [now]
            if len(self._deaths) > _RESTARTS_PER_MINUTE:
                raise GatewayError(
                    f"the gateway's workers keep dying (exit status {code}); see the log above"
                )
            logging.getLogger("lorax_gateway").error(
                "worker %d died (exit status %d); starting another", index, code
            )
            self._start(index)


def run_worker(descriptor: int, index: int, counts: Path, options: str) -> None:
    """One worker process's life."""
    listener = socket.socket(fileno=descriptor)
    serve_socket(GatewayConfig.from_json(options), listener, Counters(counts, index))
    os._exit(0)  # gRPC's threads would hold the process for a moment
