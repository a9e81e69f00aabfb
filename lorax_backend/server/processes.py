"""What /proc tells about a server's processes and the shared memory they map. Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

_SHM_PREFIX = "/dev/shm/triton_python_backend_shm_region_"
_STUB_COMMAND = "triton_python_b"  # the kernel keeps 15 characters
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class _Stat:
    command: str
    state: str
    parent: int
    session: int


def _stat(pid: int) -> _Stat | None:
    """What the kernel says about a process; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head, _, tail = text.rpartition(")")
    state, parent, _group, session = tail.split()[:4]
    return _Stat(head.partition("(")[2], state, int(parent), int(session))


def _members(session: int) -> dict[int, _Stat]:
    numbers = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    found = ((pid, _stat(pid)) for pid in numbers)
    return {pid: stat for pid, stat in found if stat is not None and stat.session == session}


def session_members(session: int) -> list[int]:
    """All processes of a session. Stubs, and what they spawn, stay in the server's even when it has died."""
    return list(_members(session))


def stubs(server: int) -> list[int]:
    """Python backend stubs of a server that leads its session, dead ones it has not waited for included."""
    return [
        pid
        for pid, stat in _members(server).items()
        if stat.parent == server and stat.command.startswith(_STUB_COMMAND)
    ]


def is_dead(pid: int) -> bool:
    """True if the process is gone, or a zombie nobody has waited for."""
    stat = _stat(pid)
    return stat is None or stat.state in "ZX"


def shared_memory_regions(pid: int) -> set[Path]:
    """Files of the Python backend in /dev/shm that process `pid` maps."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {Path(line[line.index("/") :].removesuffix(" (deleted)")) for line in lines if _SHM_PREFIX in line}


def remove_files(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def kill(pids: Iterable[int]) -> None:
    """SIGKILL to each process that still exists."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def die_with_parent() -> None:
    """Ask the kernel to end this process when the thread that started it ends. Runs between fork and exec."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def free_ports(count: int, host: str) -> list[int]:
    """`count` different TCP ports nobody listens on now."""
    with ExitStack() as stack:
        ports = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind((host, 0))
            ports.append(int(listener.getsockname()[1]))
        return ports
