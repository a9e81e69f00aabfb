"""Kernels compiled at start by processes of their own, all at once, while the model is loaded.

Else Triton compiles each kernel when it is launched for the first time, one after the other, which takes longer than
all the rest of a start. Nothing depends on this: the kernels end up in Triton's cache on disk, where the launches find
them, and what is missing there is compiled at its launch as ever. A start that finds a note in the cache that its
kernels are all there starts no process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lorax_kernels
from lorax_backend.engine.process import python_executable
from lorax_backend.model.rehearsal_plan import StartPlan

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lorax_backend.model.compile_process import main; main(int(sys.argv[2]))"
)
_MOST_PROCESSES = 16
_PATIENCE_S = 120.0  # from the start of the process: about twice what compiling one by one takes
_NOTE = "lorax-kernels.json"


def most_processes(option: int) -> int:
    """What the option `compile_processes` means, where -1 leaves it to us. 0 where kernels are interpreted."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return 0
    if option != -1:
        return max(0, option)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_PROCESSES, cpus) if cpus > 1 else 0


class CompileAhead:
    """Compiles what a start launches, from construction on. Used by one thread, which calls `close` in the end.

    Args:
        plan: what the start will do.
        processes: how many compile at once; 0 for none at all.
        report: told of the progress while somebody waits.
    """

    def __init__(self, plan: StartPlan, processes: int, report: Progress = lambda text: None) -> None:
        self._report = report
        self._begun = time.monotonic()
        self._child: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._first: int | None = None
        self._total: int | None = None
        self._done: dict[int, dict[str, Any]] = {}
        self._seconds = 0.0
        self._waited = 0.0
        self._noted = False
        self._problem = ""
        self._note_key = ""
        self._later = _LaterCompiles()
        if processes < 1:
            return
        try:
            from lorax_kernels.specializations import compiler_key  # which needs Triton

            threading.Thread(target=compiler_key(), name="triton-key", daemon=True).start()
            self._note_key = note_key(plan)
            self._noted = _all_cached(self._note_key)
            if not self._noted:
                self._start(plan, processes)
        except Exception as error:  # nothing here is worth a start that fails
            self._fail(f"{type(error).__name__}: {error}")

    def wait_for_attention(self) -> None:
        """Wait for the paged attention kernels."""
        self._wait(lambda: self._first is not None and all(job in self._done for job in range(self._first)))

    def wait(self) -> None:
        """Wait for all, and note that they are there."""
        self._wait(lambda: self._total is not None and len(self._done) >= self._total)
        if self._child is None:
            return
        self._end()
        failed = [job for job in self._done.values() if "error" in job]
        for job in failed:
            log.info("compiling %s ahead failed: %s", job["name"], job["error"])
        if not failed and not self._problem and self._total is not None and len(self._done) >= self._total:
            _note(
                self._note_key, [(job["hash"], job["name"]) for job in self._done.values() if "hash" in job]
            )

    def close(self) -> str:
        """Stop whatever still runs. Returns what was done, in words."""
        self._end()
        later = self._later.close()
        if later:
            log.info("kernels compiled when they were launched: %s", ", ".join(later))
        return self._told(len(later))

    def _told(self, later: int) -> str:
        behind = f"{later} compiled later"
        if self._noted:
            return f"kernels: all in Triton's cache, {behind}"
        made = [job for job in self._done.values() if "hash" in job]
        if not made:
            return f"kernels: {later} compiled one by one" + f" ({self._problem})" * bool(self._problem)
        hits = sum(job["hit"] for job in made)
        problem = f" ({self._problem})" * bool(self._problem)
        return (
            f"kernels: {len(made) - hits} compiled ahead in {self._seconds:.1f} s, of which {self._waited:.1f} s were "
            f"waited for, {hits} in Triton's cache, {behind}{problem}"
        )

    def _start(self, plan: StartPlan, processes: int) -> None:
        command = [python_executable(), "-c", _BOOT, json.dumps(sys.path), str(os.getpid())]
        # It computes nothing on a GPU, and must not keep one busy by accident.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self._child.stdin is not None
        self._child.stdin.write(pickle.dumps((plan, processes)))
        self._child.stdin.close()

    def _wait(self, is_over: Callable[[], bool]) -> None:
        if self._child is None:
            return
        begun = time.monotonic()
        while not is_over() and self._child is not None:
            self._tell()
            try:
                self._receive()
            except Exception as error:
                self._fail(f"{type(error).__name__}: {error}")
        self._waited += time.monotonic() - begun

    def _tell(self) -> None:
        done = f"{len(self._done)} of {self._total}" if self._total else "finding out which"
        self._report(f"compiling kernels, {done}")

    def _receive(self) -> None:
        """Read what the process has to say, or give it up."""
        assert self._child is not None
        assert self._child.stdout is not None
        left = self._begun + _PATIENCE_S - time.monotonic()
        descriptor = self._child.stdout.fileno()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            self._fail(f"compiling ahead took more than {_PATIENCE_S:.0f} s")
            return
        data = os.read(descriptor, 1 << 16)
        if not data:
            self._fail("the process that compiles ahead has ended")
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        if "job" in message:
            self._done[message["job"]] = message
            self._seconds = time.monotonic() - self._begun
        elif "failed" in message:
            self._fail(message["failed"])
        else:
            self._first = message.get("first", self._first)
            self._total = message.get("total", self._total)
            for problem in message.get("problems", []):
                self._problem = f"incomplete: {problem}"
                log.warning("some kernels are compiled as they are launched: %s", problem)

    def _fail(self, problem: str) -> None:
        self._problem = problem
        log.warning("kernels are compiled one by one, as they are launched: %s", problem)
        self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # it has ended before it read all
                    pipe.close()
        child.wait()


