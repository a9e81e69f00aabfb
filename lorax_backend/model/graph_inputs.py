"""What recorded steps read: memory of fixed address on the device, and copies of it on the host, filled in turn.

Everything a step brings to its graph goes in one copy. What stands between the arrival of a step and its graph counts
in full for the first token of an idle engine, and runs there for the first time in a while, which makes every call
several times slower than in a loop: so all views are made once, and what a step does not fill is copied from a blank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorax_kernels import WorkBuffer

_COPIES = 4  # host copies in turn: more than the steps that can be in flight


@dataclass(frozen=True, slots=True)
class Section:
    """Integers of one meaning: int32, or int64 if `wide`. `blank` is what they are, broadcast to `shape`, where a step
    has nothing to say."""

    shape: tuple[int, ...]
    blank: int | tuple[int, ...] = 0
    wide: bool = False

    @property
    def length(self) -> int:
        """int32 numbers that it takes."""
        return math.prod(self.shape) * (1 + self.wide)

    def of(self, memory: torch.Tensor, begin: int) -> torch.Tensor:
        """The section that begins there in int32 memory, in its own shape and dtype."""
        part = memory[begin : begin + self.length]
        return (part.view(torch.int64) if self.wide else part).view(self.shape)


@dataclass(frozen=True, slots=True)
class HostCopy:
    """One of the host's copies, for one padded size.

    Attributes:
        parts: the sections by name, and "work", the adapters' work list.
        tables: int32 [rows, max_blocks], the last section.
    """

    size: int
    memory: torch.Tensor
    parts: dict[str, npt.NDArray[Any]]
    tables: npt.NDArray[np.int32]
    filled: npt.NDArray[np.int32]
    """What is made blank for every step: all but the work list and the tables."""


class _Layout:
    """Where the sections of one padded size begin: the work list first and the tables last, as a step copies neither a
    work list that it does not have nor more rows of the tables than it has sequences."""

    def __init__(self, sections: Mapping[str, Section], work: int) -> None:
        self.sections = {"work": Section((work,)), **sections}
        # Each section begins on 16 bytes, for which the kernels have been compiled already.
        ends = np.cumsum([-(-section.length // 4) * 4 for section in self.sections.values()]).tolist()
        self.begins: dict[str, int] = dict(zip(self.sections, [0, *ends[:-1]], strict=True))
        self.length: int = ends[-1]
        self.work_end: int = ends[0]
        self.tables_begin = self.begins["tables"]
        self.max_blocks = self.sections["tables"].shape[1]
        memory = torch.zeros(self.tables_begin, dtype=torch.int32)
        for name in sections:
            if name != "tables":
                self.of(memory, name).numpy()[...] = self.sections[name].blank
        self.blank: npt.NDArray[np.int32] = memory[self.work_end : self.tables_begin].numpy().copy()

    def of(self, memory: torch.Tensor, name: str) -> torch.Tensor:
        return self.sections[name].of(memory, self.begins[name])

    def host(self, memory: torch.Tensor, size: int) -> HostCopy:
        parts = {name: self.of(memory, name).numpy() for name in self.sections}
        filled = memory[self.work_end : self.tables_begin].numpy()
        return HostCopy(size, memory, parts, parts["tables"], filled)


class GraphInputs:
    """The inputs of the graphs of all padded sizes, one int32 tensor on the device that they share.

    Args:
        sections: by padded size; the last is "tables", block tables int32 [rows, max_blocks].
        max_pages: pages of the largest adapter admitted.

    Attributes:
        work: by padded size, where the adapters' work lists go. `LoraBatch.build` fills the one of the copy that
            `next_host` gave last.
    """

    def __init__(
        self, sections: Mapping[int, Mapping[str, Section]], max_pages: int, device: torch.device
    ) -> None:
        self._layouts = {
            size: _Layout(one, WorkBuffer.capacity_for(size, max_pages).size)
            for size, one in sections.items()
        }
        length = max(layout.length for layout in self._layouts.values())
        self._data = torch.zeros(length, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        memories = [torch.zeros(length, dtype=torch.int32, pin_memory=pinned) for _ in range(_COPIES)]
        self._hosts = {
            size: [layout.host(memory, size) for memory in memories] for size, layout in self._layouts.items()
        }
        self._turn = 0
        self.work = {
            size: WorkBuffer(size, max_pages, device, data=self.part("work", size)) for size in sections
        }

    def part(self, name: str, size: int) -> torch.Tensor:
        """A section on the device, for one padded size."""
        return self._layouts[size].of(self._data, name)

    def next_host(self, size: int) -> HostCopy:
        """A host copy to fill: blank, but for the tables and the work list, which hold anything."""
        self._turn = (self._turn + 1) % _COPIES
        host = self._hosts[size][self._turn]
        host.filled[:] = self._layouts[size].blank
        self.work[size].place(host.parts["work"])
        return host

    def send(self, host: HostCopy, rows: int, with_work: bool) -> None:
        """Copy to the device what a step has: the first `rows` rows of the tables, and the work list or none."""
        layout = self._layouts[host.size]
        begin = 0 if with_work else layout.work_end
        end = layout.tables_begin + rows * layout.max_blocks
        self._data[begin:end].copy_(host.memory[begin:end], non_blocking=True)
