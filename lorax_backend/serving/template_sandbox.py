"""Chat templates of strangers, rendered where they can neither burn this process's time nor fill its memory.

An adapter brings a template along, and anybody can publish an adapter. Jinja's sandbox keeps a template from Python,
not from nested loops, or from one filter that makes a text of a terabyte. So such templates are compiled and rendered
in processes of their own (`template_worker.py`), with a limit of processor time and memory that the system enforces.
Processor time, not time on the clock: a busy machine refuses nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from typing import Any

from lorax_backend.engine.process import python_executable
from lorax_backend.errors import ShuttingDownError, TemplateError, error_from_dict

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lorax_backend.serving.template_worker import main; main(float(sys.argv[2]), int(sys.argv[3]))"
)
# What an interpreter needs to start. Keys and tokens in the environment are nothing for a stranger's template.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "TZ")
_MAX_IDLE = 4
_END_WAIT_S = 5.0
_REMEDY = (
    "correct the adapter's chat_template.jinja or tokenizer_config.json, or send a prompt instead of messages"
)


class TemplateSandbox:
    """Owns the processes; starts them when they are needed. Thread-safe: calls at once take a process each.

    Args:
        cpu_seconds: processor time of one rendering. Templates of published models take milliseconds.
        memory_bytes: address space of a process.
        wait_seconds: time on the clock after which an answer no longer comes, for a process that hangs unused.
    """

    def __init__(
        self, cpu_seconds: float = 2.0, memory_bytes: int = 1 << 30, wait_seconds: float = 300.0
    ) -> None:
        self._cpu_seconds = cpu_seconds
        self._memory_bytes = memory_bytes
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._busy: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def open(self, source: str, special_tokens: dict[str, str], owner: str) -> SandboxedTemplate:
        """Compile a template; `owner` is for error messages.

        Raises:
            TemplateError: it is not valid, or compiling it takes more than is allowed.
        """
        template = SandboxedTemplate(self, source, special_tokens, owner)
        template.check()
        return template

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of a process to a request.

        Raises:
            TemplateError: it took too much, and its process has ended; or the template failed.
            ShuttingDownError: the sandbox is closed.
        """
        worker = self._take()
        try:
            answer = self._exchange(worker, json.dumps(request).encode() + b"\n")
        except BaseException:
            self._discard(worker)
            raise
        if answer is None:
            code = self._discard(worker)
            self._check_open()
            spent = f"{self._cpu_seconds:g} s of processor time"
            raise self._too_much(
                request, spent if code == -signal.SIGPROF else f"it may (exit status {code})"
            )
        self._give_back(worker)
        if "error" in answer:
            raise error_from_dict(answer["error"])
        if "memory" in answer:
            raise self._too_much(request, f"{self._memory_bytes >> 20} MiB of memory")
        return answer

    def close(self) -> None:
        """End all processes, and with them the requests that wait for them."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()
        for worker in idle:
            _end(worker)

    @staticmethod
    def _too_much(request: dict[str, Any], what: str) -> TemplateError:
        return TemplateError(
            f"messages: {request['owner']} chat template took more than {what} and was stopped; {_REMEDY}"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ShuttingDownError("the server has stopped; send the request to another one or later")

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            self._check_open()
            while self._idle:
                worker = self._idle.pop()
                if worker.poll() is None:
                    self._busy.add(worker)
                    return worker
                _end(worker)
        worker = self._spawn()
        with self._lock:
            self._busy.add(worker)
            if self._closed:
                worker.kill()
        return worker

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [python_executable(), "-c", _BOOT, json.dumps(sys.path)]
        return subprocess.Popen(
            [*command, str(self._cpu_seconds), str(self._memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )

    def _exchange(self, worker: subprocess.Popen[bytes], line: bytes) -> dict[str, Any] | None:
        """The answer; None if the process ended, or hung and was killed."""
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(line)
            worker.stdin.flush()
        except BrokenPipeError:
            return None
        if not select.select([worker.stdout], [], [], self._wait_seconds)[0]:
            worker.kill()
        reply = worker.stdout.readline()
        if not reply.endswith(b"\n"):
            return None
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def _give_back(self, worker: subprocess.Popen[bytes]) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _MAX_IDLE:
                self._busy.discard(worker)
                self._idle.append(worker)
                return
        self._discard(worker)

    def _discard(self, worker: subprocess.Popen[bytes]) -> int:
        with self._lock:
            self._busy.discard(worker)
        return _end(worker)


class SandboxedTemplate:
    """A stranger's chat template, with what `ChatTemplate` offers to those who render. Thread-safe.

    Attributes:
        source: the Jinja text.
        variables: names the template reads.
    """

    def __init__(
        self, sandbox: TemplateSandbox, source: str, special_tokens: dict[str, str], owner: str
    ) -> None:
        self.source = source
        self.variables: frozenset[str] = frozenset()
        self._sandbox = sandbox
        self._request = {"source": source, "special_tokens": special_tokens, "owner": owner}

    def check(self) -> None:
        """Compile it.

        Raises:
            TemplateError: it cannot be.
        """
        self.variables = frozenset(self._sandbox.ask(self._request)["variables"])

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        guideline: str | None = None,
    ) -> str:
        """The prompt for a chat. Blocks for as long as the template takes.

        Raises:
            MissingTemplateVariableError, TemplateError: see `ChatTemplate.render`; also for taking too much.
        """
        given = {"messages": messages, "tools": tools, "guideline": guideline}
        return str(self._sandbox.ask(self._request | given)["text"])


def _end(worker: subprocess.Popen[bytes]) -> int:
    """End a process, if it has not ended, and return its exit status. It holds nothing that would have to be saved."""
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    if worker.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return worker.wait(_END_WAIT_S)  # its input has ended, or it is on its way out
        worker.kill()
    return worker.wait()