class _LaterCompiles:
    """The names of kernels that this process compiles itself, from construction until `close`."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._compilation: Any = None
        try:
            import triton

            self._compilation = triton.knobs.compilation
            self._before = self._compilation.listener
            self._compilation.listener = self._listen
        except (ImportError, AttributeError) as error:
            log.debug("compiled kernels are not counted: %s", error)

    def _listen(self, *, src: Any, cache_hit: bool, **kwargs: Any) -> None:
        if not cache_hit:
            self._names.append(str(getattr(src, "name", "?")))
        if self._before is not None:
            self._before(src=src, cache_hit=cache_hit, **kwargs)

    def close(self) -> list[str]:
        if self._compilation is not None:
            self._compilation.listener = self._before
            self._compilation = None
        return self._names


def note_key(plan: StartPlan) -> str:
    """Under which Triton's cache notes that it has all kernels of a start: a hash of the plan, of the versions, of our
    own sources and tables, and of what the environment may change."""
    found = hashlib.sha256(repr(plan).encode())
    found.update(f"{version('triton')} {torch.__version__} {sys.version}".encode())
    for folder in (Path(lorax_kernels.__file__).parent, Path(__file__).parent):
        for path in sorted([*folder.glob("*.py"), *folder.glob("tuned/*.json")]):
            found.update(path.name.encode() + path.read_bytes())
    for name in sorted(os.environ):
        if name.startswith(("LORAX_", "TRITON_")) and name != "TRITON_CACHE_DIR":
            found.update(f"{name}={os.environ[name]}".encode())
    return found.hexdigest()


def _note(key: str, kernels: list[tuple[str, str]]) -> None:
    from triton.runtime.cache import get_cache_manager

    try:
        get_cache_manager(key).put(json.dumps(kernels), _NOTE, binary=False)
    except OSError as error:
        log.info("cannot note in Triton's cache which kernels it has: %s", error)


def _all_cached(key: str) -> bool:
    from triton.runtime.cache import get_cache_manager

    from lorax_kernels.specializations import is_cached

    path = get_cache_manager(key).get_file(_NOTE)
    if path is None:
        return False
    return all(is_cached(hash, name) for hash, name in json.loads(Path(path).read_text()))
