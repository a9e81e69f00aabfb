"""Drawing for steps in which every row is the argmax of its logits: one launch, in a decode step's graph or behind any
other step, that leaves the tokens where the next step and the host look for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lorax_backend.model.step import PendingStep
from lorax_backend.scheduler.sequence import ScheduledSequence
from lorax_kernels.greedy import NOTHING, SCORED, GreedyMemory, draw_greedy

_TURNS = 4  # more than the steps that can be in flight


@dataclass(frozen=True, slots=True)
class Drawing:
    """What a step draws here: a mode of `lorax_kernels.greedy`, and the place in turn for the host to read."""

    mode: int = NOTHING
    turn: int = 0


NOT_HERE = Drawing()
"""The step samples, or wants more than argmax and its log probability: `sampler.sample` draws."""


class GreedyDrawer:
    """Owns what the host reads of greedy steps, `_TURNS` of them in turn.

    Args:
        last_token: int64 [slots] on the device, the token drawn last for each slot; kept under this name.
    """

    def __init__(self, last_token: torch.Tensor, vocab_size: int) -> None:
        self.last_token = last_token
        self._memory = GreedyMemory(last_token, last_token.shape[0], vocab_size, _TURNS)
        on_cuda = last_token.is_cuda
        self._events = [torch.cuda.Event() for _ in range(_TURNS)] if on_cuda else None
        self._turn = 0

    def next(self, mode: int) -> Drawing:
        """The drawing of a step that is about to be launched."""
        if mode == NOTHING:
            return NOT_HERE
        self._turn = (self._turn + 1) % _TURNS
        return Drawing(mode, self._turn)

    def draw(self, logits: torch.Tensor, control: torch.Tensor, slots: torch.Tensor) -> None:
        """Launch the drawing for logits [R, vocab], or record it. `control` int32 [2] is a `Drawing` on the device,
        `slots` int64 [R] may hold -1 for rows of nobody."""
        draw_greedy(logits, control, slots, self._memory)

    def pending(
        self,
        drawing: Drawing,
        sampled: Sequence[ScheduledSequence],
        prompt_logprobs: Mapping[int, torch.Tensor] | None = None,
    ) -> PendingStep:
        """The step of a drawing that was launched; the first rows are `sampled`. Read it before `_TURNS` - 1 more."""
        rows, memory = len(sampled), self._memory
        return PendingStep.drawn(
            memory.ids[drawing.turn, :rows],
            memory.logprobs[drawing.turn, :rows] if drawing.mode == SCORED else None,
            [item.seq.sampling.top_logprobs for item in sampled],
            prompt_logprobs,
            self._events[drawing.turn] if self._events is not None else None,
        )
