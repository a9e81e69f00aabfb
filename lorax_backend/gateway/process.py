"""A gateway as a process of another program: started, watched and stopped. Standard library only."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable

from lorax_backend.gateway.config import GatewayConfig

READY_MARK = "ready "


class GatewayProcess:
    """Owns the process. `on_line` gets what it logs; `on_death` is called, from a thread, if it ends unasked."""

    def __init__(
        self, config: GatewayConfig, on_line: Callable[[str], None], on_death: Callable[[], None]
    ) -> None:
        self._config = config
        self._on_line = on_line
        self._on_death = on_death
        self._lines: deque[str] = deque(maxlen=50)
        self._ready = threading.Event()
        self._stopping = False
        self._process: subprocess.Popen[str] | None = None
        self.address = ""
        self.died = False

    @property
    def last_words(self) -> str:
        """What it said last."""
        return "\n".join(list(self._lines)[-5:]) or "it said nothing"

    def start(self, timeout: float = 60.0) -> None:
        """Start it and wait until it listens.

        Raises:
            RuntimeError: it ended, or did not listen in time; says why.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lorax_backend.gateway"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches only its owner, which then decides
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(self._config.to_json() + "\n")
            self._process.stdin.flush()
        threading.Thread(target=self._read, name="gateway-log", daemon=True).start()
        if not self._ready.wait(timeout) or not self.address:
            self.kill()
            raise RuntimeError(self.last_words)

    def _read(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                text = line.rstrip("\n")
                if not self.address and text.startswith(READY_MARK):
                    self.address = text.removeprefix(READY_MARK)
                    self._ready.set()
                else:
                    self._lines.append(text)
                    if self._ready.is_set():
                        self._on_line(text)
        process.wait()
        was_ready = bool(self.address)
        self._ready.set()
        if was_ready and not self._stopping:
            self.died = True
            self._on_death()

    def drain(self, timeout: float) -> None:
        """Let it finish what runs and end; killed after `timeout` seconds."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """End it at once."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
