"""Recording a forward pass and running it again: CUDA graphs, or in tests whatever behaves like them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(slots=True)
class Recorded:
    """`replay` runs the recorded launches again, on whatever lies in their inputs' memory by then. `outputs` are the
    tensors they write; the next replay of any recording overwrites them."""

    replay: Callable[[], None]
    outputs: tuple[torch.Tensor, ...]


class GraphRecorder(Protocol):
    """Makes recordings. They share memory, so only one of them may run at a time."""

    def record(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> Recorded:
        """Record what `run` launches. It is called more than once, reads nothing but device memory of fixed address,
        and returns what it computed.

        Raises:
            RuntimeError: `run` does something that cannot be recorded, or there is too little memory.
        """
        ...


class CudaGraphRecorder:
    """CUDA graphs with one memory pool. Record the largest first, so that its memory serves the others."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> Recorded:
        run()  # compiles kernels and sizes workspaces, neither of which a capture may do
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run()
        self._pool = graph.pool()
        return Recorded(graph.replay, outputs)
