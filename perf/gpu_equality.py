#!/usr/bin/env python3
"""Checks that an engine's greedy tokens do not depend on how they are computed.

    python perf/gpu_equality.py                        # Llama-3-8B's shape, float32 and bfloat16
    python perf/gpu_equality.py --shape tiny --dtypes float32 --streams 4 --tokens 8      # a CPU will do

The same prompts, for the base model and adapters of several ranks, are run by whole engines (scheduler, adapters,
runner) that differ in one thing: CUDA graphs on or off, steps overlapped or not, kernels in Triton or in plain torch.
Two runs of a prompt are compared up to their first difference, since after it they continue different texts. It is a
near tie if the two best logits there, computed by the first engine, differ by less than 0.1% of the standard deviation
of all logits (float32), or by at most 4 steps of the number format at the best (bfloat16, whose logits are rounded
that coarsely). Near ties are counted and listed; any other difference is wrong, and the exit status 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "perf")]

import numpy as np
import torch
from environment import environment
from gpu_models import MIXED_RANKS, SHAPES, host_bytes, write_adapters, write_model
from torch_twins import plain_torch

from lorax_backend.config import ServerConfig
from lorax_backend.engine.build import build_engine
from lorax_backend.engine.core import EngineCore
from lorax_backend.model.decoder import Decoder
from lorax_backend.types import AdapterRef, EngineRequest, SamplingParams

FLOAT32_TIE = 1e-3  # of the logits' standard deviation
ROUNDING_TIE = 4.0  # steps of the number format


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to compute."""

    name: str
    cuda_graphs: bool = True
    overlap: bool = True
    triton: bool = True


MODES = (
    Mode("as served"),
    Mode("without graphs", cuda_graphs=False),
    Mode("without overlap", overlap=False),
    Mode("in plain torch", cuda_graphs=False, triton=False),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids and the adapter's folder; empty: the base model."""

    ids: list[int]
    adapter: str


class Runs:
    """An engine of one mode in this process, stepped by hand, so that two engines form the same batches."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._handle = 0

    def generate(self, prompts: list[Prompt], length: int) -> list[list[int]]:
        """Greedy tokens of all prompts, run side by side.

        Raises:
            RuntimeError: a request failed.
        """
        tokens: dict[int, list[int]] = {}
        left = 0
        for prompt in prompts:
            self._handle += 1
            tokens[self._handle] = []
            adapter = AdapterRef("local", prompt.adapter) if prompt.adapter else None
            request = EngineRequest(self._handle, prompt.ids, SamplingParams(max_new_tokens=length), adapter)
            outputs = self._core.add(request)
            if outputs:
                raise RuntimeError(f"refused: {outputs[0].error}")
            left += 1
        while left:
            if self._core.stalled:
                time.sleep(0.001)  # an adapter is being loaded, in threads of its own
            for output in self._core.step():
                if output.error is not None:
                    raise RuntimeError(f"failed: {output.error}")
                if output.token_id is not None:
                    tokens[output.handle].append(output.token_id)
                left -= output.finish_reason is not None
        return list(tokens.values())

    def best_two(self, prompt: Prompt, tokens: list[int]) -> tuple[float, float, float]:
        """The two best logits of what follows, and the standard deviation of all."""
        with _recorded_logits() as seen:
            self.generate([Prompt(prompt.ids + tokens, prompt.adapter)], 1)
        logits = seen[-1][-1].float()
        best, second = logits.topk(2).values.tolist()
        return best, second, float(logits.std())


@contextmanager
def _recorded_logits() -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    plain = Decoder.logits

    def logits(self: Decoder, *args: Any, **options: Any) -> torch.Tensor:
        made = plain(self, *args, **options)
        seen.append(made.clone())  # the sampler may write to it
        return made

    Decoder.logits = logits  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Decoder.logits = plain  # type: ignore[method-assign]


@contextmanager
def engine(
    model: Path, adapters: list[str], dtype: str, mode: Mode, args: argparse.Namespace
) -> Iterator[Runs]:
    """An engine of that mode with every adapter on the device."""
    pages = sum(-(-rank // 8) for rank in MIXED_RANKS) + 8
    config = ServerConfig(
        model_id=str(model),
        load_format="dummy",
        dtype=dtype,
        default_adapter_source="local",
        prefix_caching=False,
        cuda_graphs=mode.cuda_graphs,
        overlap=mode.overlap,
        # Without Triton every row goes through the paged kernel's twin, not through a library's attention.
        attention="triton" if not mode.triton and torch.cuda.is_available() else "auto",
        max_total_tokens=1024,
        max_batch_size=max(8, args.streams),
        adapter_pages=pages,
        adapter_host_bytes=host_bytes(adapters, args.host_gib, 2),
    )
    with ExitStack() as stack:
        if not mode.triton:
            stack.enter_context(plain_torch())
        built = build_engine(config, model, lambda text: None)
        stack.callback(_free)
        stack.callback(built.core.close)
        runs = Runs(built.core)
        for name in adapters:
            runs.generate([Prompt([5, 6, 7], name)], 1)
        yield runs


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def near_tie(best: float, second: float, deviation: float, dtype: str) -> tuple[bool, dict[str, float]]:
    """Whether the two best logits are too close to call in `dtype`, and by what numbers."""
    gap = best - second
    spacing = 2.0 ** math.floor(math.log2(abs(best))) * torch.finfo(getattr(torch, dtype)).eps
    relative, steps = gap / deviation, gap / spacing
    tie = relative < FLOAT32_TIE if dtype == "float32" else steps <= ROUNDING_TIE
    return tie, {"of_deviation": round(relative, 6), "roundings": round(steps, 2)}


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Index of the first token in which they differ; None if they are equal."""
    if len(one) != len(other):
        return min(len(one), len(other))
    return next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)


