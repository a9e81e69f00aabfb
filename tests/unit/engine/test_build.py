"""The real parts joined: a tiny random model behind both kinds of engine, and the same answers however it is run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorax_backend.config import load_config
from lorax_backend.engine.build import build_engine, create_engine
from lorax_backend.engine.core import EngineCore, EngineSettings
from lorax_backend.engine.loop import InProcessEngine
from lorax_backend.engine.process import ProcessEngine
from lorax_backend.types import EngineInfo, EngineRequest, EngineStats, SamplingParams, TokenOutput


def make_config(**options: Any) -> Any:
    texts = {
        "device": "cpu",
        "num_blocks": "64",
        "block_size": "4",
        "adapter_pages": "8",
        "max_batch_size": "8",
    }
    return load_config({**texts, **{name: str(value) for name, value in options.items()}}, {})


def make_requests(first_handle: int = 0) -> list[EngineRequest]:
    """Greedy, sampled and penalised requests; some share a prefix."""
    shared = list(range(10, 30))
    samplings = [
        SamplingParams(20),
        SamplingParams(20, do_sample=True, temperature=0.8, seed=7),
        SamplingParams(20, do_sample=True, top_k=12, top_p=0.9, seed=8, repetition_penalty=1.3),
        SamplingParams(20, frequency_penalty=0.7, presence_penalty=0.3, top_logprobs=2),
    ]
    prompts = [[*shared, 31], [*shared, 32, 33], [5, 6, 7], [*range(40, 75)]]
    return [EngineRequest(first_handle + n, prompts[n % 4], samplings[n // 2 % 4]) for n in range(8)]


def answers_of(core: EngineCore, requests: list[EngineRequest]) -> list[list[int | None]]:
    answers: dict[int, list[int | None]] = {request.handle: [] for request in requests}
    for request in requests:
        core.add(request)
    while core.has_work:
        for output in core.step():
            assert output.error is None, output
            answers[output.handle].append(output.token_id)
    core.check_integrity()
    assert core.stats().blocks_used == 0
    return [answers[request.handle] for request in requests]


@pytest.fixture(scope="module")
def alone(tiny_model_path: Callable[..., Path]) -> list[list[int | None]]:
    """Each request on an engine with nothing else to do and nothing in its cache."""
    core = build_engine(make_config(prefix_caching=False), tiny_model_path(), lambda line: None).core
    answers = [answers_of(core, [request])[0] for request in make_requests()]
    core.close()
    return answers


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 24, "max_total_tokens": 96},
        {"num_blocks": 24, "max_total_tokens": 96, "prefix_caching": False},
        {"max_batch_tokens": 9},
        {"chunked_prefill": False, "max_input_length": 40, "max_batch_tokens": 9},
    ],
    ids=["roomy", "preempting", "preempting-uncached", "chunked", "whole-prompts"],
)
def test_answers_do_not_depend_on_how_the_engine_is_run(
    options: dict[str, Any], depth: int, tiny_model_path: Callable[..., Path], alone: list[list[int | None]]
) -> None:
    built = build_engine(make_config(**options), tiny_model_path(), lambda line: None)
    core = EngineCore(
        built.core._runner, built.core.adapters, EngineSettings(built.core.scheduler.settings, depth)
    )
    cold, warm = answers_of(core, make_requests()), answers_of(core, make_requests(100))
    assert cold == alone
    assert warm == alone
    if options.get("num_blocks"):
        assert core.scheduler.num_preemptions > 0
    if options.get("prefix_caching", True):
        assert core.scheduler.num_cached_prompt_tokens > 0
    core.close()


class Collector:
    def __init__(self) -> None:
        self.outputs: list[TokenOutput] = []
        self.deaths: list[str] = []
        self.changed = threading.Condition()

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        with self.changed:
            self.outputs += outputs
            self.changed.notify_all()

    def on_stats(self, stats: EngineStats) -> None:
        pass

    def on_dead(self, reason: str) -> None:
        with self.changed:
            self.deaths.append(reason)
            self.changed.notify_all()


@pytest.mark.parametrize(("engine_process", "kind"), [("auto", InProcessEngine), ("true", ProcessEngine)])
def test_create_engine_serves_the_model_in_the_place_it_is_told(
    engine_process: str,
    kind: type[Any],
    tiny_model_path: Callable[..., Path],
    alone: list[list[int | None]],
) -> None:
    lines: list[str] = []
    engine = create_engine(make_config(engine_process=engine_process), tiny_model_path(), lines.append)
    assert isinstance(engine, kind)
    collector = Collector()
    engine.start(collector)
    try:
        assert isinstance(engine.info, EngineInfo)
        assert engine.info.num_blocks == 64
        assert any("loading weights" in line for line in lines)
        for request in make_requests():
            engine.submit(request)
        with collector.changed:
            assert collector.changed.wait_for(lambda: len(collector.outputs) == 160 or collector.deaths, 60)
        answers = [[o.token_id for o in collector.outputs if o.handle == handle] for handle in range(8)]
        assert answers == alone
        assert engine.control("check", {}) == {"ok": True}
    finally:
        engine.stop()
    assert collector.deaths == []


@pytest.mark.parametrize("engine_process", ["false", "true"])
def test_a_folder_without_a_model_is_a_readable_error(engine_process: str, tmp_path: Path) -> None:
    engine = create_engine(make_config(engine_process=engine_process), tmp_path)
    with pytest.raises(RuntimeError, match=r"config\.json"):
        engine.start(Collector())


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"device": "cuda"}, ProcessEngine), ({"device": "cuda", "engine_process": "false"}, InProcessEngine)],
)
def test_on_cuda_the_engine_has_its_own_process_unless_told_otherwise(
    options: dict[str, str], kind: type[Any], tmp_path: Path
) -> None:
    assert isinstance(create_engine(make_config(**options), tmp_path), kind)


@pytest.mark.parametrize(("devices", "kind"), [((), InProcessEngine), (("/dev/null",), ProcessEngine)])
def test_an_automatic_device_is_guessed_from_the_device_files(
    devices: tuple[str, ...], kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorax_backend.engine.build._NVIDIA_DEVICES", devices)
    assert isinstance(create_engine(make_config(device="auto"), tmp_path), kind)
