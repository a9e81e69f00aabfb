"""Adapters' files brought into pages of host memory by way of the device.

The bytes of a file go through page-locked buffers to the device as they are; a kernel there puts every tensor in its
place and writes the pages into the host's memory over the bus. Reading, copying and writing of an adapter's parts
overlap, and the interpreter is needed for a few calls a part: threads that lay out hundreds of tensors one by one would
keep the step's thread from running.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO

import torch

from lorax_backend.adapters.weight_reader import read_into
from lorax_kernels.layout import PageLayout
from lorax_kernels.page_table import PageTable, PageTask, make_page_table

_BUFFER_BYTES = 16 << 20
_NUM_BUFFERS = 8
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Room for a part of a file: `host` is filled first, `free` marks the end of the work with `device`."""

    host: torch.Tensor
    device: torch.Tensor
    free: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class PageProgram:
    """What `PageWriter.write` does with a file of tensors of type `dtype`: the table, and by which parts of the file
    (see `_parts`)."""

    dtype: torch.dtype
    table: PageTable
    parts: tuple[tuple[int, int, int, int], ...]


class PageWriter:
    """Any thread may call `write`, several at a time; each waits for its own adapter only.

    Takes 128 MiB on the device and the same of page-locked memory on the host, all at once when it is made.
    """

    def __init__(
        self, device: torch.device, buffer_bytes: int = _BUFFER_BYTES, num_buffers: int = _NUM_BUFFERS
    ):
        """`buffer_bytes` is the size of the largest tensor it takes."""
        from lorax_kernels.page_kernels import write_pages  # which needs Triton

        self._launch = write_pages
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        on_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None
        for _ in range(num_buffers):
            host = torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=on_cuda)
            there = torch.empty(buffer_bytes, dtype=torch.uint8, device=device) if on_cuda else host
            self._buffers.put(_Buffer(host, there, self._new_event()))

    def warm_up(self, layout: PageLayout, pages: torch.Tensor) -> None:
        """Compile what `write` will launch; `pages` [1, page_size], of the adapters' dtype, are overwritten."""
        site = next(iter(layout.sites.values()))
        task = PageTask(0, 0, 1, site.in_features, site.in_features)
        with self._on_stream(), self._buffer() as buffer:
            buffer.device.zero_()
            table, bad = make_page_table([task], 1, self._device), self._flags(1)
            for dtype in _DTYPES:
                self._launch(buffer.device.view(dtype), 0, table, (0, 1), pages, bad)
        self._wait()

    def reaches(self, pages: torch.Tensor) -> bool:
        """True if the device can write to these pages."""
        return self._stream is None or pages.is_cuda or pages.is_pinned()

    def takes(self, dtypes: Collection[torch.dtype], tasks: Sequence[PageTask]) -> bool:
        """True if `write` can do these tasks of a file: tensors of one common type, none larger than a buffer, and
        all of them a whole number of elements apart."""
        if not tasks:
            return True
        item = max(dtype.itemsize for dtype in dtypes)
        return (
            set(dtypes) <= set(_DTYPES)
            and max(task.rank * task.width for task in tasks) * item <= self._buffer_bytes
            and len({task.source % item for task in tasks}) == 1
        )

    def prepare(self, dtype: torch.dtype, tasks: Sequence[PageTask], num_pages: int) -> PageProgram:
        """How to write tensors of type `dtype` of a file into pages [num_pages, page_size], for tasks that it takes:
        those without a source first, the others in the order of the file."""
        with self._on_stream():
            table = make_page_table(tasks, num_pages, self._device)
        return PageProgram(dtype, table, tuple(_parts(tasks, dtype.itemsize, self._buffer_bytes)))

    def write(self, opened: FileIO, program: PageProgram, pages: torch.Tensor) -> list[int]:
        """Write the tensors of an open file into `pages` [num_pages, page_size]; the numbers of the tasks that hold NaN
        or infinity.

        Raises:
            OSError, ValueError: the file cannot be read or ends too soon. Nothing writes to the pages any more then.
        """
        with self._on_stream():
            bad = self._flags(len(program.table.first_tile) - 1)
            try:
                for first, last, begin, end in program.parts:
                    with self._buffer() as buffer:
                        size = end - begin
                        read_into(opened, begin, buffer.host[:size])
                        if buffer.device is not buffer.host:
                            buffer.device[:size].copy_(buffer.host[:size], non_blocking=True)
                        raw = buffer.device.view(program.dtype)
                        self._launch(raw, begin, program.table, (first, last), pages, bad)
                return self._read(bad)
            except BaseException:
                self._wait()  # the pages must not be written to any more
                raise

    def _flags(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self._device)

    def _read(self, flags: torch.Tensor) -> list[int]:
        """The numbers of those that are set."""
        found = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=self._stream is not None)
        found.copy_(flags, non_blocking=True)
        self._wait()
        return found.nonzero().flatten().tolist()

    @contextlib.contextmanager
    def _buffer(self) -> Iterator[_Buffer]:
        buffer = self._buffers.get()
        try:
            if buffer.free is not None:
                buffer.free.synchronize()
            yield buffer
            if buffer.free is not None:
                buffer.free.record()
        finally:
            self._buffers.put(buffer)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
        else:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                yield

    def _wait(self) -> None:
        """For all work on the stream up to now, without using a processor meanwhile."""
        event = self._new_event()
        if event is not None:
            event.record(self._stream)
            event.synchronize()

    def _new_event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event(blocking=True) if self._stream is not None else None


def _parts(tasks: Sequence[PageTask], item: int, limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs of tasks whose sources lie in at most `limit` bytes: numbers of the first and the one after the last, and
    the bytes of the file [begin, end)."""
    first, begin, end = 0, -1, -1
    for index, task in enumerate(tasks):
        if not task.rank:
            continue
        after = task.source + task.rank * task.width * item
        if begin >= 0 and after - begin > limit:
            yield first, index, begin, end
            first, begin = index, -1
        if begin < 0:
            begin, end = task.source, after
        end = max(end, after)
    yield first, len(tasks), max(begin, 0), max(end, 0)
