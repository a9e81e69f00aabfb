"""An adapter in host memory, in the layout of the device arena."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """Weights of one adapter, checked against the base model and ready to be copied to the device.

    Attributes:
        pages: [num_pages, layout.page_size] in the model's dtype, contiguous; zero beyond each module's true rank
            and at sites the adapter does not touch; the scaling is folded into B.
        rank: the largest true rank of any module; `pages_for_rank(rank) == num_pages`.
        sites: keys of the layout's sites that hold weights.
        modules: HF module paths that hold weights, sorted.
    """

    pages: torch.Tensor
    rank: int
    sites: frozenset[str]
    modules: tuple[str, ...] = ()

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of host memory, and of device memory once it is there."""
        return self.pages.numel() * self.pages.element_size()
