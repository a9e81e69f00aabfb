"""An idle loop sleeps until something comes, and misses nothing that does."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes_engine import FakeEngineBuilder, make_request

from lorax_backend.engine.core import EngineCore
from lorax_backend.engine.loop import EngineLoop
from lorax_backend.errors import LoraxError
from lorax_backend.types import EngineStats, TokenOutput

_TIMEOUT_S = 30.0


class Sink:
    """Counts what comes out; a statistic is sent each time before the loop goes to sleep."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.ended = 0
        self.rests = 0

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        with self._changed:
            self.ended += sum(output.finish_reason is not None for output in outputs)
            self._changed.notify_all()

    def on_stats(self, stats: EngineStats) -> None:
        with self._changed:
            self.rests += stats.running == 0
            self._changed.notify_all()

    def on_reply(self, ticket: int, reply: dict[str, Any] | LoraxError) -> None:
        pass

    def wait(self, ended: int = 0, rests: int = 0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.ended >= ended and self.rests >= rests, _TIMEOUT_S), (
                f"{self.ended} ended, {self.rests} rests"
            )


class Source:
    """Handles of requests on a pipe, one byte each; its end stops the loop."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.set_blocking(descriptor, False)

    def fileno(self) -> int:
        return self._descriptor

    def drain(self, loop: EngineLoop) -> None:
        try:
            handles = os.read(self._descriptor, 4096)
        except BlockingIOError:
            return
        if not handles:
            loop.stop()
        for handle in handles:
            loop.submit(make_request(handle, max_new_tokens=2))


def make_core() -> EngineCore:
    return FakeEngineBuilder()(lambda line: None).core


@contextmanager
def running(loop: EngineLoop) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        loop.stop()
        thread.join(_TIMEOUT_S)
    assert not thread.is_alive()


def test_what_comes_while_the_loop_falls_asleep_is_not_missed() -> None:
    sink = Sink()
    loop = EngineLoop(make_core(), sink)
    with running(loop):
        for number in range(300):  # each just after the one before, when the loop is about to sleep
            loop.submit(make_request(number, max_new_tokens=2))
            sink.wait(ended=number + 1)


def test_requests_of_many_threads_all_end() -> None:
    sink = Sink()
    loop = EngineLoop(make_core(), sink)
    with running(loop):
        threads = [
            threading.Thread(
                target=lambda n=n: [
                    loop.submit(make_request(100 * n + i, max_new_tokens=2)) for i in range(50)
                ]
            )
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        sink.wait(ended=200)


def test_a_source_wakes_the_loop_and_its_end_stops_it() -> None:
    reading, writing = os.pipe()
    sink = Sink()
    loop = EngineLoop(make_core(), sink, source=Source(reading))
    with running(loop) as thread:
        sink.wait(rests=1)
        os.write(writing, bytes([1, 2]))
        sink.wait(ended=2, rests=2)
        loop.submit(make_request(9, max_new_tokens=2))  # the other way in stays open
        sink.wait(ended=3)
        os.close(writing)
        thread.join(_TIMEOUT_S)
        assert not thread.is_alive()
    os.close(reading)


def test_being_woken_again_and_again_lets_the_loop_look_but_compute_nothing() -> None:
    sink = Sink()
    core = make_core()
    loop = EngineLoop(core, sink)
    with running(loop):
        for number in range(1, 20):
            sink.wait(rests=number)
            loop.wake()
    assert core.stats().steps == 0


@pytest.mark.parametrize("limit_s", [0.0, 0.0004])
def test_a_loop_whose_core_waits_for_a_moment_goes_on_by_itself(limit_s: float) -> None:
    class Impatient(EngineCore):
        @property
        def patience_s(self) -> float | None:
            return limit_s

    core = make_core()
    core.__class__ = Impatient
    sink = Sink()
    with running(EngineLoop(core, sink)):
        sink.wait(rests=3)
