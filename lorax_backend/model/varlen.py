"""Which implementation computes the attention of fresh prompts: found, proven and timed at start.

A library that is installed may lack a feature of this model (a sliding window, grouped heads, the width of a head), be
built for another GPU, or be slower than our own kernel. So none is used before it has given the right answer for this
model's layout of heads, and where nobody asked for one by name, none that is not faster.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorax_backend.model.attention import VarlenFunction, attend
from lorax_kernels import AttentionBatch

log = logging.getLogger(__name__)

Candidates = Mapping[str, Callable[[], VarlenFunction]]
"""Loaders by name; a name may carry a version after a space. A loader raises ImportError if its library is missing."""
Timer = Callable[[Callable[[], object]], float]

_CHECKED_LENGTHS: tuple[tuple[int, ...], ...] = ((1, 2, 17, 64), (130, 5, 333), (257,), (16,) * 9)
_TIMED_LENGTHS: tuple[tuple[int, ...], ...] = ((512,), (2048,) * 4, (100, 900, 300, 1700))
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # of a sequence's norm
_WORTHWHILE = 0.97  # share of our own kernel's time from which on another one is taken
_REMEDIES = {
    "torch_varlen": "install torch 2.11 or later",
    "flash_attn": "install flash-attn for this GPU and this torch",
}


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """What of a model matters to its attention. `windows` are the sliding windows that its layers have, None for a
    layer that sees everything."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device
    block_size: int = 16


@dataclass(frozen=True, slots=True)
class FreshAttention:
    """What was chosen: `function` is None for our own paged kernel. `reason` is for people."""

    name: str
    function: VarlenFunction | None
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
    proven: dict[str, VarlenFunction] = {}
    problems: dict[str, str] = {}
    missing = True
    for name, load in (installed() if candidates is None else candidates).items():
        if wanted not in ("auto", name.split()[0]):
            continue
        try:
            function = load()
            missing = False
            _prove(function, layout)
        except Exception as error:  # a library that is not ours may raise anything
            problems[name] = str(error) or type(error).__name__
            log.info("attention: %s is not used: %s", name, problems[name])
        else:
            proven[name] = function
    if wanted != "auto" and not proven:
        found = "; ".join(f"{name}: {problem}" for name, problem in problems.items()) or "it is unknown"
        raise ValueError(
            f"attention is {wanted}, which cannot be used here ({found}); use auto or {own}"
            + (f", or {_REMEDIES[wanted]}" if missing and wanted in _REMEDIES else "")
        )
    if not proven:
        return FreshAttention(own, None)
    choice = _fastest(own, proven, layout, max_tokens, timer or _cuda_milliseconds, wanted != "auto")
    log.info("attention of fresh prompts: %s", choice.description)
    return choice


def _fastest(
    own: str,
    proven: Mapping[str, VarlenFunction],
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
    functions: Mapping[str, VarlenFunction], layout: HeadLayout, max_tokens: int, timer: Timer
) -> dict[str, float]:
    """Each function's time over that of our own kernel, as the geometric mean over shapes and windows."""
    logs: dict[str, list[float]] = {name: [] for name in functions}
    for seed, lengths in enumerate(_fitting(max_tokens)):
        case = _Case.random(layout, lengths, seed)
        for window in layout.windows:
            own = timer(lambda case=case, window=window: case.run(None, window))  # type: ignore[misc]
            for name, function in functions.items():
                taken = timer(lambda case=case, f=function, window=window: case.run(f, window))  # type: ignore[misc]
                logs[name].append(float(np.log(taken / own)))
    return {name: float(np.exp(statistics.fmean(values))) for name, values in logs.items()}


def _fitting(max_tokens: int) -> list[tuple[int, ...]]:
    fitting = [lengths for lengths in _TIMED_LENGTHS if sum(lengths) <= max_tokens]
    return fitting or [(max(2, max_tokens),)]


def _prove(function: VarlenFunction, layout: HeadLayout) -> None:
    """Compare with attention in float64.

    Raises:
        ValueError: some sequence's rows differ.
    """
    tolerance = _TOLERANCE[layout.dtype]
    for seed, lengths in enumerate(_CHECKED_LENGTHS):
        case = _Case.random(layout, lengths, seed)
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


