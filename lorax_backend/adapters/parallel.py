"""Threads that read one file side by side, where each may read for long without needing the interpreter."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
# Half of the processors, for the others have requests to serve; beyond eight it is memory that is waited for.
WORKERS = max(1, min(8, len(os.sched_getaffinity(0)) // 2))


def in_parallel(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Call `work` with every item, on several threads where there are processors for them; returns when all are done.

    Raises:
        Exception: what `work` raised for the first item that it failed for, after all of them.
    """
    if WORKERS == 1:
        for item in items:
            work(item)
        return
    failed: Exception | None = None
    for future in [_threads().submit(work, item) for item in items]:
        try:
            future.result()
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS, "lorax-weights")
