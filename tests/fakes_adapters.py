"""Sources, plans and a loader under a test's control: nothing happens until the test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorax_backend.adapters.arena import LoraArena
from lorax_backend.adapters.host_adapter import HostAdapter
from lorax_backend.adapters.host_memory import HostMemory
from lorax_backend.adapters.lifecycle import AdapterLifecycle
from lorax_backend.adapters.loading import AdapterParts
from lorax_backend.adapters.sources.base import FetchedAdapter
from lorax_backend.errors import AdapterNotFoundError, AdapterUnauthorizedError, ValidationError
from lorax_backend.types import AdapterRef
from lorax_kernels.layout import LoraSite, PageLayout, pages_for_rank

LAYOUT = PageLayout({"layers.0.qkv": LoraSite(8, (8, 8, 8)), "lm_head": LoraSite(8, (16,))})
PAGE_BYTES = LAYOUT.page_size * 4


def ref(name: str) -> AdapterRef:
    return AdapterRef("fake", name)


@dataclass
class FakeAdapter:
    """`tokens=None` is public; `error` is raised by the next fetch, `read_error` by the next load."""

    number: float
    rank: int = 8
    tokens: set[str] | None = None
    error: Exception | None = None
    read_error: Exception | None = None


@dataclass
class FakeSource:
    adapters: dict[str, FakeAdapter] = field(default_factory=dict)
    fetches: list[tuple[str, str | None]] = field(default_factory=list)
    checks: list[tuple[str, str | None]] = field(default_factory=list)
    check_error: Exception | None = None

    name = "fake"
    remote = True

    def canonical(self, ref: AdapterRef) -> AdapterRef:
        if not ref.id:
            raise ValidationError("adapter_id: empty")
        return AdapterRef("fake", ref.id.rstrip("/"), ref.revision)

    def credential(self, token: str | None) -> str:
        return token or ""

    def fetch(self, ref: AdapterRef, token: str | None) -> FetchedAdapter:
        self.fetches.append((ref.id, token))
        adapter = self._readable(ref, token)
        if adapter.error is not None:
            error, adapter.error = adapter.error, None
            raise error
        return FetchedAdapter(Path("/fake") / ref.id, f"commit-{adapter.number}", adapter.tokens is None)

    def authorize(self, ref: AdapterRef, token: str | None) -> bool:
        self.checks.append((ref.id, token))
        if self.check_error is not None:
            raise self.check_error
        return self._readable(ref, token).tokens is None

    def inspect(self, folder: Path) -> FakePlan:
        return FakePlan(self.adapters[folder.name])

    def _readable(self, ref: AdapterRef, token: str | None) -> FakeAdapter:
        adapter = self.adapters.get(ref.id)
        if adapter is None:
            raise AdapterNotFoundError(f"{ref} is not here")
        if adapter.tokens is not None and token not in adapter.tokens:
            raise AdapterUnauthorizedError(f"{ref} is private")
        return adapter


@dataclass
class FakePlan:
    adapter: FakeAdapter

    @property
    def rank(self) -> int:
        return self.adapter.rank

    @property
    def num_pages(self) -> int:
        return pages_for_rank(self.rank)

    @property
    def nbytes(self) -> int:
        return self.num_pages * PAGE_BYTES

    def load(self, pages: torch.Tensor) -> HostAdapter:
        if self.adapter.read_error is not None:
            error, self.adapter.read_error = self.adapter.read_error, None
            raise error
        assert pages.shape == (self.num_pages, LAYOUT.page_size)
        return HostAdapter(pages.fill_(self.adapter.number), self.rank, frozenset({"lm_head"}))


@dataclass(eq=False)
class Job:
    lane: str
    work: Callable[[], Any]
    timeout_s: float
    done: Callable[[Any, Exception | None], None]


@dataclass
class ManualLoader:
    """Keeps jobs until the test runs them, in any order."""

    jobs: list[Job] = field(default_factory=list)
    closed: bool = False

    def submit(self, lane: str, work: Callable[[], Any], timeout_s: float, done: Any) -> Job:
        job = Job(lane, work, timeout_s, done)
        self.jobs.append(job)
        return job

    def cancel(self, ticket: Job) -> bool:
        if ticket in self.jobs:
            self.jobs.remove(ticket)
            return True
        return False

    def close(self) -> None:
        self.closed = True

    def run(self, job: Job) -> None:
        self.jobs.remove(job)
        try:
            value = job.work()
        except Exception as error:
            job.done(None, error)
        else:
            job.done(value, None)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """An `AdapterLifecycle` with everything around it in the test's hands."""

    def __init__(
        self,
        num_pages: int = 4,
        max_slots: int = 4,
        host_pages: int = 100,
        max_rank: int = 32,
        auth_ttl_s: float = 300.0,
        **adapters: FakeAdapter,
    ) -> None:
        self.source = FakeSource(adapters)
        self.loader = ManualLoader()
        self.clock = Clock()
        self.arena = LoraArena(LAYOUT, num_pages, max_slots, torch.float32, "cpu", max_rank)
        self.memory = HostMemory(LAYOUT, host_pages * PAGE_BYTES, torch.float32)
        parts = AdapterParts(
            {"fake": self.source}, self.source.inspect, self.arena, self.memory, self.loader, 60.0, auth_ttl_s
        )
        self.adapters = AdapterLifecycle(parts, self.clock)
        self.wakeups = 0
        self.adapters.set_wakeup(self._wake)
        self._next_handle = 0

    def _wake(self) -> None:
        self.wakeups += 1

    def acquire(self, name: str, token: str | None = None) -> int:
        self._next_handle += 1
        self.adapters.acquire(self._next_handle, ref(name), token)
        return self._next_handle

    def settle(self) -> dict[int, Exception]:
        """Run all jobs, and those that follow from them; the errors by handle."""
        failed: dict[int, Exception] = {}
        while True:
            failed.update({failure.handle: failure.error for failure in self.adapters.poll()})
            self.check()
            if not self.loader.jobs:
                return failed
            self.loader.run(self.loader.jobs[0])

    def load(self, name: str, token: str | None = None) -> int:
        """Acquire and load; the handle."""
        handle = self.acquire(name, token)
        assert not self.settle()
        assert self.adapters.is_loaded(ref(name))
        return handle

    def is_loaded(self, name: str) -> bool:
        return self.adapters.is_loaded(ref(name))

    def is_ready(self, name: str, handle: int) -> bool:
        return self.adapters.is_ready(handle, ref(name))

    def activate(self, name: str) -> int | None:
        slot = self.adapters.activate(ref(name))
        self.check()
        return slot

    def deactivate(self, name: str) -> None:
        self.adapters.deactivate(ref(name))
        self.check()

    def on_device(self) -> set[str]:
        return {entry["id"] for entry in self.adapters.describe() if entry["slot"] is not None}

    def status(self, name: str) -> str | None:
        return next((entry["status"] for entry in self.adapters.describe() if entry["id"] == name), None)

    def content(self, slot: int) -> set[float]:
        """The numbers in the pages of a slot; one, if all is well."""
        row = self.arena.slot_pages[slot]
        return set(self.arena.pages[row[row >= 0]].flatten().tolist())

    def check(self) -> None:
        self.adapters.check()
        self.arena.check()
