"""Whatever happens in whatever order: nothing leaks, nothing is shared, nobody in use is moved, nobody is forgotten."""

from __future__ import annotations

import contextlib
from typing import Any

from fakes_adapters import Bench, FakeAdapter, ref
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorax_backend.errors import AdapterDownloadError, AdapterIncompatibleError, ValidationError
from lorax_backend.types import AdapterRef

NAMES = ["a", "b", "c", "d", "private", "wide", "missing"]
ERRORS = [AdapterIncompatibleError, AdapterDownloadError, OSError]
COMMANDS = ["preload", "pin", "unpin", "unload", "reload", "purge"]
TOKENS = [None, "alice", "mallory"]


class AdapterMachine(RuleBasedStateMachine):
    """The engine's side of the contract is kept: a handle is acquired once, activations are undone before release."""

    @initialize(num_pages=st.integers(1, 5), max_slots=st.integers(1, 4), host_pages=st.integers(1, 6))
    def start(self, num_pages: int, max_slots: int, host_pages: int) -> None:
        adapters = {name: FakeAdapter(float(index + 1)) for index, name in enumerate(NAMES[:4])}
        adapters["b"].rank = 12
        adapters["private"] = FakeAdapter(5.0, tokens={"alice"})
        adapters["wide"] = FakeAdapter(6.0, rank=32)
        self.bench = Bench(num_pages, max_slots, host_pages, **adapters)
        self.waiting: dict[int, tuple[str, str | None]] = {}
        self.running: dict[int, tuple[str, str | None, int]] = {}
        self.ended: set[int] = set()
        self.refs: dict[int, AdapterRef] = {}
        self.numbers: dict[int, float] = {}  # of the weights a request has begun with

    @rule(name=st.sampled_from(NAMES), token=st.sampled_from(TOKENS))
    def acquire(self, name: str, token: str | None) -> None:
        current = self.bench.adapters.resolve(ref(name))
        handle = self.bench.acquire(name, token)
        self.refs[handle] = current
        self.waiting[handle] = (name, token)

    @rule(name=st.sampled_from(NAMES), verb=st.sampled_from(COMMANDS))
    def command(self, name: str, verb: str) -> None:
        arguments = {"adapter_id": name, "adapter_source": "fake"}
        if verb in ("preload", "reload"):
            arguments["api_token"] = "alice"
        with contextlib.suppress(ValidationError):  # no room for another pin
            self.bench.adapters.control(f"adapter_{verb}", arguments)

    @rule(name=st.sampled_from(NAMES[:6]))
    def retrain(self, name: str) -> None:
        self.next_number = getattr(self, "next_number", 100.0) + 1.0
        self.bench.source.adapters[name].number = self.next_number

    @precondition(lambda self: self.waiting)
    @rule()
    def prefetch(self) -> None:
        self.bench.adapters.prefetch([self.refs[handle] for handle in sorted(self.waiting)[:3]])

    @precondition(lambda self: self.bench.loader.jobs)
    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        self.bench.loader.run(data.draw(st.sampled_from(self.bench.loader.jobs)))

    @precondition(lambda self: self.bench.loader.jobs)
    @rule(data=st.data())
    def begin_work_that_ends_later(self, data: st.DataObject) -> None:
        """As if a thread had taken it up: it can no longer be cancelled, but its result comes only at the end."""
        loader = self.bench.loader
        job = data.draw(st.sampled_from(loader.jobs))
        loader.jobs.remove(job)
        loader.submit(job.lane, job.work, job.timeout_s, job.done)

    @rule(
        name=st.sampled_from(NAMES[:6]),
        error=st.sampled_from([AdapterIncompatibleError, AdapterDownloadError, OSError]),
    )
    def break_next(self, name: str, error: Any) -> None:
        self.bench.source.adapters[name].error = error("broken")

    @rule(name=st.sampled_from(NAMES[:6]))
    def break_next_read(self, name: str) -> None:
        self.bench.source.adapters[name].read_error = AdapterIncompatibleError("NaN")

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.bench.clock.now += seconds

    @rule()
    def poll(self) -> None:
        for failure in self.bench.adapters.poll():
            assert failure.handle in self.waiting, "it waited, and was told once"
            del self.waiting[failure.handle]
            self.ended.add(failure.handle)
            self.bench.adapters.release(failure.handle)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(self.waiting)))
        name, token = self.waiting[handle]
        if not self.bench.adapters.is_ready(handle, self.refs[handle]):
            return
        assert name != "private" or token == "alice", "nobody else gets this far"
        slot = self.bench.adapters.activate(self.refs[handle])
        if slot is not None:
            del self.waiting[handle]
            self.running[handle] = (name, token, slot)
            (number,) = self.bench.content(slot)
            assert number == self.numbers.setdefault(handle, number), "the weights it began with"

    @precondition(lambda self: self.running)
    @rule(data=st.data(), over=st.booleans())
    def stop(self, data: st.DataObject, over: bool) -> None:
        handle = data.draw(st.sampled_from(sorted(self.running)))
        name, token, _ = self.running.pop(handle)
        self.bench.adapters.deactivate(self.refs[handle])
        if over:
            self.bench.adapters.release(handle)
        else:
            self.waiting[handle] = (name, token)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def client_goes(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[handle]
        self.bench.adapters.release(handle)
        # Its failure may be on its way already.
        self.bench.adapters._loading._failures = [
            failure for failure in self.bench.adapters._loading._failures if failure.handle != handle
        ]

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.check()
        stats = self.bench.adapters.stats()
        assert stats["pages_used"] + self.bench.arena.num_free_pages == stats["pages_total"]
        assert stats["host_bytes_used"] <= stats["host_bytes_total"]

    @invariant()
    def adapters_in_use_stay_where_they_are(self) -> None:
        for handle, (_, _, slot) in getattr(self, "running", {}).items():
            assert self.bench.content(slot) == {self.numbers[handle]}
        owners = {slot: self.refs[handle] for handle, (_, _, slot) in getattr(self, "running", {}).items()}
        assert len(owners) == len(set(owners.values()))

    @invariant()
    def pins_leave_room(self) -> None:
        if hasattr(self, "bench"):
            stats = self.bench.adapters.stats()
            assert stats["pages_pinned"] <= stats["pages_total"]

    def teardown(self) -> None:
        """The engine goes on: in the end every request has run or was told why not."""
        if not hasattr(self, "bench"):
            return
        for handle in list(self.running):
            self.running.pop(handle)
            self.bench.adapters.deactivate(self.refs[handle])
            self.bench.adapters.release(handle)
        for name in NAMES:  # what is pinned may leave too little room for the widest
            self.bench.adapters.control("adapter_unpin", {"adapter_id": name, "adapter_source": "fake"})
        for _ in range(200):
            if not self.waiting and not self.bench.loader.jobs:
                break
            self.poll()
            for job in list(self.bench.loader.jobs):
                self.bench.loader.run(job)
            for handle in list(self.waiting):
                key = self.refs[handle]
                if (
                    self.bench.adapters.is_ready(handle, key)
                    and self.bench.adapters.activate(key) is not None
                ):
                    del self.waiting[handle]
                    self.bench.adapters.deactivate(key)
                    self.bench.adapters.release(handle)
        self.poll()
        assert not self.waiting, "a request was forgotten"
        self.bench.settle()
        assert self.bench.adapters.stats()["loading"] == 0
        assert not any(entry["retired"] for entry in self.bench.adapters.describe()), (
            "old weights outlive their use"
        )
        self.bench.check()


AdapterMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
test_adapters_under_random_operations = AdapterMachine.TestCase
