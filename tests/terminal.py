"""A program in a terminal of its own, for tests: keys go in, the screen comes out."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

WAIT_S = 60.0
# Only a controlling terminal turns Ctrl-C into a signal: the first that the leader of a session opens becomes it.
# Tests may run as a shell's background job, which ignores that signal and passes this on; a terminal's programs do not.
_PROGRAM = """
import os, signal, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))
signal.signal(signal.SIGINT, signal.default_int_handler)
from lorax_backend.cli.main import main
sys.exit(main())
"""


class Terminal:
    """`python -m lorax_backend.cli ARGUMENTS` on a pseudo-terminal. `screen` is all it has shown so far."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._keyboard, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=os.environ | {"TERM": "dumb"},
            start_new_session=True,
        )
        os.close(terminal)
        self.screen = ""
        self._seen = 0

    def type(self, text: str) -> None:
        """Press keys; "\\n" is Return, "\\x03" Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self._keyboard, text.encode())

    def expect(self, text: str) -> str:
        """Wait for a text after the one waited for last; what was shown up to its end."""
        deadline = time.monotonic() + WAIT_S
        while (found := self.screen.find(text, self._seen)) < 0:
            assert self._read(deadline), f"{text!r} did not come; the screen shows\n{self.screen}"
        start, self._seen = self._seen, found + len(text)
        return self.screen[start : self._seen]

    def wait(self) -> int:
        """The exit status, once the program has ended."""
        deadline = time.monotonic() + WAIT_S
        while self._read(deadline):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._keyboard], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._keyboard, 65536)
        except OSError:  # how Linux says that nobody has the terminal open any more
            return False
        self.screen += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keyboard)
