"""An adapter whose files have been checked, and how its weights come into pages.

On CUDA the files' bytes go to the device, where one kernel puts them in their place (see page_writer). Elsewhere, and
for files in forms that the kernel does not take, the processor does.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lorax_backend.adapters.host_adapter import HostAdapter
from lorax_backend.adapters.page_writer import PageWriter
from lorax_backend.adapters.weight_files import PICKLE_NAME
from lorax_backend.adapters.weight_reader import (
    Extent,
    StoredTensor,
    WeightFileError,
    read_extents,
    read_tensors,
)
from lorax_backend.errors import AdapterIncompatibleError, AdapterTooLargeError
from lorax_backend.model.lora import LoraTarget
from lorax_kernels.layout import PAGE_RANK, PageLayout, pages_for_rank
from lorax_kernels.page_table import PageTask

_MAX_LISTED = 3  # tensors with the same problem named before the rest is only counted
# One adapter is laid out at a time, turn by turn. Every call of torch gives the interpreter away and wants it back:
# beside one thread that does so the step's thread hardly notices, beside several it waits for tens of milliseconds.
_LAYING_OUT = threading.Lock()
_MODULES_A_TURN = 16

Stamp = tuple[int, int, int, int]  # inode, bytes, times of modification and of change in ns


@dataclass(slots=True)
class Module:
    """A and B of one layer of the base, as far as they were found. `raw` is its name in the adapter's own words."""

    path: str
    raw: str
    target: LoraTarget
    a: StoredTensor | None = None
    b: StoredTensor | None = None
    rank: int = 0
    scaling: float = 0.0


@dataclass(slots=True)
class Problems:
    """What is wrong with an adapter. A mistake made in 200 tensors is told once, with the first of their names."""

    general: list[str] = field(default_factory=list)
    tensors: dict[str, list[str]] = field(default_factory=dict)
    too_large: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.general.append(text)

    def add_tensor(self, tensor: StoredTensor, text: str) -> None:
        self.tensors.setdefault(text, []).append(tensor.name)

    def raise_if_any(self, folder: Path) -> None:
        kind = AdapterIncompatibleError if self.general or self.tensors else AdapterTooLargeError
        texts = self.too_large + self.general
        for text, names in self.tensors.items():
            more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
            texts.append(f"{', '.join(names[:_MAX_LISTED])}{more}: {text}")
        if texts:
            raise kind(f"adapter {folder.name} cannot be used with this base model: " + "; ".join(texts))


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """An adapter checked by its configuration and the headers of its files, not read yet.

    `num_pages` and `nbytes` are what the loaded adapter will take; `stamps` tell whether a file is still the same.
    `writer` writes the pages where it can.
    """

    folder: Path
    rank: int
    layout: PageLayout
    dtype: torch.dtype
    modules: Mapping[str, Module]
    stamps: Mapping[Path, Stamp | None]
    writer: PageWriter | None = None

    @property
    def num_pages(self) -> int:
        return pages_for_rank(self.rank)

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.layout.page_size * self.dtype.itemsize

    def load(self, pages: torch.Tensor | None = None) -> HostAdapter:
        """Read the weights into `pages` [num_pages, layout.page_size], or into new ones.

        Raises:
            AdapterIncompatibleError: NaN or infinity, or files that changed since they were inspected.
        """
        problems = Problems()
        if pages is None:
            pages = torch.empty(self.num_pages, self.layout.page_size, dtype=self.dtype)
        if self.writer is None or not _write_pages(self, self.writer, pages, problems):
            _fill_pages(self, pages, problems)
        problems.raise_if_any(self.folder)
        sites = frozenset(module.target.site for module in self.modules.values())
        return HostAdapter(pages=pages, rank=self.rank, sites=sites, modules=tuple(sorted(self.modules)))


def _write_pages(plan: AdapterPlan, writer: PageWriter, pages: torch.Tensor, problems: Problems) -> bool:
    """As `_fill_pages`, by the device; False, with nothing done, if these files or pages are not for it."""
    if not writer.reaches(pages) or any(file.name == PICKLE_NAME for file in plan.stamps):
        return False
    with contextlib.ExitStack() as stack:
        parts = []
        for file in plan.stamps:
            try:
                opened = stack.enter_context(file.open("rb", buffering=0))
                tensors, tasks, dtypes = _tasks(plan, file, read_extents(opened))
            except (OSError, ValueError, TypeError, LookupError) as error:
                problems.add(_changed(file, error))
                return True
            if len(dtypes) > 1 or not writer.takes(dtypes, tasks):
                return False
            parts += [(file, opened, tensors, tasks, dtypes.pop())] if tasks else []
        empty = _empty_tasks(plan)
        for file, opened, tensors, tasks, dtype in parts:
            try:
                bad = writer.write(opened, dtype, empty + tasks, pages)
            except (OSError, ValueError) as error:
                problems.add(_changed(file, error))
                return True
            for index in bad:
                problems.add_tensor(tensors[index - len(empty)], _not_finite(plan))
            empty = []
            if file_stamp(file) not in (plan.stamps[file], None):
                problems.add(f"{file.name} changed while it was read; try again")
    return True


