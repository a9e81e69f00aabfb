"""Which implementation computes the attention of fresh prompts: found, proven and timed at start.

A library that is installed may lack a feature of this model (a sliding window, grouped heads, the width of a head), be
built for another GPU, or be slower than our own kernel. So none is used before it has given the right answer for this
model's layout of heads, and where nobody asked for one by name, none that is not faster. What makes plans for the
shapes it is called with has made and tried them all before the first request.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from lorax_backend.model.attention import FreshFunction
from lorax_backend.model.fresh_case import FreshCase
from lorax_backend.model.fresh_libraries import installed
from lorax_backend.model.head_layout import HeadLayout
from lorax_backend.model.long_prompts import LongPrompts, Shape

log = logging.getLogger(__name__)

Candidates = Mapping[str, Callable[[], FreshFunction]]
"""Loaders by name, as `installed` returns them."""
Timer = Callable[[Callable[[], object]], float]

_CHECKED_LENGTHS: tuple[tuple[int, ...], ...] = ((1, 2, 17, 64), (130, 5, 333), (257,), (16,) * 9)
_CHECKED_LONG: tuple[tuple[int, ...], ...] = (
    (1024,),
    (40, 1027, 2, 1300),
    (512,) * 4,
    (600, 1024, 1024, 1025),
)
_TIMED_LENGTHS: tuple[tuple[int, ...], ...] = ((512,), (2048,), (2048,) * 4, (100, 900, 300, 1700))
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # of a sequence's norm
_COMPANY = 4  # prompts of one length that are timed together
_WORTHWHILE = 0.97  # share of our own kernel's time from which on another one is taken
_REMEDIES = {
    "torch_varlen": "install torch 2.11 or later",
    "torch_cudnn": "install torch 2.11 or later",
    "flash_attn": "install flash-attn for this GPU and this torch",
}


@dataclass(frozen=True, slots=True)
class FreshAttention:
    """What was chosen: `function` is None for our own paged kernel. `reason` is for people."""

    name: str
    function: FreshFunction | None
    reason: str = ""

    @property
    def description(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def choose(
    wanted: str,
    layout: HeadLayout,
    max_tokens: int,
    candidates: Candidates | None = None,
    timer: Timer | None = None,
) -> FreshAttention:
    """Pick the attention of fresh prompts.

    Args:
        wanted: the option `attention`: "auto" takes the fastest that is right, "triton" and "torch" our own kernel,
            a candidate's name (without its version) that one.
        max_tokens: no step has more; nothing larger is timed.
        candidates: what there is; by default what is installed.
        timer: milliseconds of a call; by default measured with CUDA events.

    Raises:
        ValueError: the one that was asked for by name is missing or wrong.
    """
    own = "torch" if layout.device.type == "cpu" else "triton"
    if wanted in ("triton", "torch"):
        return FreshAttention(own, None)
    proven: dict[str, FreshFunction] = {}
    problems: dict[str, str] = {}
    notes: dict[str, str] = {}
    timer, named, missing = timer or cuda_milliseconds, wanted != "auto", True
    for name, load in (installed() if candidates is None else candidates).items():
        if wanted not in ("auto", name.split()[0]):
            continue
        try:
            function = load()
            missing = False
            if isinstance(function, LongPrompts):
                function.fit(layout, max_tokens)
                notes[name] = _try_shapes(function, layout, max_tokens, None if named else timer)
            _prove(function, layout)
        except Exception as error:  # a library that is not ours may raise anything
            problems[name] = str(error) or type(error).__name__
            log.info("attention: %s is not used: %s", name, problems[name])
        else:
            proven[name] = function
    if named and not proven:
        found = "; ".join(f"{name}: {problem}" for name, problem in problems.items()) or "it is unknown"
        raise ValueError(
            f"attention is {wanted}, which cannot be used here ({found}); use auto or {own}"
            + (f", or {_REMEDIES[wanted]}" if missing and wanted in _REMEDIES else "")
        )
    if not proven:
        return FreshAttention(own, None)
    choice = _fastest(own, proven, layout, max_tokens, timer, named)
    if choice.name in notes:
        choice = replace(choice, reason=f"{choice.reason}; {notes[choice.name]}")
    log.info("attention of fresh prompts: %s", choice.description)
    return choice


def _fastest(
    own: str,
    proven: Mapping[str, FreshFunction],
    layout: HeadLayout,
    max_tokens: int,
    timer: Timer,
    named: bool,
) -> FreshAttention:
    if named and len(proven) == 1:
        ((name, function),) = proven.items()
        return FreshAttention(name, function, "as configured")
    shares = relative_times(proven, layout, max_tokens, timer)
    best = min(shares, key=shares.__getitem__)
    told = ", ".join(f"{name} takes {share:.2f} of {own}'s time" for name, share in shares.items())
    if named or shares[best] < _WORTHWHILE:
        return FreshAttention(best, proven[best], told)
    return FreshAttention(own, None, told)


def relative_times(
    functions: Mapping[str, FreshFunction], layout: HeadLayout, max_tokens: int, timer: Timer
) -> dict[str, float]:
    """Each function's time over that of our own kernel, as the geometric mean over shapes and windows."""
    logs: dict[str, list[float]] = {name: [] for name in functions}
    for seed, lengths in enumerate(_fitting(max_tokens)):
        case = FreshCase.random(layout, lengths, seed)
        for window in layout.windows:
            own = timer(lambda case=case, window=window: case.run(None, window))  # type: ignore[misc]
            for name, function in functions.items():
                taken = timer(lambda case=case, f=function, window=window: case.run(f, window))  # type: ignore[misc]
                logs[name].append(float(np.log(taken / own)))
    return {name: float(np.exp(statistics.fmean(values))) for name, values in logs.items()}


