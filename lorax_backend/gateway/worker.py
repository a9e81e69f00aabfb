"""`python -m lorax_backend.gateway.worker FD INDEX FILE`: a worker of a gateway with several; reads its options on
standard input, whose end it takes for the end of the gateway."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

from lorax_backend.gateway.server import run_worker


def _follow_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    options = sys.stdin.readline()
    threading.Thread(target=_follow_parent, daemon=True).start()
    run_worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), options)
