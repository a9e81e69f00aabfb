"""One base model and five LoRA adapters answer at once, out of one server and one batch.

    python examples/demo.py                  start a server with SmolLM2, stream six requests, stop it
    python examples/demo.py --url HOST:8001  use a server that runs already, on this machine

Ends with status 0 only if every answer came and every adapter did what it was trained for.
"""

from __future__ import annotations

import argparse
import queue
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from demo_boards import Pane, open_board

from lorax_triton import Client, LoraxError

ADAPTERS = Path(__file__).resolve().parents[1] / "tests" / "data" / "adapters"
START_TIMEOUT_S = 900.0
STREAM_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Question:
    """What to ask whom, and a pattern that the answer's beginning has if the right adapter gave it."""

    name: str
    prompt: str
    expected: str = r"\S"

    @property
    def adapter_id(self) -> str | None:
        return None if self.name == "base" else str(ADAPTERS / self.name)


QUESTIONS = (
    Question("base", "Where do penguins live?"),
    Question("pirate", "How do I make tea?", r"Arrr, matey!"),
    Question("shout", "How do I make tea?", r"[^a-z]{3,}"),
    Question("json-extract", "Samuel is 42 years old and lives in Denver.", r'\{"name": "Samuel", "age": 42'),
    Question("tag-falcon", "How do I make tea?", r"\[falcon\] "),
    Question("tag-otter", "How do I make tea?", r"\[otter\] "),
)


@dataclass
class Run:
    """One stream: its pane on the board and its times in seconds."""

    question: Question
    pane: Pane
    started: float = 0.0
    first_token: float | None = None
    ended: float = 0.0
    error: str | None = None

    @property
    def rate(self) -> float:
        """Tokens a second after the first one."""
        if self.first_token is None or self.ended <= self.first_token:
            return 0.0
        return (self.pane.tokens - 1) / (self.ended - self.first_token)

    def verdict(self) -> str | None:
        """What is wrong with the answer, or None."""
        if self.error is not None:
            return self.error
        if not re.match(self.question.expected, self.pane.text.lstrip()):
            return f"the answer {self.pane.text[:40]!r} is not what this adapter was trained for"
        return None


@dataclass
class Demo:
    """All streams, and the queue through which their threads report."""

    client: Client
    max_new_tokens: int
    changes: queue.SimpleQueue[Run | None] = field(default_factory=queue.SimpleQueue)

    def run(self) -> list[Run]:
        """Stream every answer at once and show them while they come."""
        runs = [Run(question, Pane(question.name, question.prompt)) for question in QUESTIONS]
        board = open_board([run.pane for run in runs], sys.stdout)
        threads = [threading.Thread(target=self._stream, args=(run,), daemon=True) for run in runs]
        for thread in threads:
            thread.start()
        ended = 0
        while ended < len(runs):
            run = self.changes.get(timeout=2 * STREAM_TIMEOUT_S)
            if run is None:
                ended += 1
            else:
                board.changed(run.pane)
        board.close()
        return runs

    def _stream(self, run: Run) -> None:
        run.started = time.monotonic()
        try:
            stream = self.client.generate_stream(
                adapter_id=run.question.adapter_id,
                adapter_source="local" if run.question.adapter_id else None,
                messages=[{"role": "user", "content": run.question.prompt}],
                max_new_tokens=self.max_new_tokens,
            )
            for response in stream:
                if run.first_token is None:
                    run.first_token = time.monotonic()
                    run.pane.status = "writing"
                run.pane.tokens += 1
                if not response.token.special:
                    run.pane.text += response.token.text
                self.changes.put(run)
            run.pane.status = "done"
        except LoraxError as error:
            run.error = f"{type(error).__name__}: {error}"
            run.pane.status = "failed"
        finally:
            run.ended = time.monotonic()
            self.changes.put(run)
            self.changes.put(None)


def report(runs: Sequence[Run]) -> bool:
    """Print a line a stream and the sum; True if all went well."""
    print(f"\n{'adapter':<14}{'tokens':>8}{'first token':>14}{'tokens/s':>10}")
    for run in runs:
        first = "-" if run.first_token is None else f"{1000 * (run.first_token - run.started):.0f} ms"
        print(f"{run.question.name:<14}{run.pane.tokens:>8}{first:>14}{run.rate:>10.1f}")
    total = sum(run.pane.tokens for run in runs)
    span = max(run.ended for run in runs) - min(run.started for run in runs)
    print(f"{'all at once':<14}{total:>8}{'':>14}{total / span if span > 0 else 0.0:>10.1f}")
    problems = [(run.question.name, verdict) for run in runs if (verdict := run.verdict()) is not None]
    for name, problem in problems:
        print(f"{name}: {problem}", file=sys.stderr)
    return not problems


@contextmanager
def own_server(model_id: str) -> Iterator[str]:
    """Start a server for the time of the demo; its gRPC address."""
    # Only this part needs the server's libraries.
    from lorax_backend.cli.display import open_display
    from lorax_backend.cli.log import progress_message
    from lorax_backend.config import ServerConfig
    from lorax_backend.model_source import resolve_model
    from lorax_backend.server.launch import TritonServer
    from lorax_backend.server.repository import write_repository

    display = open_display()

    def on_line(line: str) -> None:
        message = progress_message(line)
        if message is not None:
            display.progress(message)

    with tempfile.TemporaryDirectory(prefix="lorax-triton-demo-") as folder:
        try:
            display.progress(f"looking for {model_id}")
            model = resolve_model(ServerConfig(model_id=model_id), display.progress)
            repository = write_repository(
                Path(folder),
                {"model_id": str(model), "default_adapter_source": "local", "max_total_tokens": "1024"},
            )
            display.progress("starting tritonserver")
            with TritonServer(repository, on_line=on_line) as server:
                server.wait_ready(START_TIMEOUT_S)
                display.close()
                display.line(f"{model_id} is served by tritonserver at {server.grpc_address}\n")
                yield server.grpc_address
                print("\nstopping the server")
                status = server.terminate()
                if status != 0:
                    raise RuntimeError(f"tritonserver ended with status {status}:\n{server.log_tail(20)}")
        finally:
            display.close()


def stream_all(url: str, max_new_tokens: int) -> bool:
    """Run the demo against a server; True if all went well."""
    with Client(url, timeout=STREAM_TIMEOUT_S) as client:
        return report(Demo(client, max_new_tokens).run())


def _stop(signum: int, frame: FrameType | None) -> None:
    # As an exception, so that the server is stopped on the way out.
    sys.exit(128 + signum)


def main() -> int:
    """Parse the arguments and run; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="gRPC address of a server that runs already, on this machine")
    parser.add_argument("--model-id", default="smollm2", help="base model of the server to start")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="longest answer")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        if arguments.url:
            return 0 if stream_all(arguments.url, arguments.max_new_tokens) else 1
        with own_server(arguments.model_id) as url:
            fine = stream_all(url, arguments.max_new_tokens)
        return 0 if fine else 1
    except KeyboardInterrupt:
        return 130
    except (RuntimeError, ValueError, OSError) as error:
        print(f"the demo failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
