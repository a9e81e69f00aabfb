"""The sampler's pure functions: the right tokens, and no row that notices its neighbours."""

from __future__ import annotations

import math

import pytest
import torch

from lorax_backend.model.sampler import (
    PenaltyInputs,
    RandomInputs,
    SamplingInputs,
    count_occurrences,
    draw,
    penalize,
    sample,
    truncate,
)

VOCAB = 600  # more than the number of candidates top-p looks at first


def logits_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def cut(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> list[int]:
    """Ids that survive top-k and top-p in the only row."""
    vocab = logits.shape[1]
    kept = truncate(
        logits.clone(),
        torch.tensor([[top_k or vocab]]),
        torch.tensor([[top_p if top_p < 1 else math.inf]]),
        top_k or None,
    )
    return torch.nonzero(torch.isfinite(kept[0])).flatten().tolist()


def random_inputs(rows: list[int], temperature: list[float], uniform: list[float]) -> RandomInputs:
    return RandomInputs(
        torch.tensor(rows), torch.tensor(temperature)[:, None], torch.tensor(uniform)[:, None]
    )


def test_z18_greedy_rows_take_the_best_logit() -> None:
    assert sample(logits_of([0.0, 2.0, 1.0], [5.0, 2.0, 1.0]), SamplingInputs()).ids.tolist() == [1, 0]


def test_n07_top_k_keeps_the_k_best_and_every_tie_of_the_last() -> None:
    logits = logits_of([1.0, 3.0, 2.0, 2.0, 0.0])
    assert cut(logits, top_k=1) == [1]
    assert cut(logits, top_k=2) == [1, 2, 3]
    assert cut(logits, top_k=3) == [1, 2, 3]
    assert cut(logits, top_k=4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, [2]), (0.49, [2]), (0.51, [0, 2]), (0.79, [0, 2]), (0.81, [0, 1, 2])]
)
def test_n07_top_p_keeps_the_smallest_set_that_reaches_p_and_at_least_one(
    top_p: float, kept: list[int]
) -> None:
    logits = torch.log(logits_of([0.3, 0.15, 0.5, 0.05]))
    assert cut(logits, top_p=top_p) == kept


def test_top_p_of_equal_logits_keeps_no_more_than_it_needs() -> None:
    assert cut(torch.zeros(1, 10), top_p=0.35) == [0, 1, 2, 3]


def test_top_p_is_taken_of_what_top_k_leaves() -> None:
    logits = torch.log(logits_of([0.4, 0.3, 0.2, 0.1]))
    assert cut(logits, top_p=0.65) == [0, 1]
    assert cut(logits, top_k=2, top_p=0.55) == [0]  # 0.4 / 0.7 reaches it


def test_top_p_looks_beyond_its_first_candidates_when_the_distribution_is_flat() -> None:
    torch.manual_seed(0)
    flat, peaked = torch.randn(1, VOCAB) * 0.01, torch.randn(1, VOCAB) * 5
    for logits in (flat, peaked):
        probabilities, order = torch.softmax(logits[0].double(), -1).sort(descending=True)
        count = int((probabilities.cumsum(0) - probabilities < 0.9).sum())
        assert cut(logits, top_p=0.9) == sorted(order[:count].tolist())


def test_truncating_a_row_does_not_depend_on_the_other_rows() -> None:
    torch.manual_seed(1)
    logits = torch.randn(6, VOCAB)
    logits[2, :50] = 1.5  # ties at the border of top-k
    top_k = torch.tensor([[5], [VOCAB], [20], [VOCAB], [300], [VOCAB]])
    top_p = torch.tensor([[math.inf], [0.9], [0.7], [math.inf], [0.5], [0.2]])
    together = truncate(logits.clone(), top_k, top_p, None)
    for row in range(6):
        k = int(top_k[row])
        alone = truncate(
            logits[row : row + 1].clone(),
            top_k[row : row + 1],
            top_p[row : row + 1],
            k if k < VOCAB else None,
        )
        assert torch.equal(torch.isinf(alone[0]), torch.isinf(together[row])), row


def test_n02_drawing_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniform = (torch.arange(1000) + 0.5)[:, None] / 1000
    ids = draw(torch.log(probabilities).expand(1000, 4), uniform)
    assert torch.bincount(ids, minlength=4).tolist() == [100, 0, 600, 300]


def test_the_largest_random_number_never_draws_a_token_that_was_cut() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, 7], logits[0, 300] = 0.3, 0.1
    assert draw(logits, torch.tensor([[1 - 2**-24]])).tolist() == [300]
    assert draw(logits, torch.tensor([[0.0]])).tolist() == [7]


