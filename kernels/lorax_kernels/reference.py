"""Torch twins of the LoRA kernels: ground truth of the tests, and what a CPU runs.

`bgmv_*` works row by row, `sgmv_*` segment by segment; both give the same numbers. `add_lora` is written for few,
small torch operations, because on a CPU their number is what a decode step pays for.
"""

from __future__ import annotations

import torch

from lorax_kernels.layout import PAGE_RANK
from lorax_kernels.metadata import LoraBatch

_PageViews = dict[int, tuple[torch.Tensor, tuple[torch.Tensor, ...]]]
_GATHER_FROM_PAGES = 5  # from this many pages on, one gathered copy beats one pair of products a page


def _row_pages(batch: LoraBatch, width: int) -> torch.Tensor:
    """Pages of every row of `batch.rows`, int64 [R, width], -1 beyond the last."""
    table = torch.full((len(batch.rows), width), -1, dtype=torch.int64)
    for s in batch.segments:
        table[s.start : s.start + s.count, : len(s.pages)] = torch.tensor(s.pages)
    return table


def bgmv_shrink(x: torch.Tensor, a: torch.Tensor, batch: LoraBatch) -> torch.Tensor:
    """x [T, in] times A of each row's adapter, a [P, S, 8, in] -> [R, max_pages, S, 8] in float32 or wider.

    Row i of the result belongs to token row `batch.rows[i]`; pages an adapter does not have give zeros.
    """
    table = _row_pages(batch, batch.max_pages).to(a.device)
    weights = a[table.clamp_min(0)].masked_fill((table < 0)[:, :, None, None, None], 0)
    rows = x[batch.row_index.to(x.device)]
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.einsum("ri,rpsui->rpsu", rows.to(wide), weights.to(wide))


def bgmv_expand(
    h: torch.Tensor, b: torch.Tensor, batch: LoraBatch, out: torch.Tensor, out_slices: tuple[int, ...]
) -> None:
    """Add h [R, max_pages, S, 8] times B of each row's adapter, b [P, 8, out], to the rows of out [T, out]."""
    table = _row_pages(batch, h.shape[1]).to(b.device)
    weights = b[table.clamp_min(0)].masked_fill((table < 0)[:, :, None, None], 0)
    rows = batch.row_index.to(out.device)
    begin = 0
    for s, width in enumerate(out_slices):
        part = weights[..., begin : begin + width].to(h.dtype)
        out[rows, begin : begin + width] += torch.einsum("rpu,rpuo->ro", h[:, :, s], part).to(out.dtype)
        begin += width


def sgmv_shrink(x: torch.Tensor, a: torch.Tensor, batch: LoraBatch) -> torch.Tensor:
    """The same as `bgmv_shrink`, one matrix product a segment."""
    wide = torch.promote_types(x.dtype, torch.float32)
    slices = a.shape[1]
    h = torch.zeros(len(batch.rows), batch.max_pages, slices, PAGE_RANK, dtype=wide, device=x.device)
    rows = batch.row_index.to(x.device)
    for s in batch.segments:
        weights = a[list(s.pages)].reshape(-1, x.shape[1]).to(wide)
        part = x[rows[s.start : s.start + s.count]].to(wide) @ weights.t()
        h[s.start : s.start + s.count, : len(s.pages)] = part.view(s.count, len(s.pages), slices, PAGE_RANK)
    return h


def sgmv_expand(
    h: torch.Tensor, b: torch.Tensor, batch: LoraBatch, out: torch.Tensor, out_slices: tuple[int, ...]
) -> None:
    """The same as `bgmv_expand`, one matrix product a segment and slice."""
    rows = batch.row_index.to(out.device)
    for s in batch.segments:
        index = rows[s.start : s.start + s.count]
        weights = b[list(s.pages)].flatten(0, 1).to(h.dtype)
        begin = 0
        for k, width in enumerate(out_slices):
            part = h[s.start : s.start + s.count, : len(s.pages), k].flatten(1)
            out[index, begin : begin + width] += (part @ weights[:, begin : begin + width]).to(out.dtype)
            begin += width


def add_lora(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    batch: LoraBatch,
    out: torch.Tensor,
    out_slices: tuple[int, ...],
) -> None:
    """Add the LoRA delta of one site in place; rows without an adapter are not touched.

    Args:
        x: [T, in], input of the site.
        a: [P, S, 8, in], A of every page (a view into the pages).
        b: [P, 8, out], B of every page, scaling folded in.
        batch: the rows with adapters, of at most T tokens.
        out: [T, out], the base layer's output.
        out_slices: widths of the S fused layers, summing to `out`.
    """
    ranges = batch.token_ranges
    if ranges is None:
        rows = batch.row_index
        grouped = out.index_select(0, rows)
        starts = [(s.start, s.count) for s in batch.segments]
        _add_segments(x.index_select(0, rows), a, b, batch, starts, grouped, out_slices)
        out.index_copy_(0, rows, grouped)
    else:
        _add_segments(x, a, b, batch, ranges, out, out_slices)


def _add_segments(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    batch: LoraBatch,
    ranges: list[tuple[int, int]] | tuple[tuple[int, int], ...],
    out: torch.Tensor,
    out_slices: tuple[int, ...],
) -> None:
    views = _page_views(a, b, out_slices)
    outs = out.split(out_slices, dim=1) if len(out_slices) > 1 else (out,)
    for segment, (first, count) in zip(batch.segments, ranges, strict=True):
        rows = x.narrow(0, first, count)
        targets = [part.narrow(0, first, count) for part in outs]
        if len(segment.pages) >= _GATHER_FROM_PAGES:
            _add_gathered(rows, a, b, segment.pages, targets)
            continue
        for page in segment.pages:
            pair = views.get(page)
            if pair is None:
                pair = views[page] = (a[page].flatten(0, 1).t(), b[page].split(out_slices, dim=1))
            h = torch.mm(rows, pair[0])
            parts = h.split(PAGE_RANK, dim=1) if len(targets) > 1 else (h,)
            for target, part, weights in zip(targets, parts, pair[1], strict=True):
                target.addmm_(part, weights)


def _add_gathered(
    rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor, pages: tuple[int, ...], targets: list[torch.Tensor]
) -> None:
    index = torch.tensor(pages)
    h = torch.mm(rows, a.index_select(0, index).view(-1, rows.shape[1]).t())
    h = h.view(rows.shape[0], len(pages), len(targets), PAGE_RANK)
    weights = b.index_select(0, index).flatten(0, 1)
    begin = 0
    for s, target in enumerate(targets):
        width = target.shape[1]
        target.addmm_(h[:, :, s].flatten(1), weights[:, begin : begin + width])
        begin += width


def _page_views(a: torch.Tensor, b: torch.Tensor, out_slices: tuple[int, ...]) -> _PageViews:
    """Views of single pages, kept with the tensor they look into: making them costs more than a small product."""
    kept = getattr(a, "_lorax_page_views", None)
    if kept is None or kept[0] is not b or kept[1] != out_slices:
        kept = (b, out_slices, {})
        a._lorax_page_views = kept  # type: ignore[attr-defined]
    views: _PageViews = kept[2]
    return views
