"""What else than our own kernel may compute the attention of fresh prompts, each called as its version wants it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from lorax_backend.model.attention import FreshFunction, VarlenFunction
from lorax_backend.model.long_prompts import LongPrompts


def installed() -> dict[str, Callable[[], FreshFunction]]:
    """Loaders of what this process may find: what torch brings, and flash-attn in the forms it is published in. A name
    may carry a version after a space. A loader raises ImportError if its library is missing."""
    return {
        "torch_cudnn": load_torch_cudnn,
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


def load_torch_cudnn() -> LongPrompts:
    """torch's cuDNN attention.

    Raises:
        ImportError: this torch has none.
    """
    packet = getattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", None)
    if packet is None:
        raise ImportError(f"torch {torch.__version__} has no cuDNN attention")
    return adapt_cudnn(packet.default)


def adapt_cudnn(
    function: Callable[..., Any], refusal: Callable[[torch.Tensor, int], str | None] | None = None
) -> LongPrompts:
    """`aten._scaled_dot_product_cudnn_attention`, called itself: `scaled_dot_product_attention` would have to be told
    the backend by a context manager, which sets flags of the whole process in every layer. `refusal` is for tests."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        # No bias, no log-sum-exp, no dropout, causal, no debug mask. Grouped heads it takes as they are.
        out: torch.Tensor = function(q, k, v, None, False, 0.0, True, False, scale=scale)[0]
        return out

    return LongPrompts(run, refusal or _cudnn_refusal)


def _cudnn_refusal(q: torch.Tensor, num_kv_heads: int) -> str | None:
    k = q.new_empty(1, num_kv_heads, *q.shape[2:])
    if can_use_cudnn_attention(SDPAParams(q, k, k, None, 0.0, True, True)):
        return None
    return (
        f"torch {torch.__version__} has no cuDNN attention for {q.shape[1]} heads on {num_kv_heads} of "
        f"{q.shape[3]} in {q.dtype} on this device"
    )


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
