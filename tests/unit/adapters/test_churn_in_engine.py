"""A real engine on a tiny model while many adapters come and go from a hub."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapter_files import read_files
from hub_server import HubServer

from lorax_backend.config import ServerConfig
from lorax_backend.engine.build import build_engine
from lorax_backend.engine.core import EngineCore
from lorax_backend.types import AdapterRef, EngineRequest, SamplingParams

WAIT = 60.0
ADAPTERS, REQUESTS, TOKENS = 24, 120, 6


class Driver:
    """Runs a core as the engine's loop does, on the test's thread."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.tokens: dict[int, list[int]] = {}
        self.errors: dict[int, str] = {}
        self._woken = threading.Event()
        core.adapters.set_wakeup(self._woken.set)

    def add(self, handle: int, name: str, count: int = TOKENS) -> None:
        self.tokens[handle] = []
        request = EngineRequest(handle, [5, 6, 7, 8], SamplingParams(count), AdapterRef("hub", f"org/{name}"))
        self.core.add(request)
        self._woken.set()

    def step(self) -> None:
        if not self.core.has_work:
            assert self._woken.wait(WAIT), "nothing happened"
        self._woken.clear()
        for output in self.core.step():
            if output.error is not None:
                self.errors[output.handle] = output.error["error"]
            else:
                assert output.token_id is not None
                self.tokens[output.handle].append(output.token_id)


@pytest.fixture
def make_driver(
    hub: HubServer, tiny_model_path: Callable[..., Path], tmp_path: Path
) -> Iterator[Callable[..., Driver]]:
    cores: list[EngineCore] = []

    def make(disk: str = "disk", **options: object) -> Driver:
        config = ServerConfig(
            device="cpu",
            num_blocks=64,
            block_size=4,
            max_batch_size=8,
            adapter_disk_cache=str(tmp_path / disk),
            **options,  # type: ignore[arg-type]
        )
        cores.append(build_engine(config, tiny_model_path(), lambda line: None).core)
        return Driver(cores[-1])

    yield make
    for core in cores:
        core.close()


def test_every_request_gets_its_own_adapters_answer_while_adapters_churn_through_all_tiers(
    hub: HubServer,
    make_driver: Callable[..., Driver],
    tiny_model_path: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
) -> None:
    sizes = []
    for number in range(ADAPTERS):
        rank = (4, 8, 16, 24)[number % 4]
        files = read_files(tiny_adapter(tiny_model_path(), seed=number, rank=rank))
        sizes.append(sum(map(len, files.values())))
        hub.commit(f"org/a{number}", files)
    roomy = make_driver(adapter_pages=64)
    for number in range(ADAPTERS):
        roomy.add(number, f"a{number}")
    while any(len(tokens) < TOKENS for tokens in roomy.tokens.values()):
        roomy.step()
    alone = [roomy.tokens[number] for number in range(ADAPTERS)]
    page_bytes = roomy.core.stats().adapter_tiers["host_bytes_used"] // 44  # pages of all ranks
    driver = make_driver(
        "small", adapter_pages=8, adapter_host_bytes=14 * page_bytes, adapter_disk_bytes=sum(sizes) * 2 // 3
    )
    rng = random.Random(5)
    weights = [1 / (number + 1) for number in range(ADAPTERS)]
    wanted = rng.choices(range(ADAPTERS), weights, k=REQUESTS)
    handles = iter(range(REQUESTS))
    for handle in handles:
        driver.add(handle, f"a{wanted[handle]}")
        while driver.core.scheduler.num_waiting + driver.core.scheduler.num_running > 6:
            driver.step()
    while any(len(tokens) < TOKENS for tokens in driver.tokens.values()) and not driver.errors:
        driver.step()
    assert not driver.errors
    assert [driver.tokens[handle] for handle in range(REQUESTS)] == [alone[number] for number in wanted]
    driver.core.check_integrity()
    tiers = driver.core.stats().adapter_tiers
    print("hits:", tiers["tier_hits"], "evictions:", tiers["tier_evictions"])  # noqa: T201
    assert sum(tiers["tier_hits"].values()) == REQUESTS
    assert all(count > 0 for count in tiers["tier_evictions"].values()), "every tier was too small"
    assert tiers["host_bytes_used"] <= tiers["host_bytes_total"] <= 14 * page_bytes
    assert tiers["disk_bytes_used"] <= tiers["disk_bytes_total"]


def test_a_warm_stream_loses_no_step_to_a_download_that_hangs(
    hub: HubServer,
    make_driver: Callable[..., Driver],
    tiny_model_path: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
) -> None:
    release = threading.Event()
    for number, name in enumerate(("warm", "cold")):
        hub.commit(f"org/{name}", read_files(tiny_adapter(tiny_model_path(), seed=number)))
    hub.add_fault("GET /org/cold/resolve", hold=release)
    driver = make_driver(adapter_pages=8)
    driver.add(1, "warm", 2)
    while len(driver.tokens[1]) < 2:
        driver.step()
    driver.add(2, "warm", 40)
    driver.step()
    driver.add(3, "cold", 4)
    before = driver.core.stats().steps
    while len(driver.tokens[2]) < 40:
        driver.step()
    assert driver.core.stats().steps - before <= 40, "one token in every step"
    assert not driver.tokens[3]
    release.set()
    while len(driver.tokens[3]) < 4:
        driver.step()
