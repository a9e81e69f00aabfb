"""Fakes of what the engine core is given: a runner that computes with a real block cache, and an adapter provider.

The runner stores what it is told to write in blocks and reads its context back through the block tables, so a block
that is shared, reused or freed wrongly shows as wrong contents. The next token depends on every token before it, on
the adapter's contents and on the seed, so a lost, doubled or foreign token changes all that follow. Like a device it
takes a copy of the metadata at launch, and computes later, in launch order, when results are asked for.

Standard library only, and importable by a spawned process.
"""

from __future__ import annotations

import sys
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lorax_backend.engine.client import BuiltEngine
from lorax_backend.engine.core import EngineCore, EngineSettings
from lorax_backend.engine.protocols import AdapterFailure
from lorax_backend.errors import AdapterNotFoundError
from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence, StepResult
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.types import AdapterRef, EngineInfo, EngineRequest, FinishReason, SamplingParams

VOCAB = 17
STOP_TOKEN = 3


def next_token(token_ids: Sequence[int], key: str, sampling: SamplingParams, index: int) -> int:
    """What the fake model says after `token_ids`; the stop token is masked before `min_new_tokens`."""
    token = zlib.crc32(array("q", token_ids).tobytes() + f"{key}/{sampling.seed}".encode()) % VOCAB
    if index < sampling.min_new_tokens and token in sampling.stop_token_ids:
        return token + 1
    return token


def expected_answer(request: EngineRequest, key: str = "") -> tuple[list[int], FinishReason]:
    """The answer to a request that runs alone, without any engine."""
    token_ids = list(request.prompt_ids)
    for index in range(request.sampling.max_new_tokens):
        token = next_token(token_ids, key, request.sampling, index)
        token_ids.append(token)
        stopped = token in request.sampling.stop_token_ids and index >= request.sampling.min_new_tokens
        if stopped and index + 1 < request.sampling.max_new_tokens:
            return token_ids[len(request.prompt_ids) :], FinishReason.EOS
    return token_ids[len(request.prompt_ids) :], FinishReason.LENGTH


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeAdapter:
    """`polls` is how many polls loading takes after the first request; None means only `finish_loading` ends it."""

    pages: int = 1
    polls: int | None = 0
    fails: bool = False


