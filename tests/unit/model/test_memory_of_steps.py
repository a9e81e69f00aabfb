"""No step that may come takes more memory than the one that was measured at start, and one that does is survived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from model_driver import ModelDriver

from lorax_backend.model.limits import Limits
from lorax_backend.model.sampler import SamplingInputs
from lorax_backend.model.startup import largest_batch
from lorax_backend.types import SamplingParams

_LIMITS = Limits(max_input_length=40, max_total_tokens=50, max_num_seqs=8, max_batch_tokens=100)


@pytest.fixture
def driver(tiny_model_path: Callable[..., Path]) -> ModelDriver:
    return ModelDriver(tiny_model_path("llama"), num_blocks=200)


def test_the_step_that_is_measured_fills_the_budget_with_as_many_sequences_as_may_run() -> None:
    batch = largest_batch(_LIMITS, block_size=4)
    assert len(batch.sequences) == 8
    assert batch.num_tokens == 8 * 12
    assert all(item.sample for item in batch.sequences)
    blocks = [block for item in batch.sequences for block in item.seq.block_table]
    assert sorted(blocks) == list(range(8 * 3))


def test_the_step_that_is_measured_samples_in_every_way_there_is(
    driver: ModelDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a way that was left out could run out of memory later, in the middle of everybody's answers."""
    drawn: list[SamplingInputs] = []
    planner = driver.runner._planner
    plan = planner.plan

    def note(*args: Any) -> SamplingInputs:
        drawn.append(plan(*args))
        return drawn[-1]

    monkeypatch.setattr(planner, "plan", note)
    result = driver.runner.launch(largest_batch(_LIMITS, block_size=4)).result()
    assert len(result.token_ids) == 8
    [inputs] = drawn
    for part in fields(SamplingInputs):
        assert getattr(inputs, part.name) is not None, part.name
    assert inputs.num_top_logprobs > 0
    random = inputs.random
    assert random is not None
    assert random.truncated is not None
    assert random.typical is not None
    assert planner._table is not None


def test_a_step_without_memory_fails_alone_and_says_what_to_lower(
    driver: ModelDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    seq = driver.add([5, 6, 7], sampling=SamplingParams(max_new_tokens=9))
    expected = driver.generate([seq], 3)[seq.handle]
    driver.remove(seq)
    again = driver.add([5, 6, 7], sampling=SamplingParams(max_new_tokens=9))
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    forward = driver.runner.decoder.forward

    def fail(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 9.00 GiB")

    monkeypatch.setattr(driver.runner.decoder, "forward", fail)
    with pytest.raises(RuntimeError, match=r"lower cuda_memory_fraction or max_batch_tokens .*9\.00 GiB"):
        driver.runner.launch(driver.batch([(again, 3)]))
    assert emptied == [], "what the error itself still holds could not be freed yet"
    monkeypatch.setattr(driver.runner.decoder, "forward", forward)
    again.num_computed = 0
    assert driver.generate([again], 3)[again.handle] == expected
    assert emptied == [True]
