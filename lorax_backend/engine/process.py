"""An engine in a process of its own, so that its loop shares no GIL with what talks to the callers.

The process is a fresh interpreter, never a fork: a fork would inherit the parent's signal handlers, threads' locks and
CUDA context. It is started directly and not through `multiprocessing`, whose spawn imports the parent's main module
again: a script without a main guard would start its servers twice, and an embedding program such as Triton's Python
stub has no main module to import. The child gets the parent's `sys.path`, so it finds what the parent found, whatever
flags either runs under.

Two pipes carry tuples (`engine.messages`). To the child: first (log level, builder), then ("submit", packed
EngineRequest), ("cancel", handle), ("control", ticket, command, arguments), ("stop",). From it: ("progress", text)...,
then ("ready", EngineInfo) or ("failed", reason), then ("outputs", [TokenOutput as a plain tuple]) once a step at most,
("stats", EngineStats), ("reply", ticket, dict), ("refused", ticket, error dict), ("dead", reason). The end of the pipe
is the end of the child.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lorax_backend.engine.client import Builder, EngineClientBase, EngineInbox, Progress, readable
from lorax_backend.engine.messages import MessageReader, MessageWriter, pack_request
from lorax_backend.errors import EngineDeadError, error_from_dict
from lorax_backend.types import EngineInfo, EngineRequest, TokenOutput

_log = logging.getLogger(__name__)

# Outputs of a hundred steps fit, so the engine does not wait for a reader that is late.
_PIPE_BYTES = 1 << 20
_EXIT_WAIT_S = 5.0
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from lorax_backend.engine.child import main; "
    "main(*map(int, sys.argv[2:]))"
)

Started = Future[tuple[EngineInbox, EngineInfo]]


class ProcessEngine(EngineClientBase):
    """An engine in a spawned process. `build` is pickled, so it is a function of an importable module, or a partial of
    one. `EngineEvents` are called from one thread of this process, which also starts the child: the kernel kills a
    child whose death is bound to its parent when the thread that started it ends, so that thread must stay."""

    def __init__(self, build: Builder, progress: Progress | None = None, log_level: str = "info") -> None:
        super().__init__(progress)
        self._build = build
        self._log_level = log_level
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: _RequestPipe | None = None
        self._watcher: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child, None before it has been started."""
        return self._child.pid if self._child is not None else None

    def _launch(self, started: Started) -> None:
        self._watcher = threading.Thread(
            target=self._watch, args=(started,), name="engine-watcher", daemon=True
        )
        self._watcher.start()

    def _shut_down(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        if self._pipe is not None:
            self._pipe.ask_to_stop()
        child = self._child
        if child is not None:
            try:
                child.wait(timeout)
            except subprocess.TimeoutExpired:
                _log.warning("the engine process did not stop within %g s; killing it", timeout)
                child.kill()
                child.wait()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(max(1.0, deadline - time.monotonic()))

    def _watch(self, started: Started) -> None:
        """Start the child, read what it sends until it ends, and tell how it ended."""
        try:
            outputs = self._spawn()
        except BaseException as error:
            if self._child is not None:
                self._child.kill()
                self._child.wait()
            started.set_exception(RuntimeError(f"the engine process cannot be started: {readable(error)}"))
            return
        assert self._child is not None
        assert self._pipe is not None
        try:
            reason = self._read(outputs, started)
        except BaseException as error:
            _log.exception("the engine's owner failed to take its outputs")
            reason = f"its outputs could not be delivered: {readable(error)}"
            self._child.kill()
        self._pipe.close()
        outputs.close()
        if reason is not None:
            self._end(reason)
        _wait_or_kill(self._child)
        self._end(_describe_exit(self._child.returncode))
        if not started.done():
            started.set_exception(
                RuntimeError(f"{_describe_exit(self._child.returncode)} while it was loading")
            )

    def _spawn(self) -> MessageReader:
        requests_reader, requests_writer = os.pipe()
        outputs_reader, outputs_writer = os.pipe()
        self._pipe, outputs = _RequestPipe(requests_writer), MessageReader(outputs_reader)
        descriptors = (requests_reader, outputs_writer)
        try:
            for pipe in descriptors:
                with contextlib.suppress(OSError):  # more than the system allows: it stays at its default
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            arguments = [json.dumps(sys.path), *map(str, (*descriptors, os.getpid()))]
            command = [python_executable(), "-c", _BOOT, *arguments]
            self._child = subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL)
            self._pipe.send(self._log_level, self._build)
        except BaseException:
            self._pipe.close()
            outputs.close()
            raise
        finally:
            for pipe in descriptors:
                os.close(pipe)
        return outputs

    def _read(self, outputs: MessageReader, started: Started) -> str | None:
        """Hand on messages until the child ends; the reason if it said one that `start` has not told."""
        assert self._child is not None
        assert self._pipe is not None
        handlers: dict[str, Callable[..., None]] = {
            "progress": self._report_progress,
            "outputs": lambda rows: self.on_outputs([TokenOutput._make(row) for row in rows]),
            "stats": self.on_stats,
            "reply": self.on_reply,
            "refused": lambda ticket, error: self.on_reply(ticket, error_from_dict(error)),
        }
        with _exit_descriptor(self._child) as exit_descriptor:
            poll = select.poll()
            for source in (outputs.fileno(), *exit_descriptor):
                poll.register(source, select.POLLIN)
            while any(source == outputs.fileno() for source, _ in poll.poll()):
                try:
                    messages = outputs.take()
                except (EOFError, OSError):
                    break
                for kind, *payload in messages:
                    if kind == "ready":
                        self._ready(started, self._pipe, payload[0])
                        if not self.alive:  # it was stopped while it was loading
                            self._child.kill()
                    elif kind == "failed":
                        started.set_exception(RuntimeError(payload[0]))
                    elif kind == "dead":
                        return str(payload[0])
                    else:
                        handlers[kind](*payload)
        return None


