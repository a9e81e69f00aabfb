"""Adapters' weights brought into pages by the processor."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from lorax_backend.adapters.weight_reader import WeightFileError, read_tensors
from lorax_kernels.layout import PAGE_RANK, pages_for_rank

if TYPE_CHECKING:
    from lorax_backend.adapters.adapter_plan import AdapterPlan, Module, Problems

# One adapter is laid out at a time, turn by turn. Every call of torch gives the interpreter away and wants it back:
# beside one thread that does so the step's thread hardly notices, beside several it waits for tens of milliseconds.
_LAYING_OUT = threading.Lock()
_MODULES_A_TURN = 16


def fill_pages(plan: AdapterPlan, pages: torch.Tensor, problems: Problems) -> None:
    """Write every element of `pages`: weights where there are some, zeros elsewhere."""
    weights = list(_read_weights(plan, problems))
    if problems.general:
        return
    for site in plan.layout.sites:
        _clear_unless_filled(plan, pages, site)
    for begin in range(0, len(weights), _MODULES_A_TURN):
        with _LAYING_OUT:
            for module, a, b in weights[begin : begin + _MODULES_A_TURN]:
                _fill_module(plan, pages, module, a, b)
    if _is_finite(pages):  # one pass over all; who is to blame is looked for where there is somebody
        return
    for module, _, _ in weights:
        for part, view in zip((module.a, module.b), _places(plan, pages, module), strict=True):
            if part is not None and not _is_finite(view):
                problems.add_tensor(part, plan.not_finite)


def _clear_unless_filled(plan: AdapterPlan, pages: torch.Tensor, site: str) -> None:
    """Zero a site's share of the pages, unless its modules will write all of it."""
    ranks = [module.rank for module in plan.modules.values() if module.target.site == site]
    slices = plan.layout.sites[site].out_slices
    if len(ranks) == len(slices) and all(rank == PAGE_RANK * plan.num_pages for rank in ranks):
        return
    plan.layout.a_view(pages, site).zero_()
    plan.layout.b_view(pages, site).zero_()


def _places(plan: AdapterPlan, pages: torch.Tensor, module: Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a module's A [pages, 8, in] and B [pages, 8, out] go."""
    target, slices = module.target, plan.layout.sites[module.target.site].out_slices
    offset = sum(slices[: target.slice])
    used = pages[: pages_for_rank(module.rank)]
    return (
        plan.layout.a_view(used, target.site)[:, target.slice],
        plan.layout.b_view(used, target.site)[:, :, offset : offset + target.out_features],
    )


def _fill_module(
    plan: AdapterPlan, pages: torch.Tensor, module: Module, a: torch.Tensor, b: torch.Tensor
) -> None:
    """Put one module's A and B in their place."""
    a_pages, b_pages = _places(plan, pages, module)
    whole, rest = divmod(module.rank, PAGE_RANK)
    if whole:
        last = whole * PAGE_RANK
        a_pages[:whole] = a[:last].view(whole, PAGE_RANK, -1)
        _scaled(
            b[:, :last].unflatten(1, (whole, PAGE_RANK)).permute(1, 2, 0), module.scaling, b_pages[:whole]
        )
    if rest:
        a_pages[whole, :rest] = a[-rest:]
        _scaled(b[:, -rest:].t(), module.scaling, b_pages[whole, :rest])


def _scaled(b: torch.Tensor, scaling: float, out: torch.Tensor) -> None:
    """out = b * scaling, multiplied in float32 and rounded once, as torch does for all narrower types by itself."""
    if b.dtype == out.dtype:
        torch.mul(b, scaling, out=out)
    else:
        out.copy_(b.to(torch.float32).mul_(scaling))


def _read_weights(
    plan: AdapterPlan, problems: Problems
) -> Iterator[tuple[Module, torch.Tensor, torch.Tensor]]:
    """A and B of every module."""
    loaded: dict[str, dict[str, torch.Tensor]] = {}
    for name in plan.stamps:
        try:
            loaded[name] = read_tensors(plan.folder / name)
        except WeightFileError as error:
            problems.add_unreadable(name, error)
            return
        if plan.note_if_changed(name, problems):
            return
    for module in plan.modules.values():
        a, b = module.a, module.b
        if a is None or b is None:
            continue
        a_data, b_data = loaded[a.file].get(a.name), loaded[b.file].get(b.name)
        if a_data is None or b_data is None or a_data.shape != a.shape or b_data.shape != b.shape:
            problems.add(f"{a.file} changed while it was read; try again")
            return
        yield module, a_data, b_data


def _is_finite(view: torch.Tensor) -> bool:
    low, high = torch.aminmax(view)  # NaN propagates to both
    return math.isfinite(low.item()) and math.isfinite(high.item())
