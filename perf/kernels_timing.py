"""Timing on a GPU: replays of CUDA graphs, and the device's own limits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton


def graph_us(calls: list[Callable[[], object]], rep: int) -> float:
    """Median time of a graph that holds all calls, divided by their number."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for call in calls:
            call()
        graph.capture_end()
    torch.cuda.synchronize()
    return triton.testing.do_bench(graph.replay, warmup=3, rep=rep, return_mode="median") * 1e3 / len(calls)


def measured_floors() -> dict[str, float]:
    n = 1 << 30
    a = torch.randint(-100, 100, (n,), dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    copy = triton.testing.do_bench(lambda: b.copy_(a), warmup=20, rep=60, return_mode="median")
    m, k = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = triton.testing.do_bench(lambda: m @ k, warmup=20, rep=100, return_mode="median")
    return {"copy_gbs": 2 * n / copy / 1e6, "tflops": 2 * 8192**3 / product / 1e9}
