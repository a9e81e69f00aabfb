"""Which configurations of `lorax_kernels.prefill_gemm` are tried, and their proof in processes of their own.

A kernel may be refused by the compiler, crash it, be wrong, or never end. Each of these costs one process, which the
program that measures never was; Triton's cache on disk keeps what was compiled.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "perf")]

import torch

from lorax_kernels.configs import PrefillConfig
from lorax_kernels.fused_reference import silu_mul as silu_mul_reference
from lorax_kernels.prefill_gemm import prefill_linear, prefill_linear_silu

TOLERANCE = 1e-2
ANSWER_S = 90.0  # for the start of a process, and for one choice
WORKER = (sys.executable, __file__)
_SAMPLE = 64
_CHECK_ROWS, _CHECK_COLUMNS = 1000, 2160  # both with a tile at the edge
_WIDE = PrefillConfig(kernel="triton")
_SILU = replace(_WIDE, block_n=128, stages=4)


@dataclass(frozen=True, slots=True)
class Choice:
    """One configuration for weights of one width, before SiLU and multiplication or not."""

    width: int
    silu: bool
    config: PrefillConfig


def configs(silu: bool) -> list[PrefillConfig]:
    """What is tried."""
    if silu:
        return [
            _SILU,
            replace(_SILU, group=16),
            replace(_SILU, group=4),
            replace(_SILU, group=32),
            replace(_SILU, stages=3),
            replace(_SILU, flatten=False),
            replace(_SILU, flatten=False, programs=0),
            replace(_SILU, block_k=128, stages=2),
            replace(_SILU, block_m=256, block_n=64, group=8),
            replace(_SILU, block_n=64, stages=3, warps=4, programs=2),
            replace(_SILU, block_n=64, stages=3, warps=4, programs=2, flatten=False),
        ]
    return [
        _WIDE,
        replace(_WIDE, group=16),
        replace(_WIDE, group=4),
        replace(_WIDE, stages=4, parts=2),
        replace(_WIDE, stages=4, parts=2, group=16),
        replace(_WIDE, flatten=False),
        replace(_WIDE, stages=4, parts=2, flatten=False),
        replace(_WIDE, stages=4, parts=2, flatten=False, programs=0),
        replace(_WIDE, block_k=128, stages=2, parts=2),
        replace(_WIDE, block_m=256, block_n=128),
        replace(_WIDE, block_m=256, block_n=128, stages=4, parts=2),
        replace(_WIDE, block_n=128, stages=3, warps=4, parts=2, programs=2),
        replace(_WIDE, block_n=128, stages=3, warps=4, parts=2, programs=2, flatten=False),
    ]


def site_choices(widths: dict[str, int]) -> list[Choice]:
    """What is tried for sites, given by name and width; those of one width share it."""
    kinds = {(width, site.endswith("+silu")): None for site, width in widths.items()}
    return [Choice(width, silu, config) for width, silu in kinds for config in configs(silu)]


def shown(config: PrefillConfig, silu: bool) -> str:
    """A name, short and with all that differs."""
    words = [f"{config.block_m}x{2 * config.block_n if silu else config.block_n}x{config.block_k}",
             f"s{config.stages}", f"w{config.warps}", f"g{config.group}", f"p{config.programs}"]  # fmt: skip
    words += [f"/{config.parts}"] if config.parts > 1 else []
    words += ["flat"] if config.flatten else []
    return " ".join(words)


def product(config: PrefillConfig, silu: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """x [T, in], weight [out, in] -> the result."""
    if silu:
        return lambda x, weight: prefill_linear_silu(x, weight, config)
    return lambda x, weight: prefill_linear(x, weight, None, config)


def weight_of(columns: int, width: int, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(columns, width, dtype=torch.bfloat16, device="cuda").normal_(
        0, width**-0.5, generator=generator
    )


def reference(x: torch.Tensor, weight: torch.Tensor, silu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows, the first and the last among them, and their results in float64."""
    rows = torch.linspace(0, x.shape[0] - 1, _SAMPLE, device=x.device).long()
    parts = [x[rows].double() @ part.double().T for part in weight.split(4096)]
    made = torch.cat(parts, 1)
    return rows, silu_mul_reference(made) if silu else made


def compare(got: torch.Tensor, want: torch.Tensor) -> float:
    """The relative error.

    Raises:
        ValueError: it is no number, or more than `TOLERANCE`.
    """
    error = float((got.double() - want).norm() / want.norm())
    if not error <= TOLERANCE:
        raise ValueError(f"wrong: error {error:.1e}")
    return error


def proven(choices: list[Choice], jobs: int) -> tuple[list[Choice], dict[str, str]]:
    """The choices that compile and are right, and why the others are not among them."""
    verdicts: dict[int, str] = {}
    shares = [list(range(first, len(choices), jobs)) for first in range(min(jobs, len(choices)))]
    threads = [threading.Thread(target=_prove_share, args=(choices, share, verdicts)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good = [choice for index, choice in enumerate(choices) if verdicts.get(index) == "ok"]

    def name(choice: Choice) -> str:
        return f"{choice.width}{' silu' if choice.silu else ''} {shown(choice.config, choice.silu)}"

    bad = {name(choices[index]): why for index, why in sorted(verdicts.items()) if why != "ok"}
    return good, bad


def _prove_share(choices: list[Choice], share: list[int], verdicts: dict[int, str]) -> None:
    """One process after the other, until each choice of the share has a verdict."""
    left = list(share)
    while left:
        given = json.dumps([asdict(choices[index]) for index in left])
        worker = subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True)  # fmt: skip
        assert worker.stdin is not None
        assert worker.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(worker.stdout, lines), daemon=True).start()
        with suppress(BrokenPipeError):
            worker.stdin.write(given)
        with suppress(BrokenPipeError):
            worker.stdin.close()
        started, why = False, "the process ended"
        while left:
            try:
                line = lines.get(timeout=ANSWER_S)
            except queue.Empty:
                why = f"no answer within {ANSWER_S:.0f} s"
                break
            if line is None:
                break
            started = started or line.startswith("ready")
            if line.startswith("verdict "):
                verdicts[left.pop(0)] = line.removeprefix("verdict ").strip()
        worker.kill()
        worker.wait()
        # A process that never began would not begin for the others either.
        for index in left[:1] if started else left:
            verdicts[index] = why
        left = left[1:] if started else []


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def prove(choice: Choice) -> str:
    """ "ok", or what is wrong, in one line."""
    try:
        generator = torch.Generator("cuda").manual_seed(1)
        x = torch.randn(_CHECK_ROWS, choice.width, device="cuda", generator=generator).bfloat16()
        weight = weight_of(_CHECK_COLUMNS, choice.width, generator)
        sample, want = reference(x, weight, choice.silu)
        for _ in range(3):
            compare(product(choice.config, choice.silu)(x, weight)[sample], want)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    return "ok"


def main() -> None:
    """A process that proves what it is given, one line each."""
    todo = json.load(sys.stdin)
    torch.zeros(1, device="cuda")
    print("ready", flush=True)
    for given in todo:
        choice = Choice(given["width"], given["silu"], PrefillConfig(**given["config"]))
        print("verdict", prove(choice), flush=True)


if __name__ == "__main__":
    main()
