"""The runner step by step: overlap of steps, reused slots and blocks, penalties, and rows that ignore each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_driver import ModelDriver

from lorax_backend.config import ServerConfig
from lorax_backend.model.runner import TorchModelRunner
from lorax_backend.types import SamplingParams

RANDOM = SamplingParams(max_new_tokens=50, do_sample=True, temperature=1.3, top_p=0.95, seed=11)


@pytest.fixture
def driver(tiny_model_path: Callable[..., Path]) -> ModelDriver:
    return ModelDriver(tiny_model_path("llama"), num_blocks=200)


def prompt(seed: int, length: int = 12) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 384, (length,), generator=generator).tolist()


def test_a_step_launched_before_the_last_is_read_continues_from_the_device(driver: ModelDriver) -> None:
    penalised = SamplingParams(max_new_tokens=50, repetition_penalty=1.3, frequency_penalty=0.4)
    settings = [SamplingParams(max_new_tokens=50), RANDOM, penalised]
    plain = [driver.add(prompt(i), sampling=s) for i, s in enumerate(settings)]
    expected = driver.generate(plain, 8)

    ahead = [driver.add(prompt(i), sampling=s) for i, s in enumerate(settings)]
    handles = [driver.runner.launch(driver.batch([(seq, len(seq.token_ids)) for seq in ahead]))]
    for _ in range(7):
        # The token of the step in flight is not known here; it is read only after the next launch.
        handles.append(driver.runner.launch(driver.batch([(seq, 1) for seq in ahead], in_flight=True)))
        for seq, token in zip(ahead, handles.pop(0).result().token_ids, strict=True):
            seq.token_ids.append(token)
    for seq, token in zip(ahead, handles.pop().result().token_ids, strict=True):
        seq.token_ids.append(token)
    for seq, other in zip(ahead, plain, strict=True):
        assert seq.token_ids[seq.prompt_len :] == expected[other.handle]


def test_a_reused_slot_and_reused_blocks_show_nothing_of_their_last_owner(driver: ModelDriver) -> None:
    penalised = SamplingParams(max_new_tokens=50, repetition_penalty=1.5)
    first = driver.add(prompt(1), sampling=penalised)
    expected = driver.generate([first], 6)[first.handle]
    slot = first.slot
    driver.remove(first)
    for seed in range(2, 5):
        other = driver.add(prompt(seed, 40), sampling=penalised)
        assert other.slot == slot
        driver.generate([other], 6)
        driver.remove(other)
    again = driver.add(prompt(1), sampling=penalised)
    assert driver.generate([again], 6)[again.handle] == expected


def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(driver: ModelDriver) -> None:
    whole = driver.add(prompt(7), sampling=RANDOM)
    expected = driver.generate([whole], 10)[whole.handle]
    seq = driver.add(prompt(7), sampling=RANDOM)
    driver.generate([seq], 4)
    slot = seq.slot
    driver.remove(seq)
    stranger = driver.add(prompt(8))
    driver.generate([stranger], 3)
    seq.slot, seq.num_computed, seq.num_preemptions = driver.add(prompt(9)).slot, 0, 1
    assert seq.slot != slot
    driver.generate([seq], 6)
    assert seq.token_ids[seq.prompt_len :] == expected


def test_n02_tokens_of_a_sequence_do_not_depend_on_its_batch_mates(driver: ModelDriver) -> None:
    settings = [
        SamplingParams(max_new_tokens=50),
        RANDOM,
        SamplingParams(max_new_tokens=50, do_sample=True, temperature=0.7, top_k=5, seed=3),
        SamplingParams(max_new_tokens=50, repetition_penalty=1.2, presence_penalty=0.3),
        SamplingParams(max_new_tokens=50, do_sample=True, temperature=2.0, seed=11, top_logprobs=2),
    ]
    alone = []
    for number, sampling in enumerate(settings):
        seq = driver.add(prompt(number, 5 + 9 * number), sampling=sampling)
        alone.append(driver.generate([seq], 8)[seq.handle])
        driver.remove(seq)
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 29):
        mates = [driver.add(prompt(number, 5 + 9 * number), sampling=settings[number]) for number in order]
        together = driver.generate(mates, 8)
        for number, seq in zip(order, mates, strict=True):
            assert together[seq.handle] == alone[number]
            driver.remove(seq)


def test_g25_equal_seeds_repeat_and_other_seeds_differ(driver: ModelDriver) -> None:
    def run(seed: int) -> list[int]:
        params = SamplingParams(max_new_tokens=50, do_sample=True, temperature=1.5, seed=seed)
        seq = driver.add(prompt(1), sampling=params)
        return driver.generate([seq], 12)[seq.handle]

    assert run(1) == run(1)
    assert len({tuple(run(seed)) for seed in range(5)}) == 5


def test_stop_ids_do_not_come_before_the_minimum_length(driver: ModelDriver) -> None:
    free = driver.add(prompt(2))
    natural = driver.generate([free], 6)[free.handle]
    params = SamplingParams(max_new_tokens=50, min_new_tokens=4, stop_token_ids=(natural[0], natural[4]))
    held = driver.add(prompt(2), sampling=params)
    ids = driver.generate([held], 6)[held.handle]
    assert not {natural[0], natural[4]} & set(ids[:4])


def test_a_step_in_which_nothing_samples_returns_nothing(driver: ModelDriver) -> None:
    seq = driver.add(prompt(1, 20))
    result = driver.runner.launch(driver.batch([(seq, 5)])).result()
    assert (result.token_ids, result.logprobs, result.top_logprobs) == ([], [], [])


def test_logprobs_come_only_to_those_who_asked(driver: ModelDriver) -> None:
    asked = (None, 0, 3)
    seqs = [
        driver.add(prompt(i), sampling=SamplingParams(max_new_tokens=5, top_logprobs=n))
        for i, n in enumerate(asked)
    ]
    result = driver.runner.launch(driver.batch([(seq, 12) for seq in seqs])).result()
    assert [value is None for value in result.logprobs] == [True, False, False]
    assert result.top_logprobs[0] is None
    assert result.top_logprobs[1] == ()
    top = result.top_logprobs[2]
    assert top is not None
    assert len(top) == 3
    assert top[0] == (result.token_ids[2], pytest.approx(result.logprobs[2]))


def test_a_batch_that_fails_leaves_the_runner_usable(driver: ModelDriver) -> None:
    seq = driver.add(prompt(1))
    expected = driver.generate([seq], 3)[seq.handle]
    bad = driver.add([10**6, 5])
    with pytest.raises(ValueError, match="exceed the vocabulary of 384"):
        driver.runner.launch(driver.batch([(bad, 2)]))
    again = driver.add(prompt(1))
    assert driver.generate([again], 3)[again.handle] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_a_cpu_stays_near_float32(dtype: str, tiny_model_path: Callable[..., Path]) -> None:
    logits = []
    for name in ("float32", dtype):
        driver = ModelDriver(tiny_model_path("llama"), dtype=name)
        seq = driver.add(prompt(3, 30))
        driver.step([(seq, 20)])
        driver.step([(seq, 10)])
        logits.append(driver.last_logits[seq.handle].float())
    assert float((logits[0] - logits[1]).abs().max()) < 0.05 * float(logits[0].abs().max())


def test_random_weights_run_from_the_config_alone(
    tiny_model_path: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model_path("qwen3")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    driver = ModelDriver(tmp_path, load_format="dummy", seed=5)
    seq = driver.add(prompt(1))
    assert len(driver.generate([seq], 4)[seq.handle]) == 4


def test_the_engine_is_told_what_was_made_of_the_configuration(driver: ModelDriver) -> None:
    info = driver.runner.info(1.5)
    assert (info.model_type, info.dtype, info.device, info.load_seconds) == ("llama", "float32", "cpu", 1.5)
    assert (info.num_blocks, info.max_total_tokens, info.adapter_pages) == (200, 512, 48)
    assert info.kv_cache_bytes == 2 * 2 * 200 * 16 * 2 * 16 * 4
    assert (info.attention_backend, info.lora_backend) == ("torch", "torch")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"attention": "triton"}, "attention"),
        ({"attention": "torch_varlen"}, "attention"),
        ({"prefill_graph_tokens": 1000}, "prefill_graph_tokens"),
        (
            {"prefill_graph_tokens": 64, "cuda_graphs": False},
            "prefill_graph_tokens is 64, but cuda_graphs is off",
        ),
        ({"lora_kernels": "triton"}, "lora_kernels"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_options_that_cannot_be_had_are_named(
    options: dict[str, object], word: str, tiny_model_path: Callable[..., Path]
) -> None:
    config = ServerConfig(device="cpu", **options)
    with pytest.raises(ValueError, match=word):
        TorchModelRunner(config, tiny_model_path("llama"))
