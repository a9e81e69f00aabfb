"""Log probabilities of a prompt's own tokens, for the sequences that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from lorax_backend.model.sampling_plan import Upload
from lorax_backend.scheduler.sequence import ScheduledSequence

Head = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(slots=True)
class _Collected:
    """What the chunks of one prompt have given so far, from position `first` on."""

    handle: int
    first: int
    end: int
    parts: list[torch.Tensor] = field(default_factory=list)


class PromptScorer:
    """Collects float32 log probabilities over the chunks of a prompt; one entry a runner slot.

    Args:
        head: (hidden [R, hidden], adapter slot) -> logits [R, vocab].
        max_rows: rows of logits computed at once. Bounds the memory, whatever the length of a prompt.
        upload: makes a device tensor of a numpy array.
    """

    def __init__(self, head: Head, max_rows: int, upload: Upload) -> None:
        self._head = head
        self._max_rows = max_rows
        self._upload = upload
        self._collected: dict[int, _Collected] = {}

    def forget(self, slots: Iterable[int]) -> None:
        """The sequences of these slots are gone."""
        for slot in slots:
            self._collected.pop(slot, None)

    def add(self, item: ScheduledSequence, hidden: torch.Tensor) -> torch.Tensor | None:
        """Take in one chunk of a prompt.

        Args:
            hidden: [item.count, hidden], the chunk's rows before the last norm.

        Returns:
            With the prompt's last chunk float32 [prompt_len - 1]: the natural log of each token's probability given
            those before it, NaN for positions that were never computed; None with other chunks.
        """
        seq = item.seq
        held = self._collected.get(seq.slot)
        if held is None or held.handle != seq.handle or held.end != item.start:
            held = self._collected[seq.slot] = _Collected(seq.handle, item.start, item.start)
        held.end = item.start + item.count
        rows = min(held.end, seq.prompt_len - 1) - item.start
        if rows > 0:
            targets = np.array(seq.token_ids[item.start + 1 : item.start + 1 + rows], dtype=np.int64)
            held.parts += self._score(hidden[:rows], self._upload(targets), seq.adapter_slot)
        if held.end < seq.prompt_len:
            return None
        del self._collected[seq.slot]
        unknown = hidden.new_full((min(held.first, seq.prompt_len - 1),), float("nan"), dtype=torch.float32)
        return torch.cat([unknown, *held.parts])

    def _score(self, hidden: torch.Tensor, targets: torch.Tensor, adapter_slot: int) -> list[torch.Tensor]:
        parts = []
        for rows, ids in zip(hidden.split(self._max_rows), targets.split(self._max_rows), strict=True):
            logits = self._head(rows, adapter_slot).float()
            chosen = logits.gather(1, ids[:, None]).squeeze(1)
            parts.append(chosen - torch.logsumexp(logits, -1))
        return parts
