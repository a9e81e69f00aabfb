"""What adapters add to a product of many rows while its tiles are written; `prefill_delta_kernels` says how."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorax_kernels.configs import PrefillConfig
from lorax_kernels.worklist import TILE_ROWS, LoraWork

_MAX_SLICES = 3
_LEAST_HALF = 8  # columns the tensor cores take


@dataclass(frozen=True, slots=True)
class TileDelta:
    """h B of the rows that have adapters.

    `planes` is h as shrink writes it for `work`, a work list of prefill: [splits, rows, S * max_pages * 8] in float32,
    whose sum over the splits is rounded to the type of `b`. `b` is [P, 8, out], contiguous in columns; `out_slices`
    are the widths of the S fused layers.
    """

    planes: torch.Tensor
    b: torch.Tensor
    work: LoraWork
    out_slices: tuple[int, ...]

    @property
    def arguments(self) -> tuple[torch.Tensor | int, ...]:
        work = self.work
        return (
            self.planes, self.b, work.data, work.capacity.groups_at, self.planes.shape[1], work.max_pages,
            self.b.stride(0), self.b.stride(1),
        )  # fmt: skip

    def constants(self, silu: bool) -> dict[str, int]:
        w0, w1, w2 = (*self.out_slices, 0, 0)[:_MAX_SLICES]
        widths = {"W0": w0} if silu else {"W0": w0, "W1": w1, "W2": w2}
        return widths | {"S": len(self.out_slices), "SPLITS": self.planes.shape[0], "LIST_ROWS": TILE_ROWS}

    def check(self, x: torch.Tensor, weight: torch.Tensor, config: PrefillConfig, silu: bool) -> None:
        """
        Raises:
            ValueError: it is not for x [T, in] times `weight` [out, in], or `config` cannot add one.
        """
        slices = self.out_slices
        if (
            self.work.shape.decode
            or self.work.num_tokens != x.shape[0]
            or len(slices) > _MAX_SLICES
            or sum(slices) != weight.shape[0]
            or (silu and (len(slices) != 2 or slices[0] != slices[1]))
            or self.b.shape[2] != weight.shape[0]
            or self.b.stride(2) != 1
        ):
            raise ValueError(
                f"a delta of slices {slices} and {self.work.num_tokens} rows for {x.shape[0]} rows times"
                f" {tuple(weight.shape)}, or of a work list of decode"
            )
        half = config.block_n if silu else config.block_n // 2
        if (
            TILE_ROWS % config.block_m
            or config.block_m % 16
            or half < _LEAST_HALF
            or not (silu or config.parts > 1)
        ):
            raise ValueError(f"{config} has no tiles that a delta can be added to")


def without_delta(x: torch.Tensor, silu: bool) -> tuple[tuple[torch.Tensor | int, ...], dict[str, int]]:
    """Arguments and constants of a product that adds none."""
    widths = {"W0": 0} if silu else {"W0": 0, "W1": 0, "W2": 0}
    return (x, x, x, 0, 0, 0, 0, 0), widths | {"S": 0, "SPLITS": 1, "LIST_ROWS": TILE_ROWS}
