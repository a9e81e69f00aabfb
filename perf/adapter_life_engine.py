"""Drives an engine with requests that come at given times, and notes when each of their tokens came.

The engine is built as a server builds it: in a process of its own on CUDA, in this one on a CPU, unless told otherwise.
Times are seconds on `time.perf_counter`, taken when a step's tokens reach this process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorax_backend.config import ServerConfig
from lorax_backend.engine.build import create_engine
from lorax_backend.engine.process import ProcessEngine
from lorax_backend.errors import LoraxError
from lorax_backend.types import AdapterRef, EngineRequest, EngineStats, SamplingParams, TokenOutput

ANSWER_TIMEOUT_S = 120.0  # a request without its last token so long after the last one was sent is unanswered


@dataclass(frozen=True, slots=True)
class Load:
    """One request: due `arrival` seconds after the run's start. `adapter` None: the base model."""

    arrival: float
    adapter: AdapterRef | None
    prompt: int
    output: int
    group: str = ""


@dataclass(slots=True)
class Record:
    """What became of a request. `times` has one entry a token."""

    load: Load
    due: float
    times: list[float] = field(default_factory=list)
    error: str = ""
    done: bool = False

    @property
    def answered(self) -> bool:
        """All tokens came, and no error."""
        return self.done and not self.error and len(self.times) == self.load.output

    @property
    def ttft_ms(self) -> float:
        """From the time it was due, so that a late sender shows."""
        return 1e3 * (self.times[0] - self.due)

    @property
    def gaps_ms(self) -> list[float]:
        return [1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)]


class Driver:
    """Implements `EngineEvents`. `on_done` is called from the engine's thread with each request that has ended."""

    def __init__(self, config: ServerConfig, model: Path, vocab_size: int) -> None:
        self.on_done: Callable[[Record], None] | None = None
        self.stats = EngineStats()
        self.dead = ""
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(0)
        self._handle = 0
        self._live: dict[int, Record] = {}
        self._changed = threading.Condition()
        started = time.perf_counter()
        self.engine = create_engine(config, model)
        self.engine.start(self)
        self.start_s = time.perf_counter() - started

    @property
    def pid(self) -> int:
        """Of the process that the engine runs in."""
        pid = self.engine.pid if isinstance(self.engine, ProcessEngine) else None
        return os.getpid() if pid is None else pid

    @property
    def in_flight(self) -> int:
        return len(self._live)

    @property
    def alive(self) -> bool:
        return self.engine.alive and not self.dead

    def prompt_of(self, load: Load) -> list[int]:
        """Random token ids, so that no two prompts share a prefix."""
        return self._rng.integers(10, self._vocab_size, load.prompt).tolist()

    def send(self, load: Load, due: float | None = None, prompt: list[int] | None = None) -> Record:
        """Submit one request now."""
        prompt = self.prompt_of(load) if prompt is None else prompt
        record = Record(load, time.perf_counter() if due is None else due)
        with self._changed:
            self._handle += 1
            handle = self._handle
            self._live[handle] = record
        sampling = SamplingParams(load.output)
        self.engine.submit(EngineRequest(handle, prompt, sampling, load.adapter))
        return record

    def run(self, loads: Iterable[Load], before: Callable[[Load], None] | None = None) -> list[Record]:
        """Send each at its time, wait until all are answered, and return their records. `before` is called just before
        one is sent.

        Raises:
            RuntimeError: the engine died.
        """
        # Made beforehand: the time this takes is not the engine's.
        ready = [(load, self.prompt_of(load)) for load in sorted(loads, key=lambda load: load.arrival)]
        start = time.perf_counter()
        records = []
        for load, prompt in ready:
            wait = start + load.arrival - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            if before is not None:
                before(load)
            # Work done for it just now is not the engine's delay.
            records.append(self.send(load, time.perf_counter() if before else start + load.arrival, prompt))
        self.wait()
        return records

    def wait(self, limit: int = 0, timeout: float = ANSWER_TIMEOUT_S) -> None:
        """Until at most `limit` requests are in flight. Those that are late are given up, with an error.

        Raises:
            RuntimeError: the engine died.
        """
        with self._changed:
            in_time = self._changed.wait_for(lambda: len(self._live) <= limit or self.dead, timeout)
            late = [] if in_time else list(self._live)
        for handle in late:
            self.engine.cancel(handle)
            self._end(handle, f"no answer in {timeout:g} s")
        if self.dead:
            raise RuntimeError(f"the engine died: {self.dead}")

    def one(self, load: Load) -> Record:
        """Send one request and wait for its answer."""
        (record,) = self.run([load])
        return record

    def control(self, command: str, **arguments: Any) -> dict[str, Any]:
        return self.engine.control(command, arguments, timeout=30.0)

    def unload(self, ref: AdapterRef) -> None:
        """Put an idle adapter out of the device and the host."""
        self._until(
            lambda: self.control("adapter_unload", adapter_id=ref.id, adapter_source=ref.source),
            "not_loaded",
        )

    def to_host(self, ref: AdapterRef) -> None:
        """Bring an adapter to the host, not to the device."""
        self.unload(ref)
        self._until(
            lambda: self.control(
                "adapter_preload", adapter_id=ref.id, adapter_source=ref.source, tier="host"
            ),
            "ready",
        )

    def forget_all(self) -> None:
        """Empty every tier, and check the engine's accounting.

        Raises:
            RuntimeError: the accounting is off.
        """
        self.control("adapter_purge", all=True)
        self._until(lambda: {"status": str(self.control("stats")["adapter_tiers"]["known"])}, "0")
        try:
            self.control("check")
        except LoraxError as error:
            raise RuntimeError(f"the engine's accounting is off: {error.message}") from error

    def close(self) -> None:
        self.engine.stop(20.0)

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        now = time.perf_counter()
        for output in outputs:
            record = self._live.get(output.handle)
            if record is None:
                continue
            if output.token_id is not None:
                record.times.append(now)
            if output.error is not None or output.finish_reason is not None:
                error = "" if output.error is None else str(output.error.get("error", output.error))
                self._end(output.handle, error)

    def on_stats(self, stats: EngineStats) -> None:
        self.stats = stats

    def on_dead(self, reason: str) -> None:
        with self._changed:
            self.dead = reason
            self._changed.notify_all()

    def _end(self, handle: int, error: str) -> None:
        with self._changed:
            record = self._live.pop(handle, None)
            if record is None:
                return
            record.error, record.done = error, True
            self._changed.notify_all()
        if self.on_done is not None:
            self.on_done(record)

    @staticmethod
    def _until(ask: Callable[[], dict[str, Any]], status: str, timeout: float = 60.0) -> None:
        deadline = time.perf_counter() + timeout
        while (answer := ask()["status"]) != status:
            if time.perf_counter() > deadline:
                raise RuntimeError(f"still {answer!r} instead of {status!r} after {timeout:g} s")
            time.sleep(0.005)
