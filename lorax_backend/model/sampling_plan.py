"""From the sampling parameters of a step's sequences to the tensors `sampler.sample` takes.

The random numbers come from a counter, not from a generator with state: the number of a sequence's i-th token is a
hash of its seed and i, the same in any batch and after any preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from lorax_backend.model.sampler import (
    BiasInputs,
    PenaltyInputs,
    RandomInputs,
    SamplingInputs,
    WatermarkInputs,
    count_occurrences,
)
from lorax_backend.model.watermark import WatermarkSettings
from lorax_backend.scheduler.sequence import ScheduledSequence
from lorax_backend.types import SamplingParams
from lorax_kernels.greedy import IDS, NOTHING, SCORED

Upload = Callable[[npt.NDArray[np.generic]], torch.Tensor]
_MASK = (1 << 64) - 1


def uniform_number(seed: int, index: int) -> float:
    """The random number in [0, 1) of the `index`-th token of a sequence with this seed; a multiple of 2**-24, so that
    it is below 1 in float32 too. SplitMix64 (Steele et al. 2014), keyed by the hashed seed."""
    return (_splitmix64(_splitmix64(seed & _MASK) ^ (index & _MASK)) >> 40) * 2.0**-24


def uniform_numbers(seeds: Sequence[int], indices: Sequence[int]) -> npt.NDArray[np.float64]:
    """float64 [n]: `uniform_number` of every pair, in a tenth of the time."""
    keys = _splitmix64_all(np.array([seed & _MASK for seed in seeds], dtype=np.uint64))
    drawn = _splitmix64_all(keys ^ np.array([index & _MASK for index in indices], dtype=np.uint64))
    return (drawn >> np.uint64(40)).astype(np.float64) * 2.0**-24


def _splitmix64_all(states: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = states + np.uint64(0x9E3779B97F4A7C15)  # arrays of unsigned integers wrap around without a word
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def is_random(params: SamplingParams) -> bool:
    """False if the token is the argmax of the processed logits; a temperature of 0 means that too."""
    return params.do_sample and params.temperature > 0.0


def has_penalty(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
    )


@dataclass(frozen=True, slots=True)
class _Kind:
    """The mode of `lorax_kernels.greedy` that draws for `params`, from the `since`-th token on."""

    params: SamplingParams
    mode: int
    since: int


@dataclass(slots=True)
class _Rows:
    """Row numbers by what they need; collected in one pass over the sequences."""

    penalty: list[int] = field(default_factory=list)
    random: list[int] = field(default_factory=list)
    logprob: list[int] = field(default_factory=list)
    forbidden: list[tuple[int, int]] = field(default_factory=list)
    watermark: list[int] = field(default_factory=list)
    bias: list[int] = field(default_factory=list)


class SamplingPlanner:
    """Owns the table of token occurrences of sequences with penalties, one row a runner slot.

    The table exists only once a request has asked for a penalty. A row is rebuilt from the sequence's ids when it
    belongs to another sequence or missed a token, and otherwise updated on the device with each drawn token.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device,
        watermark: WatermarkSettings | None = None,
    ) -> None:
        self._watermark = watermark or WatermarkSettings()
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._device = device
        self._table: torch.Tensor | None = None
        self._counted: dict[int, tuple[int, int]] = {}  # slot -> (handle, tokens counted)
        self._kinds: list[_Kind | None] = [None] * max_num_seqs  # by slot

    @property
    def table_bytes(self) -> int:
        """Bytes of the table once it exists."""
        return self._max_num_seqs * self._vocab_size * 4

    def greedy_mode(self, sampled: Sequence[ScheduledSequence]) -> int:
        """The mode of `lorax_kernels.greedy` that gives every one of `sampled` what it wants. `NOTHING` if none does:
        `plan` says what to do instead."""
        mode = IDS if sampled else NOTHING
        for item in sampled:
            seq = item.seq
            kind = self._kinds[seq.slot]
            if kind is None or kind.params is not seq.sampling:
                kind = self._kinds[seq.slot] = self._kind(seq.sampling)
            if kind.mode == NOTHING or item.generated_index < kind.since:
                return NOTHING
            if kind.mode > mode:
                mode = kind.mode
        return mode

    def _kind(self, params: SamplingParams) -> _Kind:
        more = has_penalty(params) or is_random(params) or params.watermark or bool(params.logit_bias)
        forbids = any(0 <= stop < self._vocab_size for stop in params.stop_token_ids)
        mode = IDS if params.top_logprobs is None else SCORED
        if more or (params.top_logprobs or 0) > 0:
            mode = NOTHING
        return _Kind(params, mode, params.min_new_tokens if forbids else 0)

    def plan(
        self, sampled: Sequence[ScheduledSequence], last_token: torch.Tensor, upload: Upload
    ) -> SamplingInputs:
        """Build the inputs for `sampled`, the sequences of the logits' rows in order.

        Args:
            last_token: int64 [slots] on the device, the token drawn last for each slot.
            upload: makes a device tensor of a numpy array.
        """
        rows = self._classify(sampled)
        inputs = SamplingInputs()
        if rows.bias:
            inputs.bias = self._bias(sampled, rows.bias, upload)
        if rows.watermark:
            inputs.watermark = self._mark(sampled, rows.watermark, last_token, upload)
        if rows.penalty:
            inputs.penalties = self._penalties(sampled, rows.penalty, last_token, upload)
        if rows.forbidden:
            pairs = np.array(rows.forbidden, dtype=np.int64).T
            inputs.forbidden = (upload(pairs[0].copy()), upload(pairs[1].copy()))
        if rows.random:
            inputs.random = self._random(sampled, rows.random, upload)
        if rows.logprob:
            inputs.logprob_rows = upload(np.array(rows.logprob, dtype=np.int64))
            inputs.num_top_logprobs = max(sampled[row].seq.sampling.top_logprobs or 0 for row in rows.logprob)
        return inputs

    def count_drawn(self, inputs: SamplingInputs, ids: torch.Tensor) -> None:
        """Add the drawn `ids` [rows] to the occurrences of the rows with penalties."""
        if inputs.penalties is None or self._table is None:
            return
        flat = inputs.penalties.slots * self._vocab_size + ids.index_select(0, inputs.penalties.rows)
        self._table.view(-1).scatter_add_(0, flat, torch.full_like(flat, 2, dtype=self._table.dtype))

    def _classify(self, sampled: Sequence[ScheduledSequence]) -> _Rows:
        rows = _Rows()
        for row, item in enumerate(sampled):
            params = item.seq.sampling
            if has_penalty(params):
                rows.penalty.append(row)
            if is_random(params):
                rows.random.append(row)
            if params.top_logprobs is not None:
                rows.logprob.append(row)
            if params.watermark:
                rows.watermark.append(row)
            if params.logit_bias:
                rows.bias.append(row)
            if item.generated_index < params.min_new_tokens:
                rows.forbidden += [
                    (row, stop) for stop in params.stop_token_ids if 0 <= stop < self._vocab_size
                ]
        return rows

    def _bias(self, sampled: Sequence[ScheduledSequence], rows: list[int], upload: Upload) -> BiasInputs:
        # A dict a row: ids that came twice are added up, as `BiasInputs` wants no pair twice.
        entries: list[tuple[int, int, float]] = []
        for row in rows:
            total: dict[int, float] = {}
            for token, value in sampled[row].seq.sampling.logit_bias:
                if 0 <= token < self._vocab_size:
                    total[token] = total.get(token, 0.0) + value
            entries += [(row, token, value) for token, value in total.items()]
        places = np.array([entry[:2] for entry in entries], dtype=np.int64).reshape(-1, 2)
        values = np.array([entry[2] for entry in entries], dtype=np.float32)
        return BiasInputs(upload(places[:, 0].copy()), upload(places[:, 1].copy()), upload(values))

    def _mark(
        self, sampled: Sequence[ScheduledSequence], rows: list[int], last_token: torch.Tensor, upload: Upload
    ) -> WatermarkInputs:
        slots, known = [], []
        for row in rows:
            seq, position = sampled[row].seq, sampled[row].seq.prompt_len + sampled[row].generated_index - 1
            slots.append(seq.slot)
            known.append(seq.token_ids[position] if position < len(seq.token_ids) else -1)
        previous = upload(np.array(known, dtype=np.int64))
        if min(known) < 0:  # the newest token is still on the device only
            drawn = last_token.index_select(0, upload(np.array(slots, dtype=np.int64)))
            previous = torch.where(previous < 0, drawn, previous)
        return WatermarkInputs(upload(np.array(rows, dtype=np.int64)), previous, self._watermark)

    def _penalties(
        self, sampled: Sequence[ScheduledSequence], rows: list[int], last_token: torch.Tensor, upload: Upload
    ) -> PenaltyInputs:
        if self._table is None:
            shape = (self._max_num_seqs, self._vocab_size)
            self._table = torch.zeros(shape, dtype=torch.int32, device=self._device)
        for row in rows:
            item = sampled[row]
            known = item.seq.prompt_len + item.generated_index
            if self._counted.get(item.seq.slot) != (item.seq.handle, known):
                self._recount(item, known, last_token, upload)
            self._counted[item.seq.slot] = (item.seq.handle, known + 1)
        slots = upload(np.array([sampled[row].seq.slot for row in rows], dtype=np.int64))
        parameters = [sampled[row].seq.sampling for row in rows]
        columns = upload(
            np.array(
                [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in parameters],
                dtype=np.float32,
            )
        )
        return PenaltyInputs(
            rows=upload(np.array(rows, dtype=np.int64)),
            slots=slots,
            occurrences=self._table.index_select(0, slots),
            repetition=columns[:, 0:1],
            frequency=columns[:, 1:2],
            presence=columns[:, 2:3],
        )

    def _recount(self, item: ScheduledSequence, known: int, last_token: torch.Tensor, upload: Upload) -> None:
        seq = item.seq
        assert self._table is not None
        ids = np.array(seq.token_ids, dtype=np.int64)
        generated = upload(ids[seq.prompt_len :].copy())
        if known > len(ids):  # the newest token is still on the device only
            generated = torch.cat((generated, last_token[seq.slot : seq.slot + 1]))
        count_occurrences(self._table, seq.slot, upload(ids[: seq.prompt_len].copy()), generated)

    def _random(self, sampled: Sequence[ScheduledSequence], rows: list[int], upload: Upload) -> RandomInputs:
        parameters = [sampled[row].seq.sampling for row in rows]
        indices = [sampled[row].generated_index for row in rows]
        columns_host = np.empty((len(rows), 2), dtype=np.float32)
        columns_host[:, 0] = [p.temperature for p in parameters]
        columns_host[:, 1] = uniform_numbers([p.seed for p in parameters], indices)
        columns = upload(columns_host)
        inputs = RandomInputs(
            rows=upload(np.array(rows, dtype=np.int64)), temperature=columns[:, 0:1], uniform=columns[:, 1:2]
        )
        vocab = self._vocab_size
        cut = [i for i, p in enumerate(parameters) if 0 < p.top_k < vocab or p.top_p < 1.0]
        if cut:
            top_k = [parameters[i].top_k if 0 < parameters[i].top_k < vocab else vocab for i in cut]
            top_p = [parameters[i].top_p if parameters[i].top_p < 1.0 else float("inf") for i in cut]
            inputs.truncated = upload(np.array(cut, dtype=np.int64))
            inputs.top_k = upload(np.array(top_k, dtype=np.int64)[:, None])
            inputs.top_p = upload(np.array(top_p, dtype=np.float32)[:, None])
            inputs.max_top_k = max(top_k) if max(top_k) < vocab else None
        typical = [i for i, p in enumerate(parameters) if p.typical_p < 1.0]
        if typical:
            values = np.array([parameters[i].typical_p for i in typical], dtype=np.float32)
            inputs.typical = upload(np.array(typical, dtype=np.int64))
            inputs.typical_p = upload(values[:, None])
        return inputs