def _tasks(
    plan: AdapterPlan, file: Path, extents: Mapping[str, Extent]
) -> tuple[list[StoredTensor], list[PageTask], set[torch.dtype]]:
    """The tensors of a file, what is to be done with each, and their types; in the order in which they lie there.

    Raises:
        LookupError, ValueError: they are not those that were looked at.
    """
    found = []
    for module in plan.modules.values():
        target, layout = module.target, plan.layout
        slices = layout.sites[target.site].out_slices
        for tensor in (module.a, module.b):
            if tensor is None or tensor.file != file:
                continue
            extent = extents[tensor.name]
            if extent.shape != tensor.shape:
                raise ValueError(f"{tensor.name} has another shape")
            if tensor is module.a:
                where = layout.a_offset(target.site) + target.slice * PAGE_RANK * target.in_features
                task = PageTask(extent.begin, where, module.rank, target.in_features, target.in_features)
            else:
                where = layout.b_offset(target.site) + sum(slices[: target.slice])
                task = PageTask(
                    extent.begin, where, module.rank, target.out_features, sum(slices), True, module.scaling
                )
            found.append((extent.begin, tensor, task, extent.dtype))
    found.sort(key=lambda entry: entry[0])
    return [f[1] for f in found], [f[2] for f in found], {f[3] for f in found}


def _empty_tasks(plan: AdapterPlan) -> list[PageTask]:
    """Zeros for every place that no module of the adapter has."""
    taken = {(module.target.site, module.target.slice) for module in plan.modules.values()}
    tasks = []
    for name, site in plan.layout.sites.items():
        for index, width in enumerate(site.out_slices):
            if (name, index) in taken:
                continue
            a = plan.layout.a_offset(name) + index * PAGE_RANK * site.in_features
            b = plan.layout.b_offset(name) + sum(site.out_slices[:index])
            tasks.append(PageTask(0, a, 0, site.in_features, site.in_features))
            tasks.append(PageTask(0, b, 0, width, site.out_features))
    return tasks


def _changed(file: Path, error: Exception) -> str:
    return f"{file.name} changed or vanished while it was read: {error}"


def _not_finite(plan: AdapterPlan) -> str:
    return f"holds NaN or infinity as {str(plan.dtype).removeprefix('torch.')}"


def _fill_pages(plan: AdapterPlan, pages: torch.Tensor, problems: Problems) -> None:
    """Write every element of `pages`: weights where there are some, zeros elsewhere."""
    weights = list(_read_weights(plan.modules, plan.stamps, problems))
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
                problems.add_tensor(part, _not_finite(plan))


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
    modules: Mapping[str, Module], stamps: Mapping[Path, Stamp | None], problems: Problems
) -> Iterator[tuple[Module, torch.Tensor, torch.Tensor]]:
    """A and B of every module."""
    pairs = [(module, module.a, module.b) for module in modules.values()]
    files = {tensor.file for _, a, b in pairs for tensor in (a, b) if tensor is not None}
    loaded: dict[Path, dict[str, torch.Tensor]] = {}
    for file in files:
        try:
            loaded[file] = read_tensors(file)
        except WeightFileError as error:
            problems.add(_changed(file, error))
            return
        # One that is gone was read in full all the same.
        if file_stamp(file) not in (stamps[file], None):
            problems.add(f"{file.name} changed while it was read; try again")
            return
    for module, a, b in pairs:
        if a is None or b is None:
            continue
        a_data, b_data = loaded[a.file].get(a.name), loaded[b.file].get(b.name)
        if a_data is None or b_data is None or a_data.shape != a.shape or b_data.shape != b.shape:
            problems.add(f"{a.file.name} changed while it was read; try again")
            return
        yield module, a_data, b_data


def file_stamp(file: Path) -> Stamp | None:
    """Changes with the file's content; None if it is not there."""
    try:
        info = file.stat()
    except OSError:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _is_finite(view: torch.Tensor) -> bool:
    low, high = torch.aminmax(view)  # NaN propagates to both
    return math.isfinite(low.item()) and math.isfinite(high.item())