@dataclass(frozen=True, slots=True)
class _Case:
    """A step of fresh prompts: queries, and values as a part of a wider row, as the model has them."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    cache: tuple[torch.Tensor, torch.Tensor]
    batch: AttentionBatch
    scale: float

    @classmethod
    def random(cls, layout: HeadLayout, lengths: Sequence[int], seed: int) -> _Case:
        rng = np.random.default_rng(seed)
        generator = torch.Generator(device=layout.device).manual_seed(seed)
        total, size = sum(lengths), layout.block_size
        shape = (total, layout.num_heads + 2 * layout.num_kv_heads, layout.head_dim)
        rows = torch.randn(shape, generator=generator, dtype=torch.float32, device=layout.device)
        q, k, v = rows.to(layout.dtype).split(
            (layout.num_heads, layout.num_kv_heads, layout.num_kv_heads), dim=1
        )
        widths = [-(-length // size) for length in lengths]
        order = rng.permutation(sum(widths)).astype(np.int32)
        tables = np.zeros((len(lengths), max(widths)), dtype=np.int32)
        slots, at = [], 0
        for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
            tables[row, :width] = order[at : at + width]
            at += width
            position = np.arange(length)
            slots.append(tables[row, position // size].astype(np.int64) * size + position % size)
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        mapping = np.concatenate(slots)
        cached = (sum(widths), size, layout.num_kv_heads, layout.head_dim)
        cache = torch.zeros((2, *cached), dtype=layout.dtype, device=layout.device)
        index = torch.from_numpy(mapping).to(layout.device)
        for store, part in zip(cache, (k, v), strict=True):
            store.view(-1, *cached[2:]).index_copy_(0, index, part.contiguous())
        batch = AttentionBatch.build(starts, np.diff(starts), tables, mapping, layout.device)
        return cls(q.contiguous(), k, v, (cache[0], cache[1]), batch, layout.head_dim**-0.5)

    def run(self, function: VarlenFunction | None, window: int | None) -> torch.Tensor:
        return attend(self.queries, self.values, self.cache, self.batch, self.scale, window, function)

    def expected(self, window: int | None) -> torch.Tensor:
        """Causal attention in float64, sequence by sequence."""
        group = self.queries.shape[1] // self.keys.shape[1]
        parts = []
        starts = self.batch.query_start_host.tolist()
        for first, last in itertools.pairwise(starts):
            q = self.queries[first:last].double()
            k = self.keys[first:last].double().repeat_interleave(group, 1)
            v = self.values[first:last].double().repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            position = torch.arange(last - first, device=q.device)
            seen = position <= position[:, None]
            if window is not None:
                seen &= position > position[:, None] - window
            scores.masked_fill_(~seen, float("-inf"))
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        return torch.cat(parts)


def _cuda_milliseconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a call on the device, after two to warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def installed() -> Candidates:
    """What this process may find: torch's own, and flash-attn in the forms it is published in."""
    return {
        "torch_varlen": load_torch_varlen,
        "flash_attn 4": lambda: adapt(_imported("flash_attn.cute")),
        "flash_attn 3": lambda: adapt(_imported("flash_attn_interface")),
        "flash_attn 2": lambda: adapt(_imported("flash_attn")),
    }


def _imported(module: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = getattr(
        importlib.import_module(module), "flash_attn_varlen_func", None
    )
    if function is None:
        raise ImportError(f"{module} has no flash_attn_varlen_func")
    return function


def load_torch_varlen() -> VarlenFunction:
    """torch's built-in flash attention.

    Raises:
        ImportError: this torch has none, or one that cannot be told where a causal window begins (before 2.11).
    """
    module = importlib.import_module("torch.nn.attention.varlen")
    return adapt_torch(module.varlen_attn)


def adapt_torch(function: Callable[..., Any]) -> VarlenFunction:
    """`torch.nn.attention.varlen.varlen_attn` of any torch from 2.11 on, whose parameters differ: later ones want to
    be told of grouped heads."""
    names = inspect.signature(function).parameters
    if "window_size" not in names:
        raise ImportError(f"varlen_attn of torch {torch.__version__} has no window_size")
    grouped = {"enable_gqa": True} if "enable_gqa" in names else {}

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float,
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        # The length is that of the longest sequence on both sides, since queries and keys are the same rows.
        out: torch.Tensor = function(
            q, k, v, starts, starts, longest, longest,
            scale=scale, window_size=(-1 if window is None else window - 1, 0), **grouped,
        )  # fmt: skip
        return out

    return run


def adapt(function: Callable[..., Any]) -> VarlenFunction:
    """`flash_attn_varlen_func` of any flash-attn: 4 wants no lengths, 3 and 4 may return the log-sum-exp too."""
    names = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float,
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        given: dict[str, Any] = {
            "cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest,
            "softmax_scale": scale, "causal": True,
        }  # fmt: skip
        if window is not None:
            given["window_size"] = (window - 1, 0)
        out = function(
            q, k, v, **{name: value for name, value in given.items() if takes_all or name in names}
        )
        first: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return first

    return run
