"""`python -m lorax_backend.gateway`: a gateway that another program owns. Its options come as one line of JSON on
standard input, whose end it takes for the end of its owner; "ready ADDRESS" goes to standard output."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.process import READY_MARK
from lorax_backend.gateway.server import GatewayError, run


def _follow_owner() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _say_ready(address: str) -> None:
    sys.stdout.write(f"{READY_MARK}{address}\n")
    sys.stdout.flush()


def main() -> int:
    """Serve until told to stop; 1 if that was not possible."""
    logging.basicConfig(level=logging.INFO, format="gateway: %(levelname)s %(message)s")
    config = GatewayConfig.from_json(sys.stdin.readline())
    threading.Thread(target=_follow_owner, daemon=True).start()
    try:
        run(config, _say_ready)
    except GatewayError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # gRPC's threads would hold the process for a moment
