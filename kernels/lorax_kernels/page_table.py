"""What has to be done to bring an adapter's tensors into pages, as a table for a kernel (see page_kernels)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

FIELDS = 8  # of a task
COLUMNS = 512  # of a tile
VECTOR = 8  # elements of two bytes in one access


@dataclass(frozen=True, slots=True)
class PageTask:
    """One tensor's place in the pages.

    Attributes:
        source: bytes from the file's begin to the tensor; its layout there is [rank, width], or [width, rank] if
            `transposed`.
        target: elements from a page's begin to the tensor's first row.
        rank: true rank; the rows from there to the last page's end become zero. 0: all of them do, and there is no
            source.
        width: columns of each row.
        row_stride: elements between the rows of a page.
        scale: what every value is multiplied with, in float32.
    """

    source: int
    target: int
    rank: int
    width: int
    row_stride: int
    transposed: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class PageTable:
    """Tasks as the kernel reads them, on its device.

    Attributes:
        tasks: int64 [tasks, 8], the fields of each.
        scales: float32 [tasks].
        tiles: int32 [tiles, 3]: task, page and block of columns of each piece of work, in the order of the tasks.
        first_tile: for each task the number of its first tile, and at the end the number of tiles; on the host.
        aligned: rows begin at multiples of eight elements in the pages and are as wide.
    """

    tasks: torch.Tensor
    scales: torch.Tensor
    tiles: torch.Tensor
    first_tile: list[int]
    aligned: bool


def make_page_table(tasks: Sequence[PageTask], num_pages: int, device: torch.device) -> PageTable:
    """The table of these tasks for pages [num_pages, page_size]."""
    rows = [(t.source, t.target, t.rank, t.width, t.row_stride, t.transposed, t.rank or 1, 0) for t in tasks]
    blocks = np.array([-(-task.width // COLUMNS) for task in tasks], dtype=np.int64)
    ends = np.cumsum(blocks * num_pages)
    first = np.concatenate(([0], ends))
    owner = np.repeat(np.arange(len(tasks)), blocks * num_pages)
    index = np.arange(int(first[-1])) - first[owner]
    # The pages of one block of columns follow each other: those of B read the same lines.
    tiles = np.stack((owner, index % num_pages, index // num_pages), axis=1).astype(np.int32)
    return PageTable(
        tasks=torch.tensor(rows, dtype=torch.int64).reshape(-1, FIELDS).to(device),
        scales=torch.tensor([task.scale for task in tasks], dtype=torch.float32).to(device),
        tiles=torch.from_numpy(tiles).to(device),
        first_tile=first.tolist(),
        aligned=not any((t.target | t.width | t.row_stride) % VECTOR for t in tasks),
    )
