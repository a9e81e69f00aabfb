#!/usr/bin/env python3
"""Attention of prompts that begin in a step, by everything that is installed, on one GPU.

    python perf/fresh_attention.py                      # the 8B model's heads, bf16
    python perf/fresh_attention.py --heads 32 8 64      # other heads: query heads, key heads, width

Each line is one step's prompts: TFLOP/s of what a causal mask leaves (2 products of 2 operations each), on the device
alone, with all that a layer does for it (keys gathered from the cache, parts joined). torch_cudnn takes the first rows
of long prompts and leaves the rest to Triton. The last line is what a start of the server would take, and how long it
takes to find out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "perf")]

import torch
from environment import environment

from lorax_backend.model.fresh_case import FreshCase
from lorax_backend.model.fresh_libraries import installed
from lorax_backend.model.head_layout import HeadLayout
from lorax_backend.model.long_prompts import LongPrompts
from lorax_backend.model.varlen import FreshAttention, choose, cuda_milliseconds

STEPS: dict[str, tuple[int, ...]] = {
    "4 x 2048": (2048,) * 4,
    "1 x 8192": (8192,),
    "3 x 2048 + 2020": (2048, 2048, 2048, 2020),
    "4 x 2047": (2047,) * 4,
    "8 x 1024": (1024,) * 8,
    "7 x 1150": (1150,) * 7,
    "16 x 512": (512,) * 16,
}


def tflops(lengths: tuple[int, ...], layout: HeadLayout, milliseconds: float) -> float:
    seen = sum(length * (length + 1) / 2 for length in lengths)
    return seen * layout.num_heads * layout.head_dim * 4 / milliseconds / 1e9


def candidates(layout: HeadLayout, max_tokens: int) -> list[FreshAttention]:
    """Our own, and whatever passes the check of a start. What does not is told."""
    found = [FreshAttention("triton", None)]
    for name in dict.fromkeys(name.split()[0] for name in installed()):
        try:
            found.append(choose(name, layout, max_tokens))
            print(found[-1].description, flush=True)
        except ValueError as error:
            print(f"left out {name}: {error}", flush=True)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("Q", "KV", "DIM"))
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "local")
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    layout = HeadLayout(*args.heads, (None,), torch.bfloat16, device)
    found = candidates(layout, args.max_batch_tokens)
    print(f"{'prompts':<18}" + "".join(f"{choice.name:>16}" for choice in found) + "   TFLOP/s (us)")
    rows = {}
    for seed, (name, lengths) in enumerate(STEPS.items()):
        if sum(lengths) > args.max_batch_tokens:
            continue
        case = FreshCase.random(layout, lengths, seed)
        times = {
            choice.name: cuda_milliseconds(lambda case=case, f=choice.function: case.run(f, None), 25)
            for choice in found
        }
        rows[name] = {
            other: {"us": ms * 1e3, "tflops": tflops(lengths, layout, ms)} for other, ms in times.items()
        }
        told = (f"{row['tflops']:.0f} ({row['us']:.0f})" for row in rows[name].values())
        print(f"{name:<18}" + "".join(f"{text:>16}" for text in told), flush=True)
    begun = time.monotonic()
    taken = choose("auto", layout, args.max_batch_tokens)
    seconds = time.monotonic() - begun
    print(f"a start takes {taken.description}, found out in {seconds:.1f} s")
    if isinstance(taken.function, LongPrompts):
        print(
            "prompts x tokens that are faster: "
            + ", ".join(f"{n} x {m}" for n, m in sorted(taken.function.shapes))
        )
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "environment": environment(), "command": " ".join(["python", "perf/fresh_attention.py", *sys.argv[1:]]),
        "heads": list(args.heads), "prompts": rows, "start": taken.description, "start_s": seconds,
    }  # fmt: skip
    (args.out / "fresh_attention.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
