"""From logits to token ids: pure functions on tensors [rows, vocab] in float32.

Every function treats each row by itself, so that a request's tokens do not depend on its batch mates, and none waits
for the device. The order of processors is that of LoRAX: logit bias and watermark, repetition penalty, frequency and
presence penalty, forbidden ids (the place of any mask), temperature, top-k, top-p, typical-p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorax_backend.model.watermark import WatermarkSettings, favour_green
from lorax_kernels.greedy import LOGIT_LIMIT

# On a CPU top-p first looks at this many best tokens; sorting the whole vocabulary takes milliseconds a row.
_NUCLEUS_GUESS = 256
# Rows with typical-p worked on at once: it takes many tensors of the logits' size.
_GROUP = 32


@dataclass(slots=True)
class PenaltyInputs:
    """Penalties of the rows that have any.

    Attributes:
        rows: int64 [P], rows of the logits.
        slots: int64 [P], rows of the table of occurrences.
        occurrences: int32 [P, vocab], those rows; see `count_occurrences`.
        repetition, frequency, presence: float32 [P, 1]; 1, 0 and 0 are off.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    occurrences: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor


@dataclass(slots=True)
class RandomInputs:
    """Settings of the rows that are drawn at random.

    Attributes:
        rows: int64 [S], rows of the logits.
        temperature: float32 [S, 1], above 0.
        uniform: float32 [S, 1] in [0, 1), one random number a row.
        truncated: int64 [C], which of the S rows have top-k or top-p; None if none has.
        top_k: int64 [C, 1], vocab size where off.
        top_p: float32 [C, 1], infinity where off.
        max_top_k: the largest top_k of the truncated rows, None if one of them has none.
        typical: int64 [Y], which of the S rows have typical-p; None if none has.
        typical_p: float32 [Y, 1], below 1.
    """

    rows: torch.Tensor
    temperature: torch.Tensor
    uniform: torch.Tensor
    truncated: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    max_top_k: int | None = None
    typical: torch.Tensor | None = None
    typical_p: torch.Tensor | None = None


@dataclass(slots=True)
class BiasInputs:
    """Numbers added to single logits: rows and ids int64 [n], no pair twice, values float32 [n]."""

    rows: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor


@dataclass(slots=True)
class WatermarkInputs:
    """Rows int64 [W] that carry the watermark, and the token before each, previous int64 [W]."""

    rows: torch.Tensor
    previous: torch.Tensor
    settings: WatermarkSettings


@dataclass(slots=True)
class SamplingInputs:
    """What `sample` does beyond the argmax; parts that are None cost nothing.

    `forbidden` is (rows, ids), both int64 [n]: ids that may not be drawn. `logprob_rows` int64 [L] are the rows that
    want log probabilities, `num_top_logprobs` the most alternatives any of them wants.
    """

    bias: BiasInputs | None = None
    watermark: WatermarkInputs | None = None
    penalties: PenaltyInputs | None = None
    forbidden: tuple[torch.Tensor, torch.Tensor] | None = None
    random: RandomInputs | None = None
    logprob_rows: torch.Tensor | None = None
    num_top_logprobs: int = 0

    @property
    def plain_greedy(self) -> bool:
        """True if the argmax of the raw logits is all that is wanted."""
        return (
            self.bias is None
            and self.watermark is None
            and self.penalties is None
            and self.forbidden is None
            and self.random is None
            and self.logprob_rows is None
        )


@dataclass(slots=True)
class Drawn:
    """ids int64 [rows]; logprobs float32 [L]; top_logprobs float32 and top_ids int64 [L, num_top_logprobs]."""

    ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None


def sample(logits: torch.Tensor, inputs: SamplingInputs) -> Drawn:
    """Choose one id a row. `logits` [rows, vocab] of any float dtype; it may be overwritten.

    A row with NaN or infinite logits still gets a valid id, and changes nothing for the others.
    """
    if inputs.plain_greedy:
        return Drawn(logits.argmax(-1))
    x = torch.nan_to_num(logits.float(), nan=-LOGIT_LIMIT, posinf=LOGIT_LIMIT, neginf=-LOGIT_LIMIT)
    if inputs.bias is not None:
        b = inputs.bias
        x.index_put_((b.rows, b.ids), x[b.rows, b.ids] + b.values)
    if inputs.watermark is not None:
        w = inputs.watermark
        x.index_copy_(0, w.rows, favour_green(x.index_select(0, w.rows), w.previous, w.settings))
    if inputs.penalties is not None:
        p = inputs.penalties
        x.index_copy_(0, p.rows, penalize(x.index_select(0, p.rows), p))
    if inputs.forbidden is not None:
        x.index_put_(inputs.forbidden, x.new_full((), float("-inf")))
    ids = x.argmax(-1)
    if inputs.random is not None:
        r = inputs.random
        warped = warp(x.index_select(0, r.rows), r)
        ids.index_copy_(0, r.rows, draw(warped, r.uniform))
        if inputs.logprob_rows is not None:
            x.index_copy_(0, r.rows, warped)
    if inputs.logprob_rows is None:
        return Drawn(ids)
    return _with_logprobs(x, ids, inputs.logprob_rows, inputs.num_top_logprobs)


def penalize(x: torch.Tensor, inputs: PenaltyInputs) -> torch.Tensor:
    """Apply the three penalties to logits [P, vocab].

    Repetition (Keskar et al. 2019): the logit of every token of prompt and answer is divided by the penalty where it
    is positive and multiplied where it is negative. Frequency and presence (OpenAI): the logit of a token generated
    c > 0 times loses `frequency * c + presence`.
    """
    seen = inputs.occurrences > 0
    generated = inputs.occurrences >> 1
    repeated = torch.where(x > 0, x / inputs.repetition, x * inputs.repetition)
    x = torch.where(seen, repeated, x)
    return x - (inputs.frequency * generated + inputs.presence * (generated > 0))


