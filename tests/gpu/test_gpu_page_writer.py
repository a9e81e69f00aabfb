"""Adapters' pages written by the device into page-locked memory, against those the processor writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import page_cases as cases
import pytest
import torch
from adapter_files import SMOLLM2, TINY, make_base, write_adapter

from lorax_backend.adapters.host_memory import HostMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda", 0)
CHECKS = [
    cases.check_dtypes,
    cases.check_shards,
    cases.check_not_finite,
    cases.check_left_alone,
    cases.check_changed,
    cases.check_replaced,
    cases.check_threads,
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("buffers", [(cases.BUFFER, 2), (8 << 10, 1)], ids=["one part", "parts"])
def test_pages_are_those_of_the_processor(
    check: Callable[..., Any], dtype: torch.dtype, buffers: tuple[int, int], tmp_path: Path
) -> None:
    base = make_base(tmp_path, TINY)
    writer = cases.CountingWriter(DEVICE, *buffers)
    memory = HostMemory(base.layout, 32 * base.layout.page_size * dtype.itemsize, dtype, pinned=True)
    assert memory.pinned
    taken = iter(range(0, 32, 2))
    try:
        writer.warm_up(base.layout, memory.pages(0, 1))
        check(tmp_path / "adapter", base, dtype, writer, lambda count: memory.pages(next(taken), 2)[:count])
    finally:
        memory.close()


def test_memory_that_is_not_page_locked_is_left_to_the_processor(tmp_path: Path) -> None:
    base = make_base(tmp_path, TINY)
    writer = cases.CountingWriter(DEVICE, cases.BUFFER, 2)
    write_adapter(tmp_path / "a", cases.mixed_config(base), cases.mixed_tensors(base, torch.float32))
    pages = torch.empty(2, base.layout.page_size, dtype=torch.bfloat16)
    cases.check_equal(tmp_path / "a", base, torch.bfloat16, writer, lambda count: pages[:count])
    assert writer.files == 0


def test_a_real_models_adapter_is_written_in_parts_and_soon(tmp_path: Path) -> None:
    base = make_base(tmp_path, SMOLLM2)
    writer = cases.CountingWriter(DEVICE, 4 << 20, 3)
    memory = HostMemory(base.layout, 2 * base.layout.page_size * 2, torch.bfloat16, pinned=True)
    for dtype in (torch.bfloat16, torch.float32):
        write_adapter(tmp_path / "a", cases.mixed_config(base), cases.mixed_tensors(base, dtype))
        for _ in range(2):  # the first time compiles
            started = time.perf_counter()
            cases.check_equal(
                tmp_path / "a", base, torch.bfloat16, writer, lambda count: memory.pages(0, count)
            )
            print(f"{dtype}: both ways in {1e3 * (time.perf_counter() - started):.1f} ms")  # noqa: T201
    assert writer.files == 4
    memory.close()