def test_n05_n06_repetition_penalty_counts_the_prompt_and_the_others_only_the_answer() -> None:
    table = torch.zeros(2, 5, dtype=torch.int32)
    count_occurrences(table, 1, torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]))
    inputs = PenaltyInputs(
        rows=torch.tensor([0]),
        slots=torch.tensor([1]),
        occurrences=table[1:],
        repetition=torch.tensor([[2.0]]),
        frequency=torch.tensor([[0.5]]),
        presence=torch.tensor([[0.25]]),
    )
    got = penalize(logits_of([1.0, -1.0, 4.0, 3.0, -3.0]), inputs)
    assert got.tolist() == [[0.5, -2.0 - 0.75, 2.0 - 1.25, 3.0, -3.0]]


def test_n05_token_zero_is_penalised_only_where_it_occurred() -> None:
    table = torch.zeros(1, 3, dtype=torch.int32)
    count_occurrences(table, 0, torch.tensor([2]), torch.tensor([], dtype=torch.int64))
    assert table.tolist() == [[0, 0, 1]]


def test_forbidden_ids_are_not_drawn() -> None:
    inputs = SamplingInputs(forbidden=(torch.tensor([0, 0]), torch.tensor([1, 2])))
    assert sample(logits_of([1.0, 3.0, 2.0], [1.0, 3.0, 2.0]), inputs).ids.tolist() == [0, 1]


def test_n04_greedy_rows_do_not_change_beside_rows_with_a_temperature() -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, VOCAB)
    mixed = sample(logits.clone(), SamplingInputs(random=random_inputs([1, 3], [0.1, 5.0], [0.9, 0.1])))
    assert mixed.ids[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()


def test_rows_with_nan_or_infinite_logits_get_valid_ids_and_hurt_no_other_row() -> None:
    torch.manual_seed(3)
    logits = torch.randn(5, VOCAB)
    logits[1] = math.nan
    logits[2, 9] = math.inf
    logits[3] = -math.inf
    healthy = logits[[0, 4]].clone()
    rows = list(range(5))
    for temperature in (0.001, 1.0, 100.0):
        inputs = SamplingInputs(
            random=random_inputs(rows, [temperature] * 5, [0.3] * 5),
            logprob_rows=torch.tensor(rows),
            num_top_logprobs=2,
        )
        drawn = sample(logits.clone(), inputs)
        assert all(0 <= token < VOCAB for token in drawn.ids.tolist())
        assert drawn.ids[2] == 9
        clean = SamplingInputs(
            random=random_inputs([0, 1], [temperature] * 2, [0.3] * 2), logprob_rows=torch.tensor([0, 1])
        )
        expected = sample(healthy.clone(), clean)
        assert drawn.ids[[0, 4]].tolist() == expected.ids.tolist()
        assert expected.logprobs is not None
        assert drawn.logprobs is not None
        assert torch.equal(drawn.logprobs[[0, 4]], expected.logprobs)
        assert torch.isfinite(drawn.logprobs).all()
    greedy = sample(logits, SamplingInputs())
    assert all(0 <= token < VOCAB for token in greedy.ids.tolist())


def test_n03_logprobs_are_those_of_the_distribution_drawn_from() -> None:
    logits = torch.log(logits_of([0.5, 0.25, 0.15, 0.1], [0.4, 0.3, 0.2, 0.1]))
    random = random_inputs([1], [0.5], [0.99])
    random.truncated = torch.tensor([0])
    random.top_k, random.top_p, random.max_top_k = torch.tensor([[2]]), torch.tensor([[math.inf]]), 2
    inputs = SamplingInputs(random=random, logprob_rows=torch.tensor([0, 1]), num_top_logprobs=3)
    drawn = sample(logits.clone(), inputs)
    assert drawn.ids.tolist() == [0, 1]
    assert drawn.logprobs is not None
    assert drawn.top_logprobs is not None
    assert drawn.logprobs.exp().tolist() == pytest.approx([0.5, 0.09 / 0.25])
    assert drawn.top_logprobs[0].exp().tolist() == pytest.approx([0.5, 0.25, 0.15])
    assert drawn.top_logprobs[1].exp().tolist() == pytest.approx([0.16 / 0.25, 0.09 / 0.25, 0.0])


def test_n03_half_precision_logits_give_float32_logprobs() -> None:
    drawn = sample(torch.randn(2, 50).bfloat16(), SamplingInputs(logprob_rows=torch.tensor([0, 1])))
    assert drawn.logprobs is not None
    assert drawn.logprobs.dtype == torch.float32