def compare(runs: Runs, name: str, answers: tuple[list[list[int]], list[list[int]]], prompts: list[Prompt],
            dtype: str) -> dict[str, Any]:  # fmt: skip
    """Equal, near-tied and wrong answers of two ways to compute; logits by the first."""
    equal, ties, wrong = 0, [], []
    for index, (one, other) in enumerate(zip(*answers, strict=True)):
        at = first_difference(one, other)
        if at is None:
            equal += 1
            continue
        tie, numbers = near_tie(*runs.best_two(prompts[index], one[:at]), dtype)
        (ties if tie else wrong).append({"prompt": index, "token": at, **numbers})
    report = {"check": name, "dtype": dtype, "answers": len(prompts), "equal": equal, "near_ties": ties,
              "wrong": wrong}  # fmt: skip
    print(
        f"{dtype:<9}{name:<40}{equal} of {len(prompts)} equal, {len(ties)} near ties, {len(wrong)} wrong",
        flush=True,
    )
    return report


def check(model: Path, adapters: list[str], dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All modes against the first, and the first, all at once, against itself one by one."""
    rng = np.random.default_rng(0)
    vocab = SHAPES[args.shape]["vocab_size"]
    names = ["", *adapters]
    prompts = [
        Prompt(rng.integers(10, vocab, int(rng.integers(5, 300))).tolist(), names[i % len(names)])
        for i in range(args.streams)
    ]
    others = {}
    for mode in MODES[1:]:
        with engine(model, adapters, dtype, mode, args) as runs:
            others[mode.name] = runs.generate(prompts, args.tokens)
    reports = []
    with engine(model, adapters, dtype, MODES[0], args) as runs:
        served = runs.generate(prompts, args.tokens)
        for name, answers in others.items():
            reports.append(compare(runs, f"as served against {name}", (served, answers), prompts, dtype))
        alone = [runs.generate([prompt], args.tokens)[0] for prompt in prompts]
        reports.append(compare(runs, "all at once against one by one", (served, alone), prompts, dtype))
    distinct = len({tuple(tokens) for tokens in served})
    for report in reports:
        report["different_answers"] = distinct
    return reports


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama3-8b", choices=list(SHAPES))
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"])
    parser.add_argument("--streams", type=int, default=18)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--host-gib", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    args = parser.parse_args(argv)
    report: dict[str, Any] = {
        "environment": environment(),
        "shape": args.shape,
        "command": " ".join(["python", "perf/gpu_equality.py", *(sys.argv[1:] if argv is None else argv)]),
        "near_tie": {"float32": f"gap of the two best logits < {FLOAT32_TIE:g} of their standard deviation",
                     "bfloat16": f"gap of at most {ROUNDING_TIE:g} steps of the number format"},
        "checks": [],
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"equality-{args.shape}.json"
    with TemporaryDirectory(prefix="lorax-perf-") as folder:
        model = write_model(Path(folder) / f"random-{args.shape}", args.shape)
        adapters = write_adapters(Path(folder) / "adapters", SHAPES[args.shape], list(MIXED_RANKS))
        for dtype in args.dtypes:
            report["checks"] += check(model, adapters, dtype, args)
            path.write_text(json.dumps(report, indent=1) + "\n")
    wrong = sum(len(entry["wrong"]) for entry in report["checks"])
    print(f"kept in {path}", flush=True)
    if wrong:
        print(f"FAILED: {wrong} answers differ beyond near ties", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
