"""Adapters' pages written by the kernel, in the interpreter, against those the processor writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import page_cases as cases
import pytest
import torch
from adapter_files import TINY, make_base

# The interpreter runs one kernel at a time, so that threads are left to the GPU tests.
CHECKS = [
    cases.check_dtypes,
    cases.check_shards,
    cases.check_not_finite,
    cases.check_left_alone,
    cases.check_changed,
    cases.check_replaced,
]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # which is what some of them are about
@pytest.mark.parametrize(
    ("dtype", "buffers"),
    [(torch.float32, (cases.BUFFER, 2)), (torch.float16, (8 << 10, 1))],
    ids=["one part", "parts"],
)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_pages_are_those_of_the_processor(
    check: Callable[..., Any], dtype: torch.dtype, buffers: tuple[int, int], tmp_path: Path
) -> None:
    base = make_base(tmp_path, TINY)
    writer = cases.CountingWriter(torch.device("cpu"), *buffers)

    def make(num_pages: int) -> torch.Tensor:
        return torch.empty(num_pages, base.layout.page_size, dtype=dtype)

    writer.warm_up(base.layout, make(1))
    check(tmp_path / "adapter", base, dtype, writer, make)
