"""SmolLM2 with eight trained adapters through the engine: the same greedy ids as transformers and PEFT gave alone.

The model is loaded once; each way of scheduling is an engine core of its own around the same runner.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lorax_backend.config import ServerConfig
from lorax_backend.engine.build import build_engine
from lorax_backend.engine.core import EngineCore, EngineSettings
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.types import AdapterRef, EngineRequest, FinishReason, SamplingParams, TokenOutput

LOGPROB_TOLERANCE = 1e-3
ADAPTER_TIMEOUT_S = 60.0


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    first: TokenOutput | None = None
    last: TokenOutput | None = None


class Engines:
    """One loaded model and adapter manager; `run` starts a fresh core unless it is given one."""

    def __init__(self, model: Path, adapters: Path) -> None:
        config = ServerConfig(
            model_id=str(model),
            device="cpu",
            default_adapter_source="local",
            num_blocks=600,
            max_batch_size=72,
        )
        built = build_engine(config, model, lambda line: None)
        self._runner, self._manager = built.core._runner, built.core.adapters
        self._folder = adapters
        self._handle = 0
        self._loaded = threading.Event()
        self._manager.set_wakeup(self._loaded.set)

    def core(
        self, max_batch_tokens: int, chunked_prefill: bool = True, prefix_caching: bool = True
    ) -> EngineCore:
        settings = SchedulerSettings(
            num_blocks=self._runner.num_blocks,
            block_size=16,
            max_num_seqs=72,
            max_batch_tokens=max_batch_tokens,
            max_input_length=4000,
            max_total_tokens=4096,
            chunked_prefill=chunked_prefill,
            prefix_caching=prefix_caching,
        )
        return EngineCore(self._runner, self._manager, EngineSettings(settings))

    def run(self, core: EngineCore, asked: list[tuple[str, list[int]]]) -> list[Answer]:
        """Answers to (adapter or 'base', prompt ids), all submitted at once."""
        sampling = SamplingParams(max_new_tokens=24, stop_token_ids=(2,), top_logprobs=5)
        answers: dict[int, Answer] = {}
        for name, ids in asked:
            self._handle += 1
            ref = None if name == "base" else AdapterRef("local", str(self._folder / name))
            answers[self._handle] = Answer()
            assert not core.add(EngineRequest(self._handle, list(ids), sampling, ref))
        while any(answer.last is None for answer in answers.values()):
            self._loaded.clear()
            for output in core.step():
                answer = answers[output.handle]
                assert output.error is None, output.error
                assert output.token_id is not None
                answer.ids.append(output.token_id)
                answer.first = answer.first or output
                answer.last = output if output.finish_reason else None
            if core.stalled:
                assert self._loaded.wait(ADAPTER_TIMEOUT_S), "no adapter was loaded in time"
        core.check_integrity()
        return list(answers.values())

    def close(self) -> None:
        self._manager.close()
        self._runner.close()


@pytest.fixture(scope="module")
def engines(smollm2_path: Path, adapters_path: Path) -> Iterator[Engines]:
    engines = Engines(smollm2_path, adapters_path)
    yield engines
    engines.close()


@pytest.fixture(scope="module")
def questions(reference: dict[str, Any]) -> list[tuple[str, int]]:
    """(adapter, prompt number) of all reference answers, neighbours in the batch of different adapters."""
    names = list(reference["outputs"])
    return [(name, prompt) for prompt in range(len(reference["prompts"])) for name in names]


@pytest.fixture(scope="module")
def check(engines: Engines, reference: dict[str, Any]) -> Callable[..., list[Answer]]:
    def run(core: EngineCore, questions: list[tuple[str, int]]) -> list[Answer]:
        asked = [(name, reference["prompts"][prompt]["ids"]) for name, prompt in questions]
        answers = engines.run(core, asked)
        for (name, prompt), answer in zip(questions, answers, strict=True):
            assert_equals_reference(answer, reference["outputs"][name][prompt], f"{name}, prompt {prompt}")
        return answers

    return run


def assert_equals_reference(answer: Answer, expected: dict[str, Any], label: str) -> None:
    assert answer.ids == expected["ids"], label
    assert answer.first is not None
    assert answer.last is not None
    top = answer.first.top_logprobs or ()
    assert [token for token, _ in top] == [token for token, _ in expected["first_top5"]], label
    for (_, logprob), (_, wanted) in zip(top, expected["first_top5"], strict=True):
        assert logprob == pytest.approx(wanted, abs=LOGPROB_TOLERANCE), label
    assert answer.first.logprob == pytest.approx(expected["first_top5"][0][1], abs=LOGPROB_TOLERANCE), label
    reason = FinishReason.EOS if expected["finish"] == "eos" else FinishReason.LENGTH
    assert answer.last.finish_reason is reason, label


def test_every_adapter_alone_equals_the_reference(
    engines: Engines, check: Callable[..., list[Answer]], reference: dict[str, Any]
) -> None:
    core = engines.core(512)
    for number, name in enumerate(reference["outputs"]):
        check(core, [(name, number % len(reference["prompts"]))])


def test_one_mixed_batch_of_all_adapters_equals_the_reference_with_cold_and_warm_prefix_cache(
    engines: Engines, check: Callable[..., list[Answer]], questions: list[tuple[str, int]]
) -> None:
    core = engines.core(
        max_batch_tokens=100
    )  # prompts of 37 tokens and more are split, and mixed with decoding
    check(core, questions)
    before = core.stats().cached_prompt_tokens
    warm = check(core, questions)
    assert core.stats().cached_prompt_tokens > before
    assert all(answer.first is not None and (answer.first.cached_tokens or 0) >= 32 for answer in warm)


def test_whole_prompts_in_one_step_without_prefix_cache_equal_the_reference(
    engines: Engines, check: Callable[..., list[Answer]], questions: list[tuple[str, int]]
) -> None:
    core = engines.core(4096, chunked_prefill=False, prefix_caching=False)
    check(core, questions)
    assert core.stats().cached_prompt_tokens == 0


def test_two_adapters_of_equal_shape_never_swap(
    engines: Engines, check: Callable[..., list[Answer]], reference: dict[str, Any]
) -> None:
    """tag-falcon and tag-otter differ in nothing but their numbers, so a wrong slot or cached block would fit."""
    core = engines.core(max_batch_tokens=64)
    twins = ("tag-falcon", "tag-otter")
    for prompt in range(2):
        check(core, [(twins[number % 2], prompt) for number in range(6)])
    outputs = reference["outputs"]
    assert outputs["tag-falcon"][0]["ids"] != outputs["tag-otter"][0]["ids"]
