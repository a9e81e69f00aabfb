"""Every logit processor against a plain implementation for one row, alone and among any batch mates."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_backend.model.sampler import SamplingInputs, keep_typical, sample
from lorax_backend.model.sampling_plan import SamplingPlanner, is_random, uniform_number
from lorax_backend.model.watermark import WatermarkSettings, favour_green, green_mask, watermark_z_score
from lorax_backend.scheduler.sequence import ScheduledSequence, Sequence
from lorax_backend.types import SamplingParams

VOCAB = 48
CPU = torch.device("cpu")
MARK = WatermarkSettings()
NEVER = float("-inf")


def scheduled(
    params: SamplingParams, prompt: list[int], generated: list[int], slot: int
) -> ScheduledSequence:
    seq = Sequence(slot, len(prompt), params, None, 0, 0.0, token_ids=[*prompt, *generated], slot=slot)
    return ScheduledSequence(seq, len(seq.token_ids) - 1, 1, sample=True, generated_index=len(generated))


def plan(items: list[ScheduledSequence], last: list[int] | None = None) -> SamplingInputs:
    last_token = torch.tensor(last or [0] * 8)
    return SamplingPlanner(VOCAB, 8, CPU, MARK).plan(items, last_token, torch.from_numpy)


def expected_distribution(logits: list[float], item: ScheduledSequence) -> list[float]:
    """Log probabilities of one row after all processors, in the documented order, by loops and float64."""
    params, seq = item.seq.sampling, item.seq
    prompt, generated = seq.token_ids[: seq.prompt_len], seq.token_ids[seq.prompt_len :]
    x = list(logits)
    for token, value in params.logit_bias:
        x[token] += value
    if params.watermark:
        green = green_mask(torch.tensor([seq.token_ids[-1]]), VOCAB, MARK)[0].tolist()
        x = [value + MARK.delta if marked else value for value, marked in zip(x, green, strict=True)]
    for token in {*prompt, *generated}:
        penalty = params.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token, count in Counter(generated).items():
        x[token] -= params.frequency_penalty * count + params.presence_penalty
    if item.generated_index < params.min_new_tokens:
        for token in params.stop_token_ids:
            x[token] = NEVER
    if is_random(params):
        x = [value / params.temperature for value in x]
        x = _top_k(x, params.top_k)
        x = _top_p(x, params.top_p)
        x = _typical_p(x, params.typical_p)
    return _log_softmax(x)


def _log_softmax(x: list[float]) -> list[float]:
    highest = max(x)
    total = sum(math.exp(value - highest) for value in x)
    return [value - highest - math.log(total) for value in x]


def _top_k(x: list[float], k: int) -> list[float]:
    if not 0 < k < len(x):
        return x
    kth = sorted(x, reverse=True)[k - 1]
    return [value if value >= kth else NEVER for value in x]


def _top_p(x: list[float], p: float) -> list[float]:
    if p >= 1:
        return x
    return _keep_until(x, sorted(range(len(x)), key=lambda i: -x[i]), p)


def _typical_p(x: list[float], p: float) -> list[float]:
    if p >= 1:
        return x
    logs = _log_softmax(x)
    entropy = -sum(math.exp(value) * value for value in logs if value > NEVER)
    order = [i for i in range(len(x)) if logs[i] > NEVER]
    return _keep_until(x, sorted(order, key=lambda i: abs(-logs[i] - entropy)), p)


def _keep_until(x: list[float], order: list[int], p: float) -> list[float]:
    """The first ids of `order` up to the one with which their probability reaches p."""
    probabilities = [math.exp(value) for value in _log_softmax(x)]
    kept: set[int] = set()
    mass = 0.0
    for token in order:
        if kept and mass >= p:
            break
        kept.add(token)
        mass += probabilities[token]
    return [value if i in kept else NEVER for i, value in enumerate(x)]


_PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.just(50),
    min_new_tokens=st.sampled_from([0, 4]),
    do_sample=st.booleans(),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 7, VOCAB + 3]),
    top_p=st.sampled_from([1.0, 0.05, 0.83]),
    typical_p=st.sampled_from([1.0, 0.06, 0.71]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.4]),
    frequency_penalty=st.sampled_from([0.0, -0.9, 1.1]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    watermark=st.booleans(),
    logit_bias=st.sampled_from([(), ((0, -100.0), (5, 2.5)), ((VOCAB - 1, 4.0),)]),
    stop_token_ids=st.just((3,)),
    top_logprobs=st.just(VOCAB),
)
_ROW = st.tuples(
    _PARAMS,
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    st.lists(st.integers(0, VOCAB - 1), max_size=6),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(rows=st.lists(_ROW, min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_n01_n04_n05_n06_every_row_follows_the_documented_order_whatever_its_batch_mates(
    rows: list[tuple[SamplingParams, list[int], list[int]]], seed: int
) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    items = [scheduled(params, prompt, made, slot) for slot, (params, prompt, made) in enumerate(rows)]
    together = sample(logits.clone(), plan(items))
    assert together.top_logprobs is not None
    assert together.top_ids is not None
    for row, item in enumerate(items):
        alone = sample(logits[row : row + 1].clone(), plan([item]))
        assert alone.ids[0] == together.ids[row]
        assert alone.top_logprobs is not None
        torch.testing.assert_close(alone.top_logprobs[0], together.top_logprobs[row], rtol=0, atol=1e-6)
        expected = torch.tensor(expected_distribution(logits[row].tolist(), item))
        got = torch.full((VOCAB,), NEVER)
        got[together.top_ids[row]] = together.top_logprobs[row]
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)
        if not is_random(item.seq.sampling):
            assert together.ids[row] == int(expected.argmax())
        else:
            assert expected[together.ids[row]] > NEVER


@pytest.mark.parametrize(
    ("typical_p", "kept"),
    [(0.1, [0]), (0.19, [0]), (0.21, [0, 1]), (0.79, [0, 1]), (0.81, [0, 1, 2, 3]), (0.99, [0, 1, 2, 3])],
)
def test_n08_typical_p_keeps_the_tokens_nearest_to_the_entropy(typical_p: float, kept: list[int]) -> None:
    # Entropy 1.09 nats; information contents 1.61, 0.51, 2.30, 2.30: distances 0.52, 0.58, 1.21, 1.21.
    logits = torch.log(torch.tensor([[0.2, 0.6, 0.1, 0.1]]))
    got = keep_typical(logits, torch.tensor([[typical_p]]))
    assert torch.nonzero(got[0].isfinite()).flatten().tolist() == kept


def test_n08_typical_p_can_drop_the_likeliest_token() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]]))
    kept = keep_typical(logits, torch.tensor([[0.5]]))[0].isfinite()
    assert kept.tolist() == [False] + [True] * 6


def test_n09_z19_half_of_ten_ids_are_green_and_gain_delta() -> None:
    previous = torch.tensor([3, 4])
    mask = green_mask(previous, 10, MARK)
    assert mask.shape == (2, 10)
    assert mask.sum(-1).tolist() == [5, 5]
    assert mask[0].tolist() != mask[1].tolist()
    logits = torch.tensor([[0.5, 1.5, -2.0, 0.0] + [0.0] * 6, [1.0] * 10])
    assert torch.equal(favour_green(logits, previous, MARK), torch.where(mask, logits + 2.0, logits))


@pytest.mark.parametrize(("gamma", "size"), [(0.25, 24), (0.5, 48), (0.001, 0), (0.99, 96)])
def test_n09_the_green_list_has_its_exact_size_for_every_token(gamma: float, size: int) -> None:
    mask = green_mask(torch.arange(97), 97, WatermarkSettings(gamma=gamma))
    assert set(mask.sum(-1).tolist()) == {size}
    if 0 < size < 96:
        assert len({tuple(row) for row in mask.tolist()}) == 97


def test_n09_a_green_list_does_not_depend_on_the_rows_beside_it() -> None:
    previous = torch.arange(100) % 7
    together = favour_green(torch.zeros(100, VOCAB), previous, MARK)
    for token in range(7):
        alone = favour_green(torch.zeros(1, VOCAB), torch.tensor([token]), MARK)
        assert all(torch.equal(together[row], alone[0]) for row in range(token, 100, 7))


def test_n09_a_marked_text_is_told_from_one_that_is_not() -> None:
    vocab, ids = 500, {True: [1], False: [1]}
    generator = torch.Generator().manual_seed(5)
    for marked, text in ids.items():
        params = SamplingParams(max_new_tokens=300, do_sample=True, seed=9, watermark=marked)
        planner = SamplingPlanner(vocab, 1, CPU, MARK)
        for _ in range(200):
            item = scheduled(params, text[:1], text[1:], 0)
            inputs = planner.plan([item], torch.zeros(1, dtype=torch.int64), torch.from_numpy)
            text.append(int(sample(torch.randn(1, vocab, generator=generator), inputs).ids[0]))
    assert watermark_z_score(ids[True], vocab, MARK) > 6
    assert abs(watermark_z_score(ids[False], vocab, MARK)) < 4


def test_n09_the_token_before_may_still_be_on_the_device() -> None:
    params = SamplingParams(max_new_tokens=9, watermark=True)
    item = scheduled(params, [4], [9], slot=2)
    in_flight = ScheduledSequence(item.seq, 2, 1, sample=True, generated_index=2)
    inputs = plan([in_flight, scheduled(params, [7], [], slot=3)], [0, 0, 31, 44])
    assert inputs.watermark is not None
    assert inputs.watermark.previous.tolist() == [31, 7]


def test_n02_the_random_number_depends_on_seed_and_position_alone() -> None:
    params = SamplingParams(max_new_tokens=9, do_sample=True, seed=77, typical_p=0.5)
    mates = [scheduled(params, [1], [2, 3], 0), scheduled(params, [8, 9], [5, 5], 1)]
    inputs = plan(mates)
    assert inputs.random is not None
    assert inputs.random.uniform.flatten().tolist() == [uniform_number(77, 2)] * 2


def test_a_bias_on_an_id_outside_the_vocabulary_is_harmless() -> None:
    params = SamplingParams(max_new_tokens=9, logit_bias=((VOCAB + 4, 5.0), (2, 50.0), (2, 50.0)))
    inputs = plan([scheduled(params, [1], [], 0)])
    assert inputs.bias is not None
    assert (inputs.bias.ids.tolist(), inputs.bias.values.tolist()) == ([2], [100.0])
    assert sample(torch.zeros(1, VOCAB), inputs).ids.tolist() == [2]
