"""Log probabilities of prompts against transformers and PEFT, over every way to cut a prompt into chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_driver import ModelDriver

from lorax_backend.scheduler.sequence import Sequence, StepResult
from lorax_backend.types import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ASKING = SamplingParams(max_new_tokens=8, prompt_logprobs=True)


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 384, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def expected(model: torch.nn.Module, ids: list[int]) -> list[float]:
    logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()


@pytest.fixture(scope="module")
def base_path(tiny_model_path: Callable[..., Path]) -> Path:
    return tiny_model_path("llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def base_model(base_path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()


def run(driver: ModelDriver, seq: Sequence, chunks: list[int]) -> StepResult:
    """All chunks of one prompt; only the last step may report."""
    for count in chunks[:-1]:
        assert driver.step([(seq, count)]).prompt_logprobs == {}
    return driver.step([(seq, chunks[-1])])


@pytest.mark.parametrize("chunks", [[40], [1, 39], [39, 1], [16, 16, 8], [1] * 40, [7, 30, 3]])
def test_n16_p03_chunked_prompts_score_as_log_softmax_does(
    chunks: list[int], base_path: Path, base_model: torch.nn.Module
) -> None:
    driver = ModelDriver(base_path, max_batch_size=8)  # at most eight rows of logits at once
    ids = prompt(1, 40)
    result = run(driver, driver.add(ids, sampling=ASKING), chunks)
    assert list(result.prompt_logprobs) == [0]
    assert result.prompt_logprobs[0] == pytest.approx(expected(base_model, ids), abs=2e-4)


def test_n16_an_adapter_that_changes_the_head_is_in_the_scores(
    base_path: Path, tiny_adapter: Callable[..., Path]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tiny_adapter(base_path, targets=("q_proj", "down_proj", "lm_head"), seed=4)
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(folder)).eval()
    driver = ModelDriver(base_path)
    slot = driver.add_adapter(folder)
    ids = prompt(2, 30)
    result = run(driver, driver.add(ids, slot, ASKING), [13, 17])
    assert result.prompt_logprobs[0] == pytest.approx(expected(tuned, ids), abs=2e-4)


def test_scores_do_not_depend_on_batch_mates_and_come_to_those_who_asked(
    base_path: Path, base_model: torch.nn.Module
) -> None:
    driver = ModelDriver(base_path)
    lengths = [20, 9, 33]
    seqs = [
        driver.add(prompt(i, n), sampling=replace(ASKING, prompt_logprobs=i != 1))
        for i, n in enumerate(lengths)
    ]
    decoding = driver.add(prompt(9, 5), sampling=ASKING)
    decoding.token_ids.append(driver.step([(decoding, 5)]).token_ids[0])
    result = driver.step([(decoding, 1), *((seq, len(seq.token_ids)) for seq in seqs)])
    assert sorted(result.prompt_logprobs) == [1, 3]
    for row, number in ((1, 0), (3, 2)):
        ids = prompt(number, lengths[number])
        assert result.prompt_logprobs[row] == pytest.approx(expected(base_model, ids), abs=2e-4)


def test_a_prompt_of_one_token_has_no_scores(base_path: Path) -> None:
    driver = ModelDriver(base_path)
    assert run(driver, driver.add([5], sampling=ASKING), [1]).prompt_logprobs == {0: ()}


def test_positions_that_were_not_computed_are_nan(base_path: Path, base_model: torch.nn.Module) -> None:
    driver = ModelDriver(base_path)
    ids = prompt(3, 24)
    warm = driver.add(ids)
    driver.step([(warm, 24)])
    seq = driver.add(ids, sampling=ASKING)
    seq.block_table, seq.num_computed = warm.block_table, 16  # as if the prefix cache had been asked
    got = run(driver, seq, [8]).prompt_logprobs[0]
    assert all(value != value for value in got[:16])
    assert got[16:] == pytest.approx(expected(base_model, ids)[16:], abs=2e-4)


def test_a_prompt_that_starts_anew_after_preemption_is_scored_once_and_whole(
    base_path: Path, base_model: torch.nn.Module
) -> None:
    driver = ModelDriver(base_path)
    ids = prompt(4, 24)
    seq = driver.add(ids, sampling=ASKING)
    driver.step([(seq, 10)])
    driver.remove(seq)
    seq.slot, seq.num_computed, seq.num_preemptions = driver.add([7]).slot, 0, 1
    result = run(driver, seq, [12, 12])
    assert result.prompt_logprobs[0] == pytest.approx(expected(base_model, ids), abs=2e-4)
    seq.token_ids += [result.token_ids[0], 9]
    seq.num_computed, seq.num_preemptions = 0, 2
    assert driver.step([(seq, 26)]).prompt_logprobs == {}
