"""From sampling parameters to the sampler's inputs: seeds, penalties over a sequence's life, minimum lengths."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from lorax_backend.model.sampler import SamplingInputs, sample
from lorax_backend.model.sampling_plan import SamplingPlanner, uniform_number, uniform_numbers
from lorax_backend.scheduler.sequence import ScheduledSequence, Sequence
from lorax_backend.types import SamplingParams

VOCAB = 50
CPU = torch.device("cpu")


def planner() -> SamplingPlanner:
    return SamplingPlanner(VOCAB, 4, CPU)


def scheduled(
    params: SamplingParams,
    prompt: list[int],
    generated: list[int],
    slot: int = 0,
    handle: int = 1,
    in_flight: int = 0,
) -> ScheduledSequence:
    seq = Sequence(handle, len(prompt), params, None, 0, 0.0, token_ids=[*prompt, *generated], slot=slot)
    index = len(generated) + in_flight
    return ScheduledSequence(seq, len(seq.token_ids) + in_flight - 1, 1, sample=True, generated_index=index)


def plan(
    made: SamplingPlanner, items: list[ScheduledSequence], last: list[int] | None = None
) -> SamplingInputs:
    return made.plan(items, torch.tensor(last or [0] * 4), torch.from_numpy)


def test_random_numbers_depend_on_seed_and_index_alone_and_are_spread_evenly() -> None:
    numbers = [uniform_number(seed, index) for seed in range(50) for index in range(100)]
    assert numbers == [uniform_number(seed, index) for seed in range(50) for index in range(100)]
    assert all(0.0 <= number < 1.0 and number * 2**24 == int(number * 2**24) for number in numbers)
    tenths = Counter(int(number * 10) for number in numbers)
    assert all(400 < tenths[tenth] < 600 for tenth in range(10))
    assert len(set(numbers)) > 4990


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, 2**80 + 3])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert 0.0 <= uniform_number(seed, 0) < 1.0


def test_the_numbers_of_many_rows_are_those_of_each() -> None:
    seeds = [0, 1, -1, 2**63, 2**64 - 1, 2**64, -(2**70), 12345678901234567890] * 5
    indices = [0, 1, 2, 3, 4, 5, 1000, 2**31] * 5
    expected = [uniform_number(seed, index) for seed, index in zip(seeds, indices[::-1], strict=True)]
    with np.errstate(all="raise"):
        assert uniform_numbers(seeds, indices[::-1]).tolist() == expected


def test_a_batch_of_greedy_sequences_needs_nothing_but_the_argmax() -> None:
    greedy = SamplingParams(max_new_tokens=5, temperature=0.5, top_k=3, top_p=0.5, seed=9)
    assert plan(planner(), [scheduled(greedy, [1], []), scheduled(greedy, [2], [], slot=1)]).plain_greedy


def test_a_temperature_of_zero_is_greedy() -> None:
    params = SamplingParams(max_new_tokens=5, do_sample=True, temperature=0.0, top_k=4, top_p=0.3)
    assert plan(planner(), [scheduled(params, [1], [])]).plain_greedy


def test_the_only_token_that_top_k_leaves_is_certain() -> None:
    params = SamplingParams(max_new_tokens=5, do_sample=True, top_k=1, seed=4, top_logprobs=2)
    logits = torch.arange(float(VOCAB))[None] / 10
    drawn = sample(logits, plan(planner(), [scheduled(params, [1], [])]))
    assert drawn.ids.tolist() == [VOCAB - 1]
    assert drawn.logprobs is not None
    assert drawn.logprobs.tolist() == [0.0]


def test_stop_ids_are_forbidden_until_the_minimum_length() -> None:
    params = SamplingParams(max_new_tokens=9, min_new_tokens=2, stop_token_ids=(3, 7, VOCAB + 5))
    made = planner()
    for generated, forbidden in (([], [3, 7]), ([1], [3, 7]), ([1, 1], None)):
        inputs = plan(made, [scheduled(params, [5], generated)])
        got = None if inputs.forbidden is None else inputs.forbidden[1].tolist()
        assert got == forbidden


def test_each_row_gets_the_settings_of_its_own_sequence() -> None:
    plain = SamplingParams(max_new_tokens=5)
    warm = SamplingParams(max_new_tokens=5, do_sample=True, temperature=0.5, seed=1)
    cut = SamplingParams(max_new_tokens=5, do_sample=True, temperature=2.0, top_k=4, seed=2, top_logprobs=3)
    inputs = plan(planner(), [scheduled(p, [1], [2], slot=i) for i, p in enumerate((plain, warm, cut))])
    assert inputs.random is not None
    assert inputs.random.rows.tolist() == [1, 2]
    assert inputs.random.temperature.flatten().tolist() == [0.5, 2.0]
    assert inputs.random.uniform.flatten().tolist() == [uniform_number(1, 1), uniform_number(2, 1)]
    assert inputs.random.truncated is not None
    assert inputs.random.truncated.tolist() == [1]
    assert inputs.logprob_rows is not None
    assert (inputs.logprob_rows.tolist(), inputs.num_top_logprobs) == ([2], 3)


def penalised(**changes: float) -> SamplingParams:
    return SamplingParams(max_new_tokens=9, **({"repetition_penalty": 1.5} | changes))


def occurrences(
    made: SamplingPlanner, item: ScheduledSequence, last: list[int] | None = None
) -> dict[int, int]:
    inputs = plan(made, [item], last)
    assert inputs.penalties is not None
    row = inputs.penalties.occurrences[0]
    return {token: int(count) for token, count in enumerate(row) if count}


def test_occurrences_follow_the_drawn_tokens_without_reading_the_sequence_again() -> None:
    made = planner()
    item = scheduled(penalised(), [4, 5], [])
    inputs = plan(made, [item])
    made.count_drawn(inputs, torch.tensor([5]))
    item.seq.token_ids[:] = [40, 41, 5]  # were it read again, these would show
    item = ScheduledSequence(item.seq, 2, 1, True, 1)
    assert occurrences(made, item) == {4: 1, 5: 3}


def test_occurrences_are_counted_anew_for_another_sequence_in_the_same_slot() -> None:
    made = planner()
    made.count_drawn(plan(made, [scheduled(penalised(), [4, 5], [])]), torch.tensor([6]))
    assert occurrences(made, scheduled(penalised(), [8], [], handle=2)) == {8: 1}


def test_occurrences_are_counted_anew_after_a_token_was_missed() -> None:
    made = planner()
    plan(made, [scheduled(penalised(), [4], [])])
    assert occurrences(made, scheduled(penalised(), [4], [9, 9, 9])) == {4: 1, 9: 6}


def test_a_token_still_on_the_device_is_counted() -> None:
    item = scheduled(penalised(), [4], [9], slot=2, in_flight=1)
    assert occurrences(planner(), item, [0, 0, 31, 0]) == {4: 1, 9: 2, 31: 2}


def test_penalties_of_a_row_do_not_depend_on_batch_mates() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    items = [
        scheduled(penalised(frequency_penalty=1.0), [1, 2, 3, 4, 5, 6], [7, 7], slot=0, handle=1),
        scheduled(SamplingParams(max_new_tokens=5), [1], [], slot=1, handle=2),
        scheduled(penalised(presence_penalty=0.5, top_logprobs=VOCAB), [9], [8], slot=2, handle=3),
    ]
    items[0] = scheduled(penalised(frequency_penalty=1.0, top_logprobs=VOCAB), [1, 2, 3, 4, 5, 6], [7, 7])
    together = sample(logits.clone(), plan(planner(), items))
    assert together.top_logprobs is not None
    for position, row in enumerate((0, 2)):
        alone = sample(logits[row : row + 1].clone(), plan(planner(), [items[row]]))
        assert alone.ids[0] == together.ids[row]
        assert alone.top_logprobs is not None
        assert torch.equal(alone.top_logprobs[0], together.top_logprobs[position])