class _RequestPipe:
    """The way to the child: an `EngineInbox`. Raises EngineDeadError once the child is gone."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = MessageWriter(descriptor)

    def send(self, *message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise EngineDeadError("the engine process is gone") from error

    def submit(self, request: EngineRequest) -> None:
        self.send("submit", pack_request(request))

    def cancel(self, handle: int) -> None:
        self.send("cancel", handle)

    def control(self, ticket: int, command: str, arguments: dict[str, Any]) -> None:
        self.send("control", ticket, command, arguments)

    def ask_to_stop(self) -> None:
        """Unlike `send`, gives up at once if the child takes nothing in: it will have to be killed."""
        with contextlib.suppress(OSError):
            self._pipe.send_unless_full(("stop",), 1.0)

    def close(self) -> None:
        self._pipe.close()


@contextlib.contextmanager
def _exit_descriptor(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """A file descriptor that can be read when the child has ended, where the system has such: its pipe stays open for
    as long as a process that the child has left behind holds it."""
    try:
        descriptor = os.pidfd_open(child.pid)
    except (AttributeError, OSError):
        yield []
        return
    try:
        yield [descriptor]
    finally:
        os.close(descriptor)


def _wait_or_kill(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(_EXIT_WAIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"the engine process exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
    return f"the engine process was killed by {name}{hint}"


def python_executable() -> str:
    """The interpreter to start: this process's own, or in a program that embeds Python the one of the same prefix.

    Raises:
        RuntimeError: there is none.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [
        *(
            Path(prefix, "bin", name)
            for prefix in (sys.prefix, sys.base_prefix)
            for name in (version, "python3")
        ),
        Path(sys.executable or "python3"),
    ]
    for candidate in candidates:
        if candidate.name.startswith("python") and os.access(candidate, os.X_OK) and candidate.is_file():
            return str(candidate)
    raise RuntimeError(
        f"no Python interpreter among {', '.join(map(str, candidates))}; set engine_process=false"
    )