class FakeProvider:
    """An AdapterProvider over a small device; `contents[slot]` is what a step that reads the slot finds there."""

    def __init__(
        self, adapters: dict[str, FakeAdapter] | None = None, num_slots: int = 4, num_pages: int = 4
    ) -> None:
        self.adapters = adapters or {}
        self.num_pages = num_pages
        self.contents: list[str | None] = [None] * num_slots
        self.users: dict[str, int] = {}
        self.wakeup: Callable[[], None] = lambda: None
        self.closed = False
        self.activations = 0
        self.copies = 0
        self.copying: set[str] = set()  # adapters that have a slot, but whose weights are still on their way
        self.withheld: set[int] = set()  # handles that may not use their adapter (yet)
        self.prefetched: list[AdapterRef] = []
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self._slots: dict[str, int] = {}  # least recently activated first
        self._wanted: dict[int, str] = {}
        self._loaded: set[str] = set()
        self._waited: dict[str, int] = {}

    @staticmethod
    def key(name: str) -> str:
        return f"local:{name}"

    def resolve(self, ref: AdapterRef) -> AdapterRef:
        return ref

    def acquire(self, handle: int, ref: AdapterRef, api_token: str | None) -> None:
        assert handle not in self._wanted, "acquired twice"
        self._wanted[handle] = ref.id
        self._waited.setdefault(ref.id, 0)

    def release(self, handle: int) -> None:
        self._wanted.pop(handle, None)

    @property
    def num_wanted(self) -> int:
        return len(self._wanted)

    def poll(self) -> list[AdapterFailure]:
        failures = []
        for handle, name in list(self._wanted.items()):
            adapter = self.adapters.get(name)
            if adapter is None or (adapter.fails and self._waited[name] >= (adapter.polls or 0)):
                failures.append(
                    AdapterFailure(handle, AdapterNotFoundError(f"adapter_id: no adapter {name}"))
                )
        for name in set(self._wanted.values()):
            adapter = self.adapters.get(name)
            polls = adapter.polls if adapter is not None and not adapter.fails else None
            if polls is not None and self._waited[name] >= polls:
                self._loaded.add(name)
            self._waited[name] += 1
        return failures

    def finish_loading(self, name: str) -> None:
        self._loaded.add(name)
        self.wakeup()

    def unload(self, name: str) -> None:
        self._loaded.discard(name)
        self.adapters[name].polls = None

    def is_loaded(self, ref: AdapterRef) -> bool:
        return ref.id in self._loaded

    def is_ready(self, handle: int, ref: AdapterRef) -> bool:
        assert self._wanted.get(handle) == ref.id, "asked about a request that did not acquire it"
        return ref.id in self._loaded and handle not in self.withheld

    def is_on_device(self, ref: AdapterRef) -> bool:
        return ref.id in self._slots

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        assert all(ref.id in self._loaded and ref.id not in self._slots for ref in refs)
        self.prefetched = list(refs)

    def control(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.commands.append((command, arguments))
        return {"status": "ready"}

    def check(self) -> None:
        if any(count < 0 for count in self.users.values()):
            raise RuntimeError("adapters are used less than not at all")

    def cache_key(self, ref: AdapterRef) -> str:
        assert ref.id in self._loaded, "cache_key of an adapter that is not loaded"
        return self.key(ref.id)

    def activate(self, ref: AdapterRef) -> int | None:
        assert ref.id in self._loaded, "activated before it was loaded"
        name = ref.id
        if name not in self._slots:
            if not self._make_room(self.adapters[name].pages):
                return None
            slot = self.contents.index(None)
            self.copies += 1
            self.contents[slot] = self.key(name)
            self._slots[name] = slot
        if name in self.copying:
            return None
        slot = self._slots[name]
        self._slots[name] = self._slots.pop(name)
        self.users[name] = self.users.get(name, 0) + 1
        self.activations += 1
        return slot

    def deactivate(self, ref: AdapterRef) -> None:
        assert self.users.get(ref.id, 0) > 0, "deactivated more often than activated"
        self.users[ref.id] -= 1

    def fits(self, ref: AdapterRef) -> bool:
        return self.adapters[ref.id].pages <= self.num_pages

    def set_wakeup(self, wakeup: Callable[[], None]) -> None:
        self.wakeup = wakeup

    def stats(self) -> dict[str, int]:
        return {
            "pages_total": self.num_pages,
            "pages_used": self._pages_used,
            "on_device": len(self._slots),
            "loading": 0,
            "loads": len(self._loaded),
            "evictions": 0,
        }

    def describe(self) -> list[dict[str, Any]]:
        return [{"id": name, "users": self.users.get(name, 0)} for name in sorted(self._loaded)]

    def close(self) -> None:
        self.closed = True

    @property
    def _pages_used(self) -> int:
        return sum(self.adapters[name].pages for name in self._slots)

    def _make_room(self, pages: int) -> bool:
        in_use = [name for name in self._slots if self.users.get(name, 0)]
        if pages + sum(self.adapters[name].pages for name in in_use) > self.num_pages:
            return False
        if len(in_use) == len(self.contents):
            return False
        for name in [name for name in self._slots if name not in in_use]:
            if self._pages_used + pages <= self.num_pages and None in self.contents:
                break
            self.contents[self._slots.pop(name)] = None  # overwritten while older steps may still be running
        return True


@dataclass
class _Row:
    """The copy of one scheduled sequence that a launch takes."""

    known: list[int]
    start: int
    count: int
    sample: bool
    index: int
    slot: int
    adapter_slot: int
    cache_key: str
    block_table: list[int]
    sampling: SamplingParams

    @classmethod
    def of(cls, item: ScheduledSequence) -> _Row:
        seq = item.seq
        return cls(
            known=list(seq.token_ids[: item.start + item.count]),
            start=item.start,
            count=item.count,
            sample=item.sample,
            index=item.generated_index,
            slot=seq.slot,
            adapter_slot=seq.adapter_slot,
            cache_key=seq.cache_key,
            block_table=list(seq.block_table),
            sampling=seq.sampling,
        )


class FakeStep:
    def __init__(self, runner: FakeRunner, rows: list[_Row]) -> None:
        self.rows = rows
        self.outcome: StepResult | Exception | None = None
        self.follows_failure = False
        self._runner = runner

    def result(self) -> StepResult:
        self._runner.compute_until(self)
        assert self.outcome is not None
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@dataclass
class FakeRunner:
    """A ModelRunner. `fail_launch` and `fail_result` hold numbers of launches (from 0) that raise.

    Whatever a real runner could not have computed rightly is listed in `violations`: the engine may drop the outputs
    of such a step, so that they alone would not show it.
    """

    settings: SchedulerSettings
    provider: FakeProvider
    fail_launch: set[int] = field(default_factory=set)
    fail_result: set[int] = field(default_factory=set)
    step_seconds: float = 0.0
    is_lost: bool = False
    launches: int = 0
    closed: bool = False
    batches: list[list[tuple[int, int]]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache: list[list[tuple[str, int, int] | None]] = [
            [None] * self.settings.block_size for _ in range(self.num_blocks)
        ]
        self.last_drawn = [-1] * self.settings.num_rows
        self._owner: list[int | None] = [None] * self.settings.num_rows
        self._queue: deque[FakeStep] = deque()
        self._prompt_scores: dict[int, list[float]] = {}

    @property
    def num_blocks(self) -> int:
        return self.settings.num_blocks

    def check_device(self) -> None:
        if self.is_lost:
            raise RuntimeError("the device is lost")

    def close(self) -> None:
        self.closed = True

    def launch(self, batch: ScheduledBatch) -> FakeStep:
        number, self.launches = self.launches, self.launches + 1
        if number in self.fail_launch:
            raise RuntimeError(f"launch {number} fails")
        with self._noting_violations():
            self._check(batch)
        self.batches.append([(item.seq.handle, item.count) for item in batch.sequences])
        step = FakeStep(self, [_Row.of(item) for item in batch.sequences])
        if number in self.fail_result:
            step.outcome = RuntimeError(f"step {number} fails")
        self._queue.append(step)
        return step

    def compute_until(self, last: FakeStep) -> None:
        if self.step_seconds:
            time.sleep(self.step_seconds)
        while self._queue:
            step = self._queue.popleft()
            if isinstance(step.outcome, Exception):
                self._spoil(step.rows)
                for later in self._queue:
                    later.follows_failure = True
            elif step.follows_failure:
                step.outcome = RuntimeError("the step before fails")
            else:
                with self._noting_violations():
                    step.outcome = self._compute(step.rows)
            if step is last:
                return

    @contextmanager
    def _noting_violations(self) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            self.violations.append(str(error))
            raise

    def _check(self, batch: ScheduledBatch) -> None:
        """Whatever a real runner relies on."""
        items = batch.sequences
        assert items, "an empty step"
        assert batch.num_tokens == sum(item.count for item in items) <= self.settings.step_budget
        assert len(items) <= self.settings.num_rows
        assert len({item.seq.handle for item in items}) == len(items), "a sequence twice in a step"
        assert len({item.seq.slot for item in items}) == len(items), "a row twice in a step"
        decodes = [item.count == 1 and item.sample for item in items]
        assert decodes == sorted(decodes, reverse=True), "decodes must come first"
        for slot in batch.finished_slots:
            self._owner[slot] = None
        for item in items:
            seq = item.seq
            assert 0 <= seq.slot < self.settings.num_rows
            assert item.count >= 1
            assert item.start + item.count <= len(seq.block_table) * self.settings.block_size
            assert item.start + item.count <= len(seq.token_ids) + 1
            assert self._owner[seq.slot] in (None, seq.handle), (
                "a row was taken over without having been freed"
            )
            self._owner[seq.slot] = seq.handle
            if item.sample:
                assert item.generated_index == item.start + item.count - seq.prompt_len

    def _compute(self, rows: list[_Row]) -> StepResult:
        size = self.settings.block_size
        token_lists = []
        for row in rows:
            if row.adapter_slot >= 0:
                assert self.provider.contents[row.adapter_slot] == row.cache_key, (
                    "the adapter was overwritten"
                )
            else:
                assert row.cache_key == ""
            token_ids = list(row.known)
            if len(token_ids) < row.start + row.count:
                token_ids.append(self.last_drawn[row.slot])
            token_lists.append(token_ids)
            for position in range(row.start, row.start + row.count):
                entry = (row.cache_key, position, token_ids[position])
                self.cache[row.block_table[position // size]][position % size] = entry
            if row.sampling.prompt_logprobs:
                if row.start == 0:
                    self._prompt_scores[row.slot] = []
                self._prompt_scores[row.slot] += map(float, token_ids[row.start : row.start + row.count])
        result = StepResult([], [], [])
        for row, token_ids in zip(rows, token_lists, strict=True):
            context = [self.cache[row.block_table[p // size]][p % size] for p in range(len(token_ids))]
            assert context == [(row.cache_key, p, token) for p, token in enumerate(token_ids)], (
                "wrong cache contents"
            )
            if row.sample:
                token = next_token(token_ids, row.cache_key, row.sampling, row.index)
                self.last_drawn[row.slot] = token
                result.token_ids.append(token)
                result.logprobs.append(-0.5 if row.sampling.top_logprobs is not None else None)
                result.top_logprobs.append(None)
                scores = self._prompt_scores.get(row.slot)
                if scores is not None and row.index == 0:
                    result.prompt_logprobs[len(result.token_ids) - 1] = tuple(scores[1:])
        return result

    def _spoil(self, rows: Iterable[_Row]) -> None:
        size = self.settings.block_size
        for row in rows:
            for position in range(row.start, row.start + row.count):
                self.cache[row.block_table[position // size]][position % size] = None


def make_settings(**changes: Any) -> SchedulerSettings:
    values: dict[str, Any] = {
        "num_blocks": 32,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_batch_tokens": 16,
        "max_input_length": 64,
        "max_total_tokens": 96,
    }
    return SchedulerSettings(**{**values, **changes})


def make_core(
    settings: SchedulerSettings | None = None,
    provider: FakeProvider | None = None,
    depth: int = 1,
    clock: Callable[[], float] | None = None,
) -> tuple[EngineCore, FakeRunner, FakeProvider]:
    settings = settings or make_settings()
    provider = provider or FakeProvider()
    runner = FakeRunner(settings, provider)
    core = EngineCore(runner, provider, EngineSettings(settings, depth), clock or FakeClock())
    return core, runner, provider


def make_request(
    handle: int, prompt: Sequence[int] = (1, 2, 3), adapter: str | None = None, **options: Any
) -> Any:
    """An EngineRequest; `priority`, `queue_timeout_s` and the fields of SamplingParams are options."""
    priority = options.pop("priority", 0)
    queue_timeout_s = options.pop("queue_timeout_s", None)
    sampling = SamplingParams(**{"max_new_tokens": 4, **options})
    ref = AdapterRef("local", adapter) if adapter is not None else None
    return EngineRequest(handle, list(prompt), sampling, ref, None, priority, queue_timeout_s)


class _FaultyProvider(FakeProvider):
    def poll(self) -> list[AdapterFailure]:
        if self.num_wanted:
            raise RuntimeError("the table of adapters is torn")
        return super().poll()


@dataclass(frozen=True)
class FakeEngineBuilder:
    """Builds an engine of fakes, also in a spawned process. `fault` makes the builder raise or exit, or raise with the
    length of its threads' turns ("tell"), or the adapters' poll raise once a request has come ("poll"), or the device
    be lost with the first step that fails ("device")."""

    fault: str = ""
    step_seconds: float = 0.0
    fail_result: tuple[int, ...] = ()
    fail_launch: tuple[int, ...] = ()
    depth: int = 1
    progress: tuple[str, ...] = ("loading weights 1/2", "loading weights 2/2")

    def __call__(self, progress: Callable[[str], None]) -> BuiltEngine:
        for line in self.progress:
            progress(line)
        if self.fault == "raise":
            raise ValueError("model_id: no such model")
        if self.fault == "tell":
            raise ValueError(f"threads take turns of {sys.getswitchinterval():g} s")
        if self.fault == "exit":
            raise SystemExit("gone while loading")
        settings = make_settings(
            num_blocks=1024, max_num_seqs=64, max_batch_tokens=256, max_total_tokens=4096
        )
        late = FakeAdapter(polls=None)
        provider = FakeProvider({"falcon": FakeAdapter(), "otter": FakeAdapter(), "late": late})
        if self.fault == "poll":
            provider = _FaultyProvider(provider.adapters)
        runner = FakeRunner(
            settings,
            provider,
            fail_launch=set(self.fail_launch),
            fail_result=set(self.fail_result),
            step_seconds=self.step_seconds,
            is_lost=self.fault == "device",
        )
        core = EngineCore(runner, provider, EngineSettings(settings, self.depth))
        return BuiltEngine(core, fake_info(settings))


def fake_info(settings: SchedulerSettings) -> EngineInfo:
    return EngineInfo(
        model_id="fake",
        model_type="fake",
        dtype="int",
        device="none",
        attention_backend="fake",
        lora_backend="fake",
        num_blocks=settings.num_blocks,
        block_size=settings.block_size,
        adapter_pages=4,
        adapter_page_rank=8,
        max_lora_rank=8,
        max_input_length=settings.max_input_length,
        max_total_tokens=settings.max_total_tokens,
        max_num_seqs=settings.max_num_seqs,
        max_batch_tokens=settings.max_batch_tokens,
        load_seconds=0.0,
    )