def _fitting(max_tokens: int) -> list[tuple[int, ...]]:
    fitting = [lengths for lengths in _TIMED_LENGTHS if sum(lengths) <= max_tokens]
    return fitting or [(max(2, max_tokens),)]


def _prove(function: FreshFunction, layout: HeadLayout) -> None:
    """Compare with attention in float64.

    Raises:
        ValueError: some sequence's rows differ.
    """
    tolerance = _TOLERANCE[layout.dtype]
    checked = _CHECKED_LONG if isinstance(function, LongPrompts) else _CHECKED_LENGTHS
    for seed, lengths in enumerate(checked):
        case = FreshCase.random(layout, lengths, seed)
        for window in dict.fromkeys((*layout.windows, *(7 for w in layout.windows if w is not None))):
            got, want = case.run(function, window).double(), case.expected(window)
            first = 0
            for length in lengths:
                part, right = got[first : first + length], want[first : first + length]
                error = float((part - right).norm() / right.norm())
                if not error <= tolerance:  # also where it is no number
                    raise ValueError(
                        f"failed its self-check: off by {error:.2g} for {length} tokens, window {window}, "
                        f"{layout.num_heads} heads on {layout.num_kv_heads} of {layout.head_dim}, {layout.dtype}"
                    )
                first += length


def cuda_milliseconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a call on the device, after two to warm up."""
    filler = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(4):
            filler.zero_()  # keeps the device busy until the host is ahead of it, as it is in a large step
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _try_shapes(function: LongPrompts, layout: HeadLayout, max_tokens: int, timer: Timer | None) -> str:
    """Run every shape once, which makes its plan, and keep those that give what our own kernel gives and, if there is
    a `timer`, are faster than it. What was done, in words.

    Raises:
        ValueError: none is kept.
    """
    begun, wanted = time.monotonic(), function.shapes
    kept: set[Shape] = set()
    problem = ""
    for shape in sorted(wanted):
        function.keep(frozenset({shape}))
        try:
            if _is_worthwhile(function, shape, layout, max_tokens, timer):
                kept.add(shape)
        except Exception as error:  # cuDNN may have no plan for one shape and have it for the next
            problem = f"{shape[0]} x {shape[1]} tokens: {error}"
            log.info("attention: torch_cudnn is not used for %s", problem)
    if not kept:
        raise ValueError(f"none of {len(wanted)} shapes passes" + f"; {problem}" * bool(problem))
    function.keep(frozenset(kept))
    return f"{len(kept)} of {len(wanted)} shapes in {time.monotonic() - begun:.1f} s"


def _is_worthwhile(
    function: LongPrompts, shape: Shape, layout: HeadLayout, max_tokens: int, timer: Timer | None
) -> bool:
    """Whether the one shape that `function` has is as right as our own kernel, and faster.

    Raises:
        ValueError: its numbers are others.
    """
    count, length = shape
    # Prompts that go one by one have company: alone, they would leave our own kernel a part of the device.
    company = max(1, min(_COMPANY, max_tokens // length)) if count == 1 else count
    case = FreshCase.random(layout, (length,) * company, seed=length)
    got, want = case.run(function, None).float(), case.run(None, None).float()
    error = float((got - want).norm() / want.norm())
    if not error <= 2 * _TOLERANCE[layout.dtype]:  # each may be off by as much
        raise ValueError(f"off by {error:.2g} from our own")
    if timer is None:
        return True
    own = timer(lambda: case.run(None, None))
    return timer(lambda: case.run(function, None)) < _WORTHWHILE * own
