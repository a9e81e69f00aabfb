"""How adapters lie in memory: pages of rank 8, each holding that rank slice of every LoRA site of the model.

A site is one place in the model where a LoRA delta is added: a linear layer, or several that share their input and
are run as one (q, k, v; gate, up). Fused layers are the site's slices. For a site with input width `in_features` and
slices of output widths `out_slices`, a page holds

    A  [len(out_slices), PAGE_RANK, in_features]     rows of every slice's A
    B  [PAGE_RANK, sum(out_slices)]                  B transposed, with the adapter's scaling folded in

so that an adapter of rank r takes ceil(r / PAGE_RANK) pages, zero beyond its true rank, and one copy of
`[pages, page_size]` elements brings it in. For slice s with output columns [o_s, o_s + out_slices[s]) the delta is
`y[:, o_s:o_s + out_slices[s]] += (x @ A[s].T) @ B[:, o_s:...]`, summed over the adapter's pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

PAGE_RANK = 8
_ALIGN = 64  # elements; keeps every site's block on a 128-byte line in 2-byte dtypes


@dataclass(frozen=True, slots=True)
class LoraSite:
    """Input width and output widths of one site."""

    in_features: int
    out_slices: tuple[int, ...]

    @property
    def out_features(self) -> int:
        return sum(self.out_slices)


class PageLayout:
    """Offsets of every site inside a page. `sites` is ordered; keys are free names, such as 'layers.0.qkv'."""

    def __init__(self, sites: Mapping[str, LoraSite]) -> None:
        self.sites = dict(sites)
        self._a_offset: dict[str, int] = {}
        self._b_offset: dict[str, int] = {}
        end = 0
        for key, site in self.sites.items():
            self._a_offset[key] = end
            end = _aligned(end + len(site.out_slices) * PAGE_RANK * site.in_features)
            self._b_offset[key] = end
            end = _aligned(end + PAGE_RANK * site.out_features)
        self.page_size = end  # elements

    def a_offset(self, key: str, slice_: int) -> int:
        """Elements from a page's begin to A of one slice of a site; its rows follow each other."""
        return self._a_offset[key] + slice_ * PAGE_RANK * self.sites[key].in_features

    def b_offset(self, key: str, slice_: int) -> int:
        """Elements from a page's begin to B of one slice of a site; its rows lie `out_features` of the site apart."""
        return self._b_offset[key] + sum(self.sites[key].out_slices[:slice_])

    def a_view(self, pages: torch.Tensor, key: str) -> torch.Tensor:
        """A of one site: `pages` [P, page_size] -> a view [P, slices, PAGE_RANK, in_features]."""
        site = self.sites[key]
        return pages.as_strided(
            (pages.shape[0], len(site.out_slices), PAGE_RANK, site.in_features),
            (pages.stride(0), PAGE_RANK * site.in_features, site.in_features, 1),
            pages.storage_offset() + self._a_offset[key],
        )

    def b_view(self, pages: torch.Tensor, key: str) -> torch.Tensor:
        """B of one site: `pages` [P, page_size] -> a view [P, PAGE_RANK, out_features]."""
        site = self.sites[key]
        return pages.as_strided(
            (pages.shape[0], PAGE_RANK, site.out_features),
            (pages.stride(0), site.out_features, 1),
            pages.storage_offset() + self._b_offset[key],
        )


def pages_for_rank(rank: int) -> int:
    """Pages an adapter of this rank takes."""
    return -(-rank // PAGE_RANK)


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGN) * _ALIGN
