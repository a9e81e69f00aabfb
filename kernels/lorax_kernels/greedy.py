"""Greedy drawing on the device: token ids and their log probabilities from logits, in one launch.

A captured graph draws with it, so what a step wants is data: `control` int32 [2 or more] on the device holds a mode and
the place in turn where the host will read. In mode `NOTHING` neither the last tokens nor what the host reads is
touched, and rows of slot -1 never are. On CUDA the host reads page-locked memory that the kernel itself writes, so that
no copy follows; whoever launches waits for an event before it reads, and uses each place again only after that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lorax_kernels import dispatch
from lorax_kernels.sizes import cdiv, next_power_of_2

NOTHING, IDS, SCORED = 0, 1, 2
"""Modes. `IDS` draws as `logits.argmax(-1)` does: of equal logits the lowest id, and NaN above all. `SCORED` also gives
log probabilities, and takes NaN and infinities for `LOGIT_LIMIT` of either sign, so that these are finite."""
LOGIT_LIMIT = 1e30
"""Far beyond any real logit, and still finite after penalties and temperatures."""
_PROGRAMS = 512  # about four for every multiprocessor of a large device
_LEAST_COLUMNS = 1024


@dataclass(slots=True)
class GreedyMemory:
    """Memory of fixed address for `draw_greedy`, for logits of up to `rows` rows of `vocab_size`.

    Attributes:
        last_token: int64 [slots], the token drawn last for each slot.
        ids: int32 [turns, rows], for the host. logprobs: float32 [turns, rows], natural logs.
    """

    last_token: torch.Tensor
    rows: int
    vocab_size: int
    turns: int
    ids: torch.Tensor = field(init=False)
    logprobs: torch.Tensor = field(init=False)
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        device = self.last_token.device
        pinned = device.type == "cuda"
        self.ids = torch.zeros(self.turns, self.rows, dtype=torch.int32, pin_memory=pinned)
        self.logprobs = torch.zeros(self.turns, self.rows, dtype=torch.float32, pin_memory=pinned)
        # A split's largest logit, its sum of exponentials and its id; and of each row how many splits are done.
        cells = max(rows * num_splits(rows, self.vocab_size) for rows in range(1, self.rows + 1))
        self.parts = (
            torch.empty(cells, dtype=torch.float32, device=device),
            torch.empty(cells, dtype=torch.float32, device=device),
            torch.empty(cells, dtype=torch.int32, device=device),
            torch.zeros(self.rows, dtype=torch.int32, device=device),
        )


def num_splits(rows: int, vocab_size: int) -> int:
    """Programs that share a row of logits: a power of two, and fewer the more rows there are."""
    return next_power_of_2(min(cdiv(_PROGRAMS, rows), cdiv(vocab_size, _LEAST_COLUMNS)))


def draw_greedy(
    logits: torch.Tensor, control: torch.Tensor, slots: torch.Tensor, memory: GreedyMemory
) -> None:
    """Draw a token for every row, and put it where `memory` says.

    Args:
        logits: [R, vocab_size] of any float dtype, contiguous in columns; not changed.
        control: int32 [2 or more] on the device, the mode and the turn.
        slots: int64 [R], each row's slot in `memory.last_token`; -1 for a row that is nobody's.

    Raises:
        ValueError: shapes do not fit the memory.
    """
    if logits.shape[0] > memory.rows or logits.shape[1] != memory.vocab_size or logits.stride(1) != 1:
        raise ValueError(
            f"draw_greedy: logits {tuple(logits.shape)} do not fit {memory.rows} rows of {memory.vocab_size}"
        )
    if dispatch._uses_triton(logits):
        from lorax_kernels import greedy_triton

        greedy_triton.draw_greedy(logits, control, slots, memory)
    else:
        _draw_greedy(logits, control, slots, memory)


def newest_ids(ids: torch.Tensor, pending: torch.Tensor, last_token: torch.Tensor) -> torch.Tensor:
    """int32 [T]: `ids` int32 [T], but `last_token` int64 [slots] of slot `pending` int32 [T] where that is not -1."""
    if dispatch._uses_triton(ids):
        from lorax_kernels import greedy_triton

        return greedy_triton.newest_ids(ids, pending, last_token)
    drawn = last_token.index_select(0, pending.clamp_min(0)).to(torch.int32)
    return torch.where(pending >= 0, drawn, ids)


def _draw_greedy(
    logits: torch.Tensor, control: torch.Tensor, slots: torch.Tensor, memory: GreedyMemory
) -> None:
    """The torch twin; on a device it waits for the results."""
    mode, turn = control[:2].tolist()
    rows = torch.nonzero(slots >= 0).squeeze(1)
    if mode == NOTHING or not rows.numel():
        return
    if rows.numel() < logits.shape[0]:
        logits = logits.index_select(0, rows)
    if mode == SCORED:
        logits = torch.nan_to_num(logits.float(), nan=-LOGIT_LIMIT, posinf=LOGIT_LIMIT, neginf=-LOGIT_LIMIT)
    ids = logits.argmax(-1)
    memory.last_token.index_copy_(0, slots.index_select(0, rows), ids)
    host = memory.ids.device
    memory.ids[turn].index_copy_(0, rows.to(host), ids.to(host, torch.int32))
    if mode == SCORED:
        chosen = torch.log_softmax(logits, -1).gather(1, ids.unsqueeze(1)).squeeze(1)
        memory.logprobs[turn].index_copy_(0, rows.to(host), chosen.to(host))