def count_occurrences(
    table: torch.Tensor, row: int, prompt_ids: torch.Tensor, generated_ids: torch.Tensor
) -> None:
    """Fill one row of an int32 table [rows, vocab] with 2 * (times generated) + (1 if in the prompt)."""
    counts = table[row]
    counts.zero_()
    counts.index_fill_(0, prompt_ids, 1)
    if generated_ids.numel():
        counts.index_add_(0, generated_ids, torch.full_like(generated_ids, 2, dtype=counts.dtype))


def warp(x: torch.Tensor, inputs: RandomInputs) -> torch.Tensor:
    """Temperature, then top-k, top-p and typical-p on logits [S, vocab]; what is cut becomes -inf."""
    x = x / inputs.temperature
    if inputs.truncated is not None:
        assert inputs.top_k is not None
        assert inputs.top_p is not None
        if inputs.truncated.numel() == x.shape[0]:
            x = truncate(x, inputs.top_k, inputs.top_p, inputs.max_top_k)
        else:
            cut = truncate(x.index_select(0, inputs.truncated), inputs.top_k, inputs.top_p, inputs.max_top_k)
            x.index_copy_(0, inputs.truncated, cut)
    if inputs.typical is not None:
        assert inputs.typical_p is not None
        for rows, mass in zip(inputs.typical.split(_GROUP), inputs.typical_p.split(_GROUP), strict=True):
            x.index_copy_(0, rows, keep_typical(x.index_select(0, rows), mass))
    return x


def keep_typical(x: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    """Locally typical sampling (Meister et al. 2023) on logits [Y, vocab], typical_p [Y, 1].

    Keeps the smallest set of tokens whose information content is nearest to the distribution's entropy and whose
    probability reaches typical_p, with every token as near as the last of them; the rest becomes -inf.
    """
    logprobs = torch.log_softmax(x, -1)
    probabilities = logprobs.exp()
    possible = probabilities > 0
    entropy = -torch.where(possible, logprobs * probabilities, 0.0).sum(-1, keepdim=True)
    distance = torch.where(possible, (logprobs + entropy).abs(), float("inf"))
    nearest, order = distance.sort(dim=-1, stable=True)
    mass = probabilities.gather(1, order)
    before = mass.cumsum(-1) - mass
    kept = ((before < typical_p) & nearest.isfinite()).sum(-1, keepdim=True).clamp(min=1)
    return x.masked_fill(distance > nearest.gather(1, kept - 1), float("-inf"))


def truncate(
    x: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, max_top_k: int | None
) -> torch.Tensor:
    """Top-k, then top-p (Holtzman et al. 2019) on logits [C, vocab]; arguments as in `RandomInputs`.

    Top-k keeps every token whose logit is at least the k-th best, ties included. Top-p keeps the smallest set of best
    tokens whose probability, after top-k, reaches p, and at least one; of equal tokens the lower ids, except that
    ties of the k-th best stay together.
    """
    vocab = x.shape[1]
    width = vocab if max_top_k is None else min(max_top_k, vocab)
    if (
        max_top_k is None
        and x.device.type == "cpu"
        and vocab > _NUCLEUS_GUESS
        and bool((top_k >= vocab).all())
    ):
        best = x.topk(_NUCLEUS_GUESS, dim=-1).values
        mass = (best - torch.logsumexp(x, -1, keepdim=True)).exp().sum(-1, keepdim=True)
        if bool((mass > top_p + 1e-4).all()):
            width = _NUCLEUS_GUESS
    best = x.sort(dim=-1, descending=True).values if width == vocab else x.topk(width, dim=-1).values
    last = best.gather(1, (top_k - 1).clamp(max=width - 1))
    kth = torch.where(top_k < vocab, last, float("-inf"))
    normalizer = torch.logsumexp(x.masked_fill(x < kth, float("-inf")), -1, keepdim=True)
    probabilities = (best - normalizer).exp().masked_fill(best < kth, 0.0)
    before = probabilities.cumsum(-1) - probabilities
    kept = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    threshold = torch.maximum(best.gather(1, kept - 1), kth)
    ties_kept = torch.where(threshold > kth, kept - (best > threshold).sum(-1, keepdim=True), vocab)
    ties = x == threshold
    cut = (x < threshold) | (ties & (ties.cumsum(-1, dtype=torch.int32) > ties_kept))
    return x.masked_fill(cut, float("-inf"))


def draw(x: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one id a row from softmax(x), x [S, vocab], by inverting the distribution function at `uniform` [S, 1]."""
    probabilities = torch.softmax(x, -1)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may bring uniform * total up to total, which lies beyond every token.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cumulative, target, right=True).clamp_(max=x.shape[1] - 1)
    # A parallel sum need not be monotonous to the last bit, so the search may end beside the token it should find.
    possible = probabilities.gather(1, ids) > 0
    return torch.where(possible, ids, probabilities.argmax(-1, keepdim=True)).squeeze(1)


def _with_logprobs(x: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, num_top: int) -> Drawn:
    logprobs = torch.log_softmax(x.index_select(0, rows), -1)
    chosen = logprobs.gather(1, ids.index_select(0, rows).unsqueeze(1)).squeeze(1)
    if num_top == 0:
        return Drawn(ids, chosen)
    best = logprobs.topk(min(num_top, x.shape[1]), dim=-1)
    return Drawn(ids, chosen, best.values, best.indices)
