"""Ways to compute the same, timed turn by turn on one GPU."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable

import torch


class Turns:
    """CUDA graphs that are replayed one after the other, so that all meet the device at the same temperature."""

    def __init__(self) -> None:
        self._graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self.state = ""

    def add(self, name: str, calls: list[Callable[[], object]]) -> None:
        """A graph of all calls.

        Raises:
            RuntimeError: they cannot be captured.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            calls[0]()
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool)
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
        graph.replay()
        torch.cuda.synchronize()
        self._graphs[name] = graph, len(calls)

    def run(self, turns: int) -> dict[str, float]:
        """Median microseconds a call of everything added; one round more goes before, for the temperature. `state`
        says how the device was meanwhile: clock, power and temperature, or nothing if nobody knows."""
        asked = _ask_device()
        times: dict[str, list[float]] = {name: [] for name in self._graphs}
        names = list(self._graphs)
        for turn in range(turns + 1):
            first = turn % max(1, len(names))
            events = []
            for name in names[first:] + names[:first]:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                self._graphs[name][0].replay()
                end.record()
                events.append((name, begin, end))
            torch.cuda.synchronize()
            for name, begin, end in events if turn else ():
                times[name].append(begin.elapsed_time(end) * 1e3 / self._graphs[name][1])
        self.state = _answer(asked)
        return {name: statistics.median(seen) for name, seen in times.items() if seen}


def _ask_device() -> subprocess.Popen[str] | None:
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _answer(asked: subprocess.Popen[str] | None) -> str:
    if asked is None:
        return ""
    try:
        answer, _ = asked.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        asked.kill()
        return ""
    return answer.split("\n")[0] if asked.returncode == 0 else ""
