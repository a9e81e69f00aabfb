"""Processor time of the scheduler a step: what the device waits for when nothing overlaps it.

    python perf/scheduler_cost.py [--rows 128] [--waiting 1000] [--adapters 100] [--steps 2000]

Prints microseconds of `schedule`, of `update`, and of packing the tokens for the way out of the engine's process
(`send`), for a full engine (every row decodes, sequences end and start all the time) with as many waiting, over
adapters that all fit the device, that are three times as many as fit, and that are all different. No model runs: tokens
are made up. `all` is the three together, `rows` how many sequences a step held on average.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import time
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

from lorax_backend.engine.child import PipeSink
from lorax_backend.engine.messages import MessageWriter
from lorax_backend.scheduler.scheduler import Scheduler
from lorax_backend.scheduler.sequence import Sequence, StepResult
from lorax_backend.scheduler.settings import SchedulerSettings
from lorax_backend.types import AdapterRef, EngineRequest, SamplingParams


@dataclass
class Slots:
    """The least of an adapter provider: some adapters fit, least recently used unused ones go."""

    num_slots: int
    users: dict[AdapterRef, int] = field(default_factory=dict)

    def is_ready(self, handle: int, ref: AdapterRef) -> bool:
        return True

    def is_on_device(self, ref: AdapterRef) -> bool:
        return ref in self.users

    def cache_key(self, ref: AdapterRef) -> str:
        return ref.id

    def activate(self, ref: AdapterRef) -> int | None:
        if ref not in self.users and len(self.users) == self.num_slots:
            idle = next((other for other, users in self.users.items() if not users), None)
            if idle is None:
                return None
            del self.users[idle]
        self.users[ref] = self.users.pop(ref, 0) + 1
        return 0

    def deactivate(self, ref: AdapterRef) -> None:
        self.users[ref] -= 1

    def fits(self, ref: AdapterRef) -> bool:
        return True

    def prefetch(self, refs: AbstractSequence[AdapterRef]) -> None:
        pass

    def release(self, handle: int) -> None:
        pass


class _Packed(MessageWriter):
    """A pipe's end that packs what is sent, and drops it."""

    def __init__(self) -> None:
        super().__init__(os.open(os.devnull, os.O_WRONLY))

    def _write(self, data: bytes) -> None:
        pass


def measure(options: argparse.Namespace, num_adapters: int, num_slots: int) -> dict[str, float]:
    """Microseconds a step; the clock of the scheduler advances 10 ms a step."""
    rows, draw = options.rows, random.Random(0)
    settings = SchedulerSettings(
        num_blocks=rows * 64,
        block_size=16,
        max_num_seqs=rows,
        max_batch_tokens=8192,
        max_input_length=4000,
        max_total_tokens=4096,
    )
    now = 0.0
    scheduler = Scheduler(settings, Slots(num_slots), lambda: now)
    refs = [AdapterRef("local", f"adapter-{n}") for n in range(num_adapters)]
    added = 0
    times: dict[str, list[float]] = {"schedule": [], "update": [], "send": [], "all": []}
    held = 0
    sink = PipeSink(_Packed())
    gc.collect()
    gc.freeze()
    for step in range(options.steps + 200):
        while scheduler.num_waiting < options.waiting:
            added += 1
            prompt = [draw.randrange(32_000) for _ in range(draw.randrange(20, 400))]
            sampling = SamplingParams(max_new_tokens=draw.randrange(20, 300))
            request = EngineRequest(added, prompt, sampling, refs[draw.randrange(num_adapters)])
            scheduler.add(Sequence.from_request(request, now))
        now += 0.01
        started = time.thread_time()
        batch = scheduler.schedule()
        scheduled = time.thread_time()
        assert batch is not None
        count = batch.num_sampled
        result = StepResult([step % 1000] * count, [None] * count, [None] * count)
        drawn = time.thread_time()
        outputs = scheduler.update(batch, result)
        updated = time.thread_time()
        sink.on_outputs(outputs)
        ended = time.thread_time()
        if step >= 200:
            held += len(batch.sequences)
            times["schedule"].append(scheduled - started)
            times["update"].append(updated - drawn)
            times["send"].append(ended - updated)
            times["all"].append(scheduled - started + ended - drawn)
    gc.unfreeze()
    scheduler.check_integrity()
    report = {}
    for name, values in times.items():
        values.sort()
        report[f"{name}_p50_us"] = round(values[len(values) // 2] * 1e6, 1)
        report[f"{name}_p99_us"] = round(values[len(values) * 99 // 100] * 1e6, 1)
    report["rows"] = round(held / options.steps, 1)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    cases = {
        "all adapters fit": (options.adapters, options.adapters),
        "a third fits": (options.adapters, max(1, options.adapters // 3)),
        "all different": (options.waiting, options.waiting),
    }
    for name, (num_adapters, num_slots) in cases.items():
        print(json.dumps({"case": name, **measure(options, num_adapters, num_slots)}))


if __name__ == "__main__":
    main()
