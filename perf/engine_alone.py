"""An engine without any server, as Triton's stub runs it: a process of its own, fed and read over pipes.

What comes back is stamped when it reaches this process, that is where the stub would begin to detokenize and send.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

from records import Record, Request
from step_recorder import build_recorded

from lorax_backend.config import ServerConfig
from lorax_backend.engine.process import ProcessEngine
from lorax_backend.types import (
    AdapterRef,
    EngineInfo,
    EngineRequest,
    EngineStats,
    SamplingParams,
    TokenOutput,
)


class EngineFailedError(RuntimeError):
    """The engine died or did not answer in time."""


class EngineAlone:
    """Owns one engine process and the records of the streams in it. Use it as a context manager.

    `steps` is the file to which the ends of steps are appended (`step_recorder`). `run` is called from one thread.
    """

    def __init__(self, config: ServerConfig, path: Path, steps: Path) -> None:
        self.steps = steps
        self.start_seconds = 0.0
        self._engine = ProcessEngine(partial(build_recorded, steps, config, path), log_level="warning")
        self._changed = threading.Condition()
        self._live: dict[int, Record] = {}
        self._waiting: deque[tuple[Request, Record]] = deque()
        self._num_left = 0
        self._handle = 0
        self._death = ""

    def __enter__(self) -> EngineAlone:
        started = time.monotonic()
        self._engine.start(self)
        self.start_seconds = time.monotonic() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.stop(30.0)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def stats(self) -> dict[str, int]:
        """The engine's own counters: steps, adapter_loads, adapter_evictions, preemptions..."""
        return self._engine.control("stats", {}, timeout=120.0)

    def run(self, requests: Sequence[Request], at_once: int = 0, timeout: float = 600.0) -> list[Record]:
        """Send all requests, or `at_once` and then one for each that ends, and wait for all of them; records in the
        order of `requests`. A request's `delay_s` counts from the call.

        Raises:
            EngineFailedError: the engine died, or did not finish in `timeout` seconds.
        """
        begun = time.monotonic()
        records = [Record() for _ in requests]
        pairs = list(zip(requests, records, strict=True))
        count = at_once or len(pairs)
        with self._changed:
            self._num_left = len(pairs)
            self._waiting = deque(pairs[count:])
        for request, record in sorted(pairs[:count], key=lambda pair: pair[0].delay_s):
            pause = begun + request.delay_s - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            self._submit(request, record)
        with self._changed:
            self._changed.wait_for(lambda: self._death or not self._num_left, timeout)
        if self._death:
            raise EngineFailedError(f"the engine died: {self._death}")
        if self._num_left:
            raise EngineFailedError(
                f"{self._num_left} of {len(requests)} streams had not ended in {timeout:g} s"
            )
        return records

    def _submit(self, request: Request, record: Record) -> None:
        adapter = AdapterRef("local", request.adapter) if request.adapter else None
        with self._changed:
            self._handle += 1
            handle = self._handle
            self._live[handle] = record
        sampling = SamplingParams(max_new_tokens=request.max_tokens)
        record.sent = time.monotonic()
        self._engine.submit(EngineRequest(handle, request.prompt, sampling, adapter))

    # EngineEvents, called from the engine client's thread

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        now = time.monotonic()
        ended = 0
        for output in outputs:
            record = self._live[output.handle]
            if output.token_id is not None:
                record.token_ids.append(output.token_id)
                record.arrivals.append((now, 1))
            if output.error is not None:
                record.error = str(output.error.get("error", output.error))
            if output.error is not None or output.finish_reason is not None:
                ended += 1
                with self._changed:
                    del self._live[output.handle]
        for _ in range(min(ended, len(self._waiting))):
            self._submit(*self._waiting.popleft())
        if ended:
            with self._changed:
                self._num_left -= ended
                self._changed.notify_all()

    def on_stats(self, stats: EngineStats) -> None:
        pass

    def on_dead(self, reason: str) -> None:
        with self._changed:
            self._death = reason
            self._changed.notify_all()


def first_error(records: Iterable[Record]) -> str:
    """The first error of any stream; empty if there was none."""
    return next((record.error for record in records if record.error), "")
