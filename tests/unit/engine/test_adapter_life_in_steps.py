"""Adapters that come and go in a real engine with a slow hub: what it costs the others, counted in steps, not seconds.

perf/adapter_life.py measures the same in milliseconds.
"""

from __future__ import annotations

import collections
import gc
import itertools
import logging
import random
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_files import read_files
from hub_server import HubServer
from stepped_engine import SteppedEngine

from lorax_backend.adapters.checkpoint import AdapterPlan
from lorax_backend.types import AdapterRef

WARM, NEWCOMERS = 6, 6
REGISTERED, REQUESTS, ROUNDS = 2000, 450, 4


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty hub that the hub source finds by HF_ENDPOINT, and no token in the environment."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LORAX_USE_GLOBAL_HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def make_engine(
    tiny_model_path: Callable[..., Path], tmp_path: Path
) -> Iterator[Callable[..., SteppedEngine]]:
    made: list[SteppedEngine] = []

    def make(**options: Any) -> SteppedEngine:
        options = {
            "num_blocks": 1024,
            "max_batch_size": 8,
            "adapter_disk_cache": str(tmp_path / "disk"),
        } | options
        made.append(SteppedEngine(tiny_model_path(), **options))
        return made[-1]

    yield make
    for engine in made:
        engine.core.close()


