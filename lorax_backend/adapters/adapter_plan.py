"""An adapter whose files have been checked, and how its weights come into pages.

On CUDA the files' bytes go to the device, where one kernel puts them in their place (see device_filling). Elsewhere,
and for files in forms that the kernel does not take, the processor does (see page_filling).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lorax_backend.adapters.device_filling import FileProgram, write_pages
from lorax_backend.adapters.host_adapter import HostAdapter
from lorax_backend.adapters.page_filling import fill_pages
from lorax_backend.adapters.page_writer import PageWriter
from lorax_backend.adapters.weight_reader import StoredTensor
from lorax_backend.errors import AdapterIncompatibleError, AdapterTooLargeError
from lorax_backend.model.lora import LoraTarget
from lorax_kernels.layout import PageLayout, pages_for_rank

_MAX_LISTED = 3  # tensors with the same problem named before the rest is only counted

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

    def add_unreadable(self, name: str, error: Exception) -> None:
        self.add(f"{name} changed or vanished while it was read: {error}")

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
class Structure:
    """All of an adapter but its values: adapters that were trained alike have the same one.

    Attributes:
        rank: the largest of any module.
        modules: by their paths in the base model.
        programs: how a `PageWriter` writes each file's tensors, once that has been worked out.
    """

    rank: int
    modules: Mapping[str, Module]
    programs: dict[str, FileProgram] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """An adapter checked by its configuration and the headers of its files, not read yet.

    `num_pages` and `nbytes` are what the loaded adapter will take; `stamps` tell by a file's name whether it is still
    the same. `writer` writes the pages where it can.
    """

    folder: Path
    structure: Structure
    layout: PageLayout
    dtype: torch.dtype
    stamps: Mapping[str, Stamp | None]
    writer: PageWriter | None = None

    @property
    def rank(self) -> int:
        return self.structure.rank

    @property
    def modules(self) -> Mapping[str, Module]:
        return self.structure.modules

    @property
    def num_pages(self) -> int:
        return pages_for_rank(self.rank)

    @property
    def not_finite(self) -> str:
        """What is wrong with a tensor that holds no numbers."""
        return f"holds NaN or infinity as {str(self.dtype).removeprefix('torch.')}"

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
        if self.writer is None or not write_pages(self, self.writer, pages, problems):
            fill_pages(self, pages, problems)
        problems.raise_if_any(self.folder)
        sites = frozenset(module.target.site for module in self.modules.values())
        return HostAdapter(pages=pages, rank=self.rank, sites=sites, modules=tuple(sorted(self.modules)))

    def is_unchanged(self, name: str) -> bool:
        """True if a file is there and still the one that was inspected."""
        return file_stamp(self.folder / name) == self.stamps[name] is not None

    def note_if_changed(self, name: str, problems: Problems) -> bool:
        """True if a file that has been read is not the one that was inspected. One that is gone was read in full all
        the same."""
        changed = file_stamp(self.folder / name) not in (self.stamps[name], None)
        if changed:
            problems.add(f"{name} changed while it was read; try again")
        return changed


def file_stamp(file: Path) -> Stamp | None:
    """Changes with the file's content; None if it is not there."""
    try:
        info = file.stat()
    except OSError:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
