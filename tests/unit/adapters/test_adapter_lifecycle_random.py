"""Whatever happens in whatever order: nothing leaks, nothing is shared, nobody in use is moved, nobody is forgotten."""

from __future__ import annotations

from typing import Any

from fakes_adapters import Bench, FakeAdapter
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorax_backend.errors import AdapterDownloadError, AdapterIncompatibleError

NAMES = ["a", "b", "c", "d", "private", "wide", "missing"]
ERRORS = [AdapterIncompatibleError, AdapterDownloadError, OSError]
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

    @rule(name=st.sampled_from(NAMES), token=st.sampled_from(TOKENS))
    def acquire(self, name: str, token: str | None) -> None:
        self.waiting[self.bench.acquire(name, token)] = (name, token)

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
        if not self.bench.is_loaded(name):
            return
        assert name != "private" or token == "alice", "nobody else gets this far"
        slot = self.bench.activate(name)
        if slot is not None:
            del self.waiting[handle]
            self.running[handle] = (name, token, slot)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), over=st.booleans())
    def stop(self, data: st.DataObject, over: bool) -> None:
        handle = data.draw(st.sampled_from(sorted(self.running)))
        name, token, _ = self.running.pop(handle)
        self.bench.deactivate(name)
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
        for name, _, slot in getattr(self, "running", {}).values():
            assert self.bench.content(slot) == {self.bench.source.adapters[name].number}
        owners = {slot: name for name, _, slot in getattr(self, "running", {}).values()}
        assert len(owners) == len(set(owners.values()))

    def teardown(self) -> None:
        """The engine goes on: in the end every request has run or was told why not."""
        if not hasattr(self, "bench"):
            return
        for handle in list(self.running):
            name, _, _ = self.running.pop(handle)
            self.bench.deactivate(name)
            self.bench.adapters.release(handle)
        for _ in range(200):
            if not self.waiting and not self.bench.loader.jobs:
                break
            self.poll()
            for job in list(self.bench.loader.jobs):
                self.bench.loader.run(job)
            for handle, (name, _) in list(self.waiting.items()):
                if self.bench.is_loaded(name) and self.bench.activate(name) is not None:
                    del self.waiting[handle]
                    self.bench.deactivate(name)
                    self.bench.adapters.release(handle)
        self.poll()
        assert not self.waiting, "a request was forgotten"
        assert self.bench.adapters.stats()["loading"] == 0
        self.bench.check()


AdapterMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
test_adapters_under_random_operations = AdapterMachine.TestCase
