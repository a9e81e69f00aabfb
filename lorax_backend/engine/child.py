"""The engine's side of `ProcessEngine`: what the spawned process runs. See `engine.process` for the messages."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
from typing import Any

from lorax_backend.engine.client import Builder, readable
from lorax_backend.engine.loop import EngineLoop
from lorax_backend.engine.messages import MessageReader, MessageWriter, unpack_request
from lorax_backend.errors import LoraxError
from lorax_backend.types import EngineStats, TokenOutput

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
# Python's own 5 ms are longer than many a step. The engine's thread gives the interpreter's lock away with every call
# that waits or computes, and would wait for so long each time that a busy thread, which reads an adapter, has taken it.
_SWITCH_INTERVAL_S = 0.0005


class PipeSink:
    """Sends what comes out of the loop to the parent, one message each."""

    def __init__(self, pipe: MessageWriter) -> None:
        self._pipe = pipe

    def send(self, kind: str, *payload: Any) -> None:
        self._pipe.send((kind, *payload))

    def progress(self, text: str) -> None:
        self.send("progress", text)

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        # Plain tuples: to pickle a hundred NamedTuples takes the engine's thread five times as long.
        self.send("outputs", list(map(tuple, outputs)))

    def on_stats(self, stats: EngineStats) -> None:
        self.send("stats", stats)

    def on_reply(self, ticket: int, reply: dict[str, Any] | LoraxError) -> None:
        if isinstance(reply, LoraxError):
            self.send("refused", ticket, reply.to_dict())
        else:
            self.send("reply", ticket, reply)


class PipeSource:
    """What the parent asks for: a `CommandSource` of the loop."""

    def __init__(self, pipe: MessageReader) -> None:
        self._pipe = pipe

    def fileno(self) -> int:
        return self._pipe.fileno()

    def drain(self, loop: EngineLoop) -> None:
        try:
            messages = self._pipe.take()
        except EOFError:
            loop.stop()
            return
        for kind, *payload in messages:
            match kind:
                case "submit":
                    loop.submit(unpack_request(payload[0]))
                case "cancel":
                    loop.cancel(*payload)
                case "control":
                    loop.control(*payload)
                case "stop":
                    loop.stop()


def main(requests_fd: int, outputs_fd: int, parent_pid: int) -> None:
    """Serve one engine over two pipes until the parent says stop or goes away. Does not return."""
    _die_with(parent_pid)
    for descriptor in (requests_fd, outputs_fd):  # or a child of this process would hold the pipes open
        os.set_inheritable(descriptor, False)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    sink = PipeSink(MessageWriter(outputs_fd))
    code = 1
    try:
        code = _serve(MessageReader(requests_fd), sink)
    except BrokenPipeError:
        _log.warning("the parent closed its end; the engine stops")
    # Not sys.exit: a library's thread must not keep alive a process whose work is done.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve(requests: MessageReader, sink: PipeSink) -> int:
    build: Builder
    try:
        log_level, build = requests.receive()
        _start_logging(log_level)
        built = build(sink.progress)
    except BaseException as error:
        _log.debug("the model cannot be loaded", exc_info=True)
        sink.send("failed", readable(error))
        return 1
    try:
        loop = EngineLoop(built.core, sink, source=PipeSource(requests))
        gc.collect()
        gc.freeze()  # what has been loaded stays: no collection needs to look at it again
        sink.send("ready", built.info)
        loop.run()
    except BrokenPipeError:
        raise
    except BaseException as error:
        _log.exception("the engine died")
        sink.send("dead", readable(error))
        return 1
    built.core.close()
    return 0


def _die_with(parent_pid: int) -> None:
    """Never outlive the parent, and leave signals that reach the whole process group to it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NAME, b"lorax-engine", 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the request above was made
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()


def _start_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s engine %(name)s: %(message)s",
    )
