"""Adapters' weights brought into pages by the device: which tensor of which file goes where."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from typing import TYPE_CHECKING

import torch

from lorax_backend.adapters.page_writer import PageProgram, PageWriter
from lorax_backend.adapters.weight_files import PICKLE_NAME
from lorax_backend.adapters.weight_reader import Extent, StoredTensor, read_extents
from lorax_kernels.page_table import PageTask

if TYPE_CHECKING:
    from lorax_backend.adapters.adapter_plan import AdapterPlan, Problems


@dataclass(frozen=True, slots=True)
class FileProgram:
    """What is to be done with a file, and the tensors it has, in the order of the program's tasks; None for tasks that
    no tensor belongs to. `program` is None if the processor has to do it."""

    program: PageProgram | None
    tensors: tuple[StoredTensor | None, ...] = ()


def write_pages(plan: AdapterPlan, writer: PageWriter, pages: torch.Tensor, problems: Problems) -> bool:
    """Write every element of `pages` that layers use: weights where there are some, zeros elsewhere. False, with
    nothing done, if these files or pages are not for the writer."""
    if not writer.reaches(pages) or any(name == PICKLE_NAME for name in plan.stamps):
        return False
    with contextlib.ExitStack() as stack:
        parts: list[tuple[str, FileIO, FileProgram, PageProgram]] = []
        for name in plan.stamps:
            try:
                opened = stack.enter_context((plan.folder / name).open("rb", buffering=0))
                known = _program(plan, writer, name, opened)
            except (OSError, ValueError, TypeError, LookupError) as error:
                problems.add_unreadable(name, error)
                return True
            if known.program is None:
                return False
            parts.append((name, opened, known, known.program))
        for name, opened, known, program in parts:
            try:
                bad = writer.write(opened, program, pages)
            except (OSError, ValueError) as error:
                problems.add_unreadable(name, error)
                return True
            for tensor in (known.tensors[index] for index in bad):
                if tensor is not None:
                    problems.add_tensor(tensor, plan.not_finite)
            plan.note_if_changed(name, problems)
    return True


def _program(plan: AdapterPlan, writer: PageWriter, name: str, opened: FileIO) -> FileProgram:
    """That of one file, worked out once for all adapters of one structure: by a file that is still the one of which
    the structure was told.

    Raises:
        OSError, LookupError, ValueError, TypeError: the file cannot be read, or is not the one that was looked at.
    """
    found = plan.structure.programs.get(name)
    if found is None:
        tensors, tasks, dtypes = _tasks(plan, name, read_extents(opened))
        if name == next(iter(plan.stamps)):
            empty = _empty_tasks(plan)
            tensors, tasks = [*(None for _ in empty), *tensors], empty + tasks
        takes = len(dtypes) < 2 and writer.takes(dtypes, tasks)
        dtype = next(iter(dtypes), torch.float32)  # a file may have nothing for us
        program = writer.prepare(dtype, tasks, plan.num_pages) if takes else None
        found = FileProgram(program, tuple(tensors))
        if plan.is_unchanged(name):
            plan.structure.programs[name] = found
    return found


def _tasks(
    plan: AdapterPlan, name: str, extents: Mapping[str, Extent]
) -> tuple[list[StoredTensor | None], list[PageTask], set[torch.dtype]]:
    """The tensors of a file, what is to be done with each, and their types; in the order in which they lie there.

    Raises:
        LookupError, ValueError: they are not those that were looked at.
    """
    found = []
    for module in plan.modules.values():
        target, site = module.target, plan.layout.sites[module.target.site]
        for tensor in (module.a, module.b):
            if tensor is None or tensor.file != name:
                continue
            extent = extents[tensor.name]
            if extent.shape != tensor.shape:
                raise ValueError(f"{tensor.name} has another shape")
            if tensor is module.a:
                where = plan.layout.a_offset(target.site, target.slice)
                task = PageTask(extent.begin, where, module.rank, target.in_features, target.in_features)
            else:
                where = plan.layout.b_offset(target.site, target.slice)
                task = PageTask(
                    extent.begin,
                    where,
                    module.rank,
                    target.out_features,
                    site.out_features,
                    True,
                    module.scaling,
                )
            found.append((extent.begin, tensor, task, extent.dtype))
    found.sort(key=lambda entry: entry[0])
    return [entry[1] for entry in found], [entry[2] for entry in found], {entry[3] for entry in found}


def _empty_tasks(plan: AdapterPlan) -> list[PageTask]:
    """Zeros for every place that no module of the adapter has."""
    taken = {(module.target.site, module.target.slice) for module in plan.modules.values()}
    tasks = []
    for name, site in plan.layout.sites.items():
        for index, width in enumerate(site.out_slices):
            if (name, index) in taken:
                continue
            a, b = plan.layout.a_offset(name, index), plan.layout.b_offset(name, index)
            tasks.append(PageTask(0, a, 0, site.in_features, site.in_features))
            tasks.append(PageTask(0, b, 0, width, site.out_features))
    return tasks
