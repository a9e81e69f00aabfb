"""Adapters' pages written on the device from the bytes of their files: gathered, scaled, rounded and checked at once.

A file holds A as [rank, in] and B as [out, rank], module by module; pages (see layout) hold eight ranks of every module
each, B transposed with its scaling folded in. One launch does that for as many tensors as lie in a part of a file, so
that the processor issues a handful of calls for an adapter instead of several for each of its hundreds of tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorax_kernels.layout import PAGE_RANK
from lorax_kernels.page_table import COLUMNS, FIELDS, VECTOR, PageTable

_FIELDS = tl.constexpr(FIELDS)
_RANK = tl.constexpr(PAGE_RANK)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
# Enough to keep the bus to the host's memory busy, and few enough that a step running beside hardly notices.
_PROGRAMS = 32


def write_pages(
    raw: torch.Tensor,
    begin: int,
    table: PageTable,
    tasks: tuple[int, int],
    pages: torch.Tensor,
    bad: torch.Tensor,
) -> None:
    """Write some tasks of a table: those from the first to before the second number of `tasks`.

    Args:
        raw: [elements] of the file's dtype on the device, what the file holds from byte `begin` on; every source of
            these tasks lies in it, a whole number of elements from its begin.
        pages: [num_pages, page_size] of the adapter's dtype, on the device or in page-locked memory of the host.
        bad: int32 [tasks of the table], made 1 for those that hold NaN or infinity.
    """
    tiles = table.first_tile[tasks[0]], table.first_tile[tasks[1]]
    if tiles[0] == tiles[1]:
        return
    aligned = table.aligned and pages.stride(0) % VECTOR == 0 and pages.storage_offset() % VECTOR == 0
    _write_pages_kernel[(min(_PROGRAMS, tiles[1] - tiles[0]),)](
        raw,
        table.tasks,
        table.scales,
        table.tiles,
        pages,
        bad,
        begin,
        *tiles,
        pages.stride(0),
        ITEM=raw.element_size(),
        COLUMNS=COLUMNS,
        ALIGN=VECTOR if aligned else 1,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["begin", "first", "last"])
def _write_pages_kernel(
    raw,
    tasks,
    scales,
    tiles,
    pages,
    bad,
    begin,
    first,
    last,
    stride_page,
    ITEM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row = tl.arange(0, _RANK)
    for tile in range(first + tl.program_id(0), last, tl.num_programs(0)):
        task = tl.load(tiles + 3 * tile)
        page = tl.load(tiles + 3 * tile + 1).to(tl.int64)
        column = tl.load(tiles + 3 * tile + 2) * COLUMNS + tl.arange(0, COLUMNS)
        fields = tasks + task.to(tl.int64) * _FIELDS
        source = raw + (tl.load(fields) - begin) // ITEM
        rank, width = tl.load(fields + 2), tl.multiple_of(tl.load(fields + 3), ALIGN)
        scale = tl.load(scales + task)
        ranks = page * _RANK + row
        in_width, in_rank = column < width, ranks < rank
        if tl.load(fields + 5) != 0:
            # Read as it lies, eight neighbours a thread, and turned in registers.
            lying = source + column.to(tl.int64)[:, None] * rank + ranks[None, :]
            values = tl.trans(tl.load(lying, mask=in_width[:, None] & in_rank[None, :], other=0.0))
        else:
            standing = source + ranks[:, None] * width + column[None, :]
            values = tl.load(standing, mask=in_rank[:, None] & in_width[None, :], other=0.0)
        rounded = (values.to(tl.float32) * scale).to(pages.dtype.element_ty)
        # No comparison holds for NaN, and this one for no infinity.
        finite = tl.abs(rounded.to(tl.float32)) <= _LARGEST
        wrong = tl.max(tl.max(tl.where(finite, 0, 1), axis=1), axis=0)
        if wrong > 0:
            tl.store(bad + task, 1)
        begin_of_rows, row_stride = tl.load(fields + 1), tl.load(fields + 4)
        target = tl.multiple_of(begin_of_rows, ALIGN) + row[:, None] * tl.multiple_of(row_stride, ALIGN)
        tl.store(pages + page * stride_page + target + column[None, :], rounded, mask=in_width[None, :])
