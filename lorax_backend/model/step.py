"""PendingStep: a launched step whose tokens may still be on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lorax_backend.model.sampler import Drawn
from lorax_backend.scheduler.sequence import StepResult


@dataclass(slots=True)
class PendingStep:
    """Implements `engine.protocols.StepHandle`. On CUDA the copies to the host are queued behind the step and `result`
    waits for them alone, not for steps launched later."""

    ids: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    wanted: Sequence[int | None] = ()
    prompt_logprobs: dict[int, torch.Tensor] = field(default_factory=dict)
    copied: torch.cuda.Event | None = field(default=None)
    of_every_row: bool = False
    """`logprobs` has an entry for every row, else for those that want one."""

    @classmethod
    def without_tokens(cls, device: torch.device) -> PendingStep:
        """A step in which nothing samples. It is waited for all the same, or the host would run far ahead."""
        step = cls()
        if device.type == "cuda":
            step.copied = torch.cuda.Event()
            step.copied.record()
        return step

    @classmethod
    def of(
        cls,
        drawn: Drawn,
        wanted: Sequence[int | None],
        prompt_logprobs: Mapping[int, torch.Tensor] | None = None,
    ) -> PendingStep:
        """Start copying what was drawn to the host. `wanted` is `top_logprobs` of each row's request,
        `prompt_logprobs` float32 [prompt_len - 1] of some rows."""
        step = cls(
            _to_host(drawn.ids),
            _to_host(drawn.logprobs),
            _to_host(drawn.top_logprobs),
            _to_host(drawn.top_ids),
            wanted,
            {row: _copied(scores) for row, scores in (prompt_logprobs or {}).items()},
        )
        if drawn.ids.is_cuda:
            step.copied = torch.cuda.Event()
            step.copied.record()
        return step

    @classmethod
    def drawn(
        cls,
        ids: torch.Tensor,
        logprobs: torch.Tensor | None,
        wanted: Sequence[int | None],
        prompt_logprobs: Mapping[int, torch.Tensor] | None,
        event: torch.cuda.Event | None,
    ) -> PendingStep:
        """A step that writes to the host's memory itself: ids int32 and logprobs float32 of every row, the latter None
        if nobody wants them. `event`, if the step is on CUDA, is recorded behind it."""
        step = cls(ids, logprobs, wanted=wanted, of_every_row=True)
        if prompt_logprobs:
            step.prompt_logprobs = {row: _copied(scores) for row, scores in prompt_logprobs.items()}
        if event is not None:
            step.copied = event
            event.record()
        return step

    def result(self) -> StepResult:
        """Wait for the step; one entry a row that samples."""
        if self.copied is not None:
            self.copied.synchronize()
        if self.ids is None:
            return StepResult([], [], [])
        rows = len(self.wanted)
        result = StepResult(self.ids.tolist(), [None] * rows, [None] * rows)
        if self.logprobs is not None:
            self._fill_logprobs(result, self.logprobs.tolist())
        for row, scores in self.prompt_logprobs.items():
            result.prompt_logprobs[row] = tuple(scores.tolist())
        return result

    def _fill_logprobs(self, result: StepResult, chosen: list[float]) -> None:
        values = self.top_logprobs.tolist() if self.top_logprobs is not None else None
        ids = self.top_ids.tolist() if self.top_ids is not None else None
        rows = [row for row, count in enumerate(self.wanted) if count is not None]
        for position, row in enumerate(rows):
            count = self.wanted[row] or 0
            result.logprobs[row] = chosen[row if self.of_every_row else position]
            pairs: list[tuple[int, float]] = []
            if count and values is not None and ids is not None:
                best = zip(ids[position][:count], values[position][:count], strict=True)
                pairs = [(token, value) for token, value in best if value != float("-inf")]
            result.top_logprobs[row] = tuple(pairs)


def _to_host(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else _copied(tensor)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
