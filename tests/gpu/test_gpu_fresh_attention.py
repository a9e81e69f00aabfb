"""Attention of fresh prompts on a CUDA device: what this torch brings passes the check that a start makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_driver import ModelDriver

from lorax_backend.model.varlen import HeadLayout, choose, installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def layout(
    heads: tuple[int, int], dim: int, dtype: torch.dtype, windows: tuple[int | None, ...]
) -> HeadLayout:
    return HeadLayout(*heads, dim, windows, dtype, torch.device("cuda", torch.cuda.current_device()))


def torch_varlen() -> None:
    try:
        installed()["torch_varlen"]()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("windows", [(None,), (None, 100)], ids=str)
@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (8, 8)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_torch_s_own_passes_the_check(
    dtype: torch.dtype, windows: tuple[int | None, ...], heads: tuple[int, int], dim: int
) -> None:
    torch_varlen()
    assert choose("torch_varlen", layout(heads, dim, dtype, windows), 8192).name == "torch_varlen"


def test_auto_decides_by_times_taken_on_this_device() -> None:
    choice = choose("auto", layout((32, 8), 128, torch.bfloat16, (None,)), 8192)
    assert choice.name in ("triton", *installed())
    assert "of triton's time" in choice.description


def test_float32_stays_with_our_own_kernel() -> None:
    assert choose("auto", layout((8, 2), 64, torch.float32, (None,)), 2048).function is None
    with pytest.raises(ValueError, match="attention is torch_varlen"):
        choose("torch_varlen", layout((8, 2), 64, torch.float32, (None,)), 2048)


def test_a_model_gives_the_same_with_it_up_to_rounding(tiny_model_path: Callable[..., Path]) -> None:
    torch_varlen()
    seen = []
    for attention in ("triton", "torch_varlen"):
        driver = ModelDriver(tiny_model_path("llama"), dtype="bfloat16", device="cuda", attention=attention)
        assert driver.runner.info(0.0).prefill_attention.startswith(attention)
        first, second = driver.add(range(3, 203)), driver.add(range(40, 140))
        driver.step([(first, 150)])
        driver.step([(second, 100), (first, 50)])  # a fresh prompt beside a chunk over a cached context
        seen.append(torch.stack([driver.last_logits[seq.handle].float() for seq in (second, first)]))
        driver.runner.close()
    assert (seen[1] - seen[0]).norm() <= 3e-2 * seen[0].norm()
