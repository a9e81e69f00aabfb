"""The soft watermark of Kirchenbauer et al. 2023, as batched tensor operations, and its detector.

Each token splits the vocabulary: a share gamma of it, the green list, is favoured as the next token. The split is a
pseudo-random permutation keyed by `hash_key * previous token`, so a text can be checked without the model. The
permutation is computed from the ids alone (no random generator with state), so that it is the same on every device and
for every row of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

HASH_KEY = 15485863
_GROUP = 32  # rows worked on at once: the memory for it need not grow with the batch


@dataclass(frozen=True, slots=True)
class WatermarkSettings:
    """`gamma` in (0, 1): share of the vocabulary in a green list. `delta`: what is added to its logits."""

    gamma: float = 0.5
    delta: float = 2.0
    hash_key: int = HASH_KEY

    def __post_init__(self) -> None:
        if not 0.0 < self.gamma < 1.0:
            raise ValueError(f"watermark_gamma is {self.gamma}; it must be above 0 and below 1")

    def green_size(self, vocab_size: int) -> int:
        """Ids in a green list."""
        return int(self.gamma * vocab_size)


def green_mask(previous: torch.Tensor, vocab_size: int, settings: WatermarkSettings) -> torch.Tensor:
    """Which ids each row favours: bool [rows, vocab], exactly `green_size` true a row.

    Args:
        previous: int64 [rows], the token before the one to be drawn.
    """
    size = settings.green_size(vocab_size)
    if size == 0:
        return torch.zeros(len(previous), vocab_size, dtype=torch.bool, device=previous.device)
    # int32 products wrap around on every device. The low half of the key decides, so that is all that is kept.
    keys = _mix((previous * settings.hash_key).to(torch.int32))
    ids = torch.arange(vocab_size, dtype=torch.int32, device=previous.device)
    # A bijection of 32-bit numbers for every key: no two ids share a rank, so the list has its exact size.
    ranks = _mix(ids[None, :] + keys[:, None])
    return ranks <= ranks.kthvalue(size, dim=-1, keepdim=True).values


def favour_green(x: torch.Tensor, previous: torch.Tensor, settings: WatermarkSettings) -> torch.Tensor:
    """Logits [rows, vocab] with delta added to each row's green list."""
    groups = zip(x.split(_GROUP), previous.split(_GROUP), strict=True)
    return torch.cat(
        [part + settings.delta * green_mask(last, x.shape[1], settings) for part, last in groups]
    )


def watermark_z_score(token_ids: Sequence[int], vocab_size: int, settings: WatermarkSettings) -> float:
    """How many standard deviations the green tokens of a text exceed what chance gives (equation 3 of the paper).

    `token_ids` begins with the token before the first to be judged. Above 4 a text is marked, beyond reasonable doubt.
    """
    if len(token_ids) < 2:
        return 0.0
    ids = torch.tensor(token_ids, dtype=torch.int64)
    green = 0
    for previous, drawn in zip(ids[:-1].split(_GROUP), ids[1:].split(_GROUP), strict=True):
        green += int(green_mask(previous, vocab_size, settings).gather(1, drawn[:, None]).sum())
    count, gamma = len(ids) - 1, settings.gamma
    return (green - gamma * count) / math.sqrt(count * gamma * (1 - gamma))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective scrambling of 32-bit numbers held in int32 (Appleby's MurmurHash3 finalizer)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * (0x85EBCA6B - (1 << 32))
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * (0xC2B2AE35 - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)
