"""The process that compiles a start's kernels while the engine loads its model: the other end of `compile_ahead`.

It finds out by a rehearsal what will be launched, and forks a worker for every kernel, several at a time: threads would
share Python's lock for a part of the work, and a compiler that crashes takes its worker along and nothing else. The
workers share the memory of what was imported before.

It reads a pickled (StartPlan, number of workers) from its standard input and writes JSON, a line each, to its standard
output: {"first": jobs that attention needs}, {"total": all jobs, "problems": texts}, and for every job, in any order,
{"job": number, "name"...} with "hash" and "hit", or with "error"; {"failed": text} if that is all there will be.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1
_NICENESS = 5
_LONGEST_ERROR = 500  # characters; a line of up to 4 KiB is written at once
_BUILTIN = "launches"


def main(parent_pid: int) -> None:
    """Serve one start. Does not return."""
    _die_with(parent_pid)
    out = os.dup(1)
    os.dup2(2, 1)  # compilers may print what they like
    code = 1
    try:
        plan, workers = pickle.load(sys.stdin.buffer)
        _serve(plan, Workers(workers, out), out)
        code = 0
    except BrokenPipeError:
        pass
    except Exception as error:
        _tell(out, {"failed": _shortened(error)})
    finally:
        os._exit(code)  # whatever a library's threads are doing


def _serve(plan: Any, workers: Workers, out: int) -> None:
    import torch

    from lorax_backend.model.rehearsal import Rehearsal
    from lorax_kernels import specializations

    torch.set_num_threads(1)  # forks have no other
    os.nice(_NICENESS)  # the engine's own start goes first
    rehearsal = Rehearsal(plan)
    first = rehearsal.attention()
    _tell(out, {"first": len(first) + 1})
    known_signatures: set[str] = set()

    def job(wanted: specializations.Specialization) -> Callable[[], dict[str, Any]]:
        launcher = wanted.signature not in known_signatures
        known_signatures.add(wanted.signature)

        def run() -> dict[str, Any]:
            made = specializations.compile_kernel(wanted, launcher)
            return {"hash": made.hash, "hit": made.hit}

        return run

    def driver() -> dict[str, Any]:
        specializations.compile_driver()
        return {}

    specializations.prepare()
    workers.add([(_BUILTIN, driver), *((wanted.name, job(wanted)) for wanted in first)])
    found, problems = rehearsal.whole()
    rest = [wanted for wanted in found if wanted not in set(first)]
    _tell(out, {"total": len(first) + 1 + len(rest), "problems": [_shortened(error) for error in problems]})
    # What takes longest goes first, or it would be waited for alone in the end.
    rest.sort(key=specializations.effort, reverse=True)
    workers.add([(wanted.name, job(wanted)) for wanted in rest])
    workers.finish()


class Workers:
    """Runs jobs in forks of this process, `count` at once, which tell what came of them through the descriptor `out`.
    It must have no other threads."""

    def __init__(self, count: int, out: int) -> None:
        self._count = max(1, count)
        self._out = out
        self._running: dict[int, tuple[int, str]] = {}
        self._number = 0

    def add(self, jobs: Sequence[tuple[str, Callable[[], dict[str, Any]]]]) -> None:
        """Start jobs, by name; returns when the last one has begun."""
        for name, run in jobs:
            while len(self._running) >= self._count:
                self._wait()
            number, self._number = self._number, self._number + 1
            pid = os.fork()
            if pid == 0:
                self._work(number, name, run)
            self._running[pid] = number, name

    def finish(self) -> None:
        """Wait for all."""
        while self._running:
            self._wait()

    def _wait(self) -> None:
        pid, status = os.wait()
        if pid in self._running:
            number, name = self._running.pop(pid)
            if status:
                code = os.waitstatus_to_exitcode(status)
                ended = f"ended with {code}" if code > 0 else f"was killed by signal {-code}"
                _tell(self._out, {"job": number, "name": name, "error": f"its compiler {ended}"})

    def _work(self, number: int, name: str, run: Callable[[], dict[str, Any]]) -> None:
        code = 1
        try:
            _die_with(os.getppid())
            try:
                told = run()
            except Exception as error:
                told = {"error": _shortened(error)}
            _tell(self._out, {"job": number, "name": name, **told})
            code = 0
        finally:
            os._exit(code)


def _tell(out: int, message: dict[str, Any]) -> None:
    os.write(out, json.dumps(message).encode() + b"\n")


def _shortened(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]


def _die_with(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the request above was made
        os._exit(1)