@pytest.fixture
def adapter_files(
    tiny_model_path: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> list[dict[str, bytes]]:
    """The files of four adapters of different ranks."""
    return [
        read_files(tiny_adapter(tiny_model_path(), seed=n, rank=rank))
        for n, rank in enumerate((8, 16, 4, 24))
    ]


def hub_ref(name: str) -> AdapterRef:
    return AdapterRef("hub", f"org/{name}")


def threads_that_read(monkeypatch: pytest.MonkeyPatch) -> set[threading.Thread]:
    """The threads that read weights from now on."""
    seen: set[threading.Thread] = set()
    original = AdapterPlan.load

    def load(self: AdapterPlan, pages: Any) -> Any:
        seen.add(threading.current_thread())
        return original(self, pages)

    monkeypatch.setattr(AdapterPlan, "load", load)
    return seen


def test_warm_streams_get_a_token_in_every_step_while_cold_adapters_come_slowly(
    hub: HubServer,
    make_engine: Callable[..., SteppedEngine],
    adapter_files: list[dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readers = threads_that_read(monkeypatch)
    names = [f"warm{n}" for n in range(WARM)] + [f"cold{n}" for n in range(NEWCOMERS)]
    for name, files in zip(names, itertools.cycle(adapter_files)):
        hub.commit(f"org/{name}", files)
    engine = make_engine(adapter_pages=24, adapter_loader_threads=2)
    streams = list(range(WARM))
    for handle in streams:
        engine.add(handle, hub_ref(f"warm{handle}") if handle else None, 480)
    engine.until(lambda: all(engine.tokens[handle] for handle in streams))
    lost = collections.Counter[int]()

    def step() -> None:
        lost.update(set(streams) - engine.step())

    for number in range(NEWCOMERS):
        release = threading.Event()
        hub.add_fault(f"GET /org/cold{number}/resolve", hold=release)  # begins to answer, then hangs
        newcomer = 100 + number
        engine.add(newcomer, hub_ref(f"cold{number}"), 4)
        for _ in range(10):
            step()
        assert not engine.tokens[newcomer]
        release.set()
        while not engine.tokens[newcomer]:  # a step for each piece of news, so that few are needed
            engine.wait_for_news()
            step()
    while any(engine.tokens[100 + number][3:] == [] for number in range(NEWCOMERS)):
        step()
    assert set(streams) <= set(engine.live), "the streams went on all the while"
    assert not lost, "each stream got a token in every single step"
    assert not engine.errors
    assert readers
    assert threading.current_thread() not in readers, "the engine's thread reads no weights"


def test_adapters_that_cannot_be_had_cost_warm_streams_no_token_either(
    hub: HubServer,
    make_engine: Callable[..., SteppedEngine],
    adapter_files: list[dict[str, bytes]],
    tiny_model_path: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
) -> None:
    hub.commit("org/warm", adapter_files[0])
    hub.commit("org/huge", read_files(tiny_adapter(tiny_model_path(), rank=48)))
    weights = adapter_files[1]["adapter_model.safetensors"]
    hub.commit("org/damaged", adapter_files[1] | {"adapter_model.safetensors": weights[: len(weights) // 2]})
    engine = make_engine(adapter_pages=8, max_lora_rank=32)
    engine.add(0, hub_ref("warm"), 480)
    engine.until(lambda: bool(engine.tokens[0]))
    for handle, name in enumerate(("huge", "damaged", "missing"), start=1):
        engine.add(handle, hub_ref(name), 4)
    while len(engine.errors) < 3:
        assert engine.step() == {0}
        if len(engine.errors) < 3:
            engine.wait_for_news()
    assert set(engine.errors) == {1, 2, 3}
    assert engine.step() == {0}


def test_a_purge_removes_the_files_of_an_adapter_that_was_used_last(
    hub: HubServer, make_engine: Callable[..., SteppedEngine], adapter_files: list[dict[str, bytes]]
) -> None:
    hub.commit("org/last", adapter_files[0])
    engine = make_engine(adapter_pages=8)
    engine.add(0, hub_ref("last"), 2)
    engine.finish()
    assert engine.tiers()["on_disk"] == 1
    engine.core.control("adapter_purge", {"adapter_id": "org/last"})
    while engine.tiers()["on_disk"]:
        engine.wait_for_news()
        engine.step()


def test_a_flood_of_one_adapter_costs_the_others_few_steps(
    make_engine: Callable[..., SteppedEngine],
    tiny_model_path: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
) -> None:
    folders = [tiny_adapter(tiny_model_path(), seed=n) for n in range(4)]
    refs = [AdapterRef("local", str(folder)) for folder in folders]
    waits = {}
    for flood in (0, 60):
        engine = make_engine(adapter_pages=8, max_batch_tokens=64)
        for handle, ref in enumerate(refs):  # all on the device
            engine.add(handle, ref, 2)
        engine.finish()
        for handle in range(flood):
            engine.add(1000 + handle, refs[0], 24, tuple(range(10, 26)))
        for _ in range(6 if flood else 0):
            engine.step()
        arrived: dict[int, int] = {}
        handles = itertools.count(2000)
        for _ in range(5):
            for ref in refs[1:]:
                handle = next(handles)
                arrived[handle] = engine.num_steps
                engine.add(handle, ref, 4, (30 + handle % 50, 6, 7, 8))
            for _ in range(8):
                engine.step() if engine.live else None
        engine.finish()
        assert not engine.errors
        waits[flood] = sorted(engine.first_step[handle] - since for handle, since in arrived.items())
    assert waits[0] == [0] * 15, "alone they begin in the next step"
    assert waits[60][-1] <= 3, f"steps waited beside the flood: {waits[60]}"


def test_thousands_of_adapters_under_zipf_traffic_leave_nothing_behind(
    make_engine: Callable[..., SteppedEngine], adapter_files: list[dict[str, bytes]], tmp_path: Path
) -> None:
    originals = [tmp_path / f"original{n}" for n in range(len(adapter_files))]
    for folder, files in zip(originals, adapter_files, strict=True):
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
    refs = []
    for number in range(REGISTERED):
        folder = tmp_path / "many" / f"a{number}"
        folder.mkdir(parents=True)
        for file in originals[number % len(originals)].iterdir():
            (folder / file.name).hardlink_to(file)
        refs.append(AdapterRef("local", str(folder)))
    engine = make_engine(adapter_pages=24, max_active_adapters=12, adapter_host_bytes=2 << 20)
    rng = random.Random(3)
    wanted = rng.choices(refs, [1 / (rank + 1) for rank in range(REGISTERED)], k=REQUESTS)
    sizes = []
    handles = itertools.count()
    most_known = 0
    for _ in range(ROUNDS):  # the same traffic over and over: after the first time, nothing new is to be kept
        for ref in wanted:
            engine.add(next(handles), ref, 2)
            while len(engine.live) >= 12:
                engine.step()
            most_known = max(most_known, engine.tiers()["known"])
        engine.finish()
        assert not engine.errors
        assert all(len(tokens) == 2 for tokens in engine.tokens.values())
        for answers in (engine.tokens, engine.first_step):  # the test's own
            answers.clear()
        engine.core.control("reset_prefix_cache", {})
        engine.core.step()  # takes in what the loader's threads had still to say
        sizes.append(held_by(engine.core))
    tiers = engine.tiers()
    total = sum(tiers["tier_hits"].values())
    print({tier: round(hits / total, 3) for tier, hits in tiers["tier_hits"].items()})  # noqa: T201
    assert total == ROUNDS * REQUESTS
    assert tiers["tier_hits"]["device"] > tiers["tier_hits"]["host"] > 0
    room = (
        tiers["slots_total"]
        + tiers["host_bytes_total"] // engine.core.adapters._loading.host.memory.page_bytes
    )
    assert most_known <= room + 12, "what is known is what is held, or waited for"
    objects, entries = (last - first for first, last in zip(sizes[0], sizes[-1], strict=True))
    # The scheduler forgets idle adapters, and the loader deadlines, now and then and not at once: some hundreds.
    allowed = (ROUNDS - 1) * REQUESTS // 2
    assert objects < allowed, f"{objects} objects more after {(ROUNDS - 1) * REQUESTS} requests"
    assert entries < allowed, (
        f"containers hold {entries} entries more after {(ROUNDS - 1) * REQUESTS} requests"
    )


def held_by(root: object) -> tuple[int, int]:
    """How many objects can be reached from `root`, and how many entries all containers among them have. What the rest
    of the process keeps, other tests' leavings too, is not looked at: code and loggers lead there."""
    gc.collect()
    elsewhere = (type, types.ModuleType, types.FunctionType, types.CodeType, types.FrameType, logging.Logger)
    seen = {id(root): root}
    waiting = [root]
    while waiting:
        for item in gc.get_referents(waiting.pop()):
            if id(item) not in seen and not isinstance(item, elsewhere):
                seen[id(item)] = item
                waiting.append(item)
    containers = (list, dict, set, tuple, collections.deque)
    return len(seen), sum(len(item) for item in seen.values() if type(item) in containers)
