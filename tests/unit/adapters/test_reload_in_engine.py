"""A real engine on a tiny model while an adapter's weights change: requests in flight keep theirs."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorax_backend.config import ServerConfig
from lorax_backend.engine.build import build_engine
from lorax_backend.engine.core import EngineCore
from lorax_backend.types import AdapterRef, EngineRequest, SamplingParams

WAIT = 60.0
PROMPT = list(range(10, 34))


class Driver:
    """Runs a core as the engine's loop does, on the test's thread."""

    def __init__(self, model_path: Path, **options: object) -> None:
        config = ServerConfig(
            device="cpu", num_blocks=64, block_size=4, adapter_pages=8, max_batch_size=8, **options
        )  # type: ignore[arg-type]
        self.core: EngineCore = build_engine(config, model_path, lambda line: None).core
        self.tokens: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}
        self._woken = threading.Event()
        self.core.adapters.set_wakeup(self._woken.set)

    def add(self, handle: int, folder: Path, count: int) -> None:
        self.tokens[handle] = []
        ref = AdapterRef("local", str(folder))
        self.core.add(EngineRequest(handle, PROMPT, SamplingParams(count), ref))

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._woken.clear()
            for output in self.core.step():
                assert output.error is None, output
                assert output.token_id is not None
                self.tokens[output.handle].append(output.token_id)
                if output.cached_tokens is not None:
                    self.cached[output.handle] = output.cached_tokens
            if not self.core.has_work and not done():
                assert self._woken.wait(WAIT), "nothing happened"
        self.core.check_integrity()

    def answer(self, handle: int, folder: Path, count: int) -> list[int]:
        self.add(handle, folder, count)
        self.until(lambda: len(self.tokens[handle]) == count)
        return self.tokens[handle]


@pytest.fixture
def drive(tiny_model_path: Callable[..., Path]) -> Iterator[Callable[..., Driver]]:
    made: list[Driver] = []

    def make(**options: object) -> Driver:
        made.append(Driver(tiny_model_path(), **options))
        return made[-1]

    yield make
    for driver in made:
        driver.core.close()


@pytest.fixture
def folders(tiny_model_path: Callable[..., Path], tiny_adapter: Callable[..., Path]) -> tuple[Path, Path]:
    """Two adapters that answer differently."""
    return tiny_adapter(tiny_model_path(), seed=1), tiny_adapter(tiny_model_path(), seed=2)


def overwrite(target: Path, source: Path) -> None:
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)


def test_requests_in_flight_finish_on_the_old_weights_and_new_ones_use_the_new(
    drive: Callable[..., Driver], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """LoRAX's B15: its prefix cache went by a number that a changed adapter kept."""
    count = 24
    old, new = (drive().answer(1, folder, count) for folder in folders)
    assert old != new
    served = tmp_path / "served"
    shutil.copytree(folders[0], served)
    driver = drive()
    assert driver.answer(1, served, count) == old, "and its prompt is in the prefix cache now"
    driver.add(2, served, count)
    driver.until(lambda: len(driver.tokens[2]) >= 5)
    assert driver.cached[2] > 0
    overwrite(served, folders[1])
    target = {"adapter_id": str(served), "adapter_source": "local"}
    assert driver.core.control("adapter_reload", target)["status"] == "loading"

    def reloaded() -> bool:
        return driver.core.stats().adapter_tiers["reloads"] == 1

    driver.until(reloaded)
    driver.add(3, served, count)
    driver.until(lambda: len(driver.tokens[2]) == len(driver.tokens[3]) == count)
    assert driver.tokens[2] == old
    assert driver.tokens[3] == new
    assert driver.cached[3] == 0, "blocks of the old weights are no use"
    assert driver.answer(4, served, count) == new
    assert driver.cached[4] > 0
    tiers = driver.core.stats().adapter_tiers
    assert (tiers["known"], tiers["on_device"]) == (1, 1), "the old weights are gone"


def test_a_folder_deleted_while_in_use_ends_no_request(
    drive: Callable[..., Driver], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    served = tmp_path / "served"
    shutil.copytree(folders[0], served)
    driver = drive()
    whole = driver.answer(1, served, 16)
    driver.add(2, served, 16)
    driver.until(lambda: len(driver.tokens[2]) >= 3)
    shutil.rmtree(served)
    driver.until(lambda: len(driver.tokens[2]) == 16)
    assert driver.tokens[2] == whole
    assert driver.answer(3, served, 16) == whole, "the weights are still here"
