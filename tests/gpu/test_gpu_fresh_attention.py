"""Attention of fresh prompts on a CUDA device: what this torch brings passes the check that a start makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_driver import ModelDriver

from lorax_backend.model.fresh_case import FreshCase
from lorax_backend.model.fresh_libraries import installed
from lorax_backend.model.head_layout import HeadLayout
from lorax_backend.model.long_prompts import SHORTEST, LongPrompts
from lorax_backend.model.varlen import choose

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


def cudnn(wanted: HeadLayout, max_tokens: int = 8192) -> tuple[LongPrompts, list[tuple[int, int]]]:
    """As a start makes it, and the shapes that it calls cuDNN with from now on."""
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("torch has no cuDNN attention for this GPU")
    function = choose("torch_cudnn", wanted, max_tokens).function
    assert isinstance(function, LongPrompts)
    called: list[tuple[int, int]] = []
    inner = function._function

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        called.append((q.shape[0], q.shape[2]))
        return inner(q, k, v, scale)

    function._function = recording
    return function, called


def off_by(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [((32, 8), 128), ((9, 3), 64), ((8, 8), 128)], ids=str)
def test_cudnn_is_right_for_long_prompts_of_any_length(
    dtype: torch.dtype, heads: tuple[int, int], dim: int
) -> None:
    wanted = layout(heads, dim, dtype, (None,))
    function, called = cudnn(wanted)
    assert len(function.shapes) >= 30
    for seed, lengths in enumerate(
        (
            (2048,) * 4,
            (2048, 2048, 2048, 2020),
            (1025, 7, 1, 1024, 1500, SHORTEST - 1),
            (512,) * 9,
            (5000, 130),
        )
    ):
        case = FreshCase.random(wanted, lengths, seed)
        got, want = case.run(function, None), case.expected(None)
        first = 0
        for length in lengths:
            error = off_by(got[first : first + length], want[first : first + length])
            assert error <= 1e-2, (lengths, length, error)
            first += length
    assert called == [(4, 2048), (3, 2048), (1, 1920), (1, 1024), (1, 1024), (1, 1408), (8, 512), (1, 4608)]


@pytest.mark.parametrize("value", [3e38, float("inf"), float("nan")], ids=str)
def test_no_number_of_a_neighbour_gets_into_what_cudnn_computes(value: float) -> None:
    wanted = layout((32, 8), 128, torch.bfloat16, (None,))
    function, called = cudnn(wanted, 4096)
    lengths = (1024, 1024, 1100, 300)
    for spoiled in range(len(lengths)):
        case, clean = (FreshCase.random(wanted, lengths, seed=1) for _ in range(2))
        first, last = sum(lengths[:spoiled]), sum(lengths[: spoiled + 1])
        slots = case.batch.slot_mapping[first:last]
        case.queries[first:last] = value
        case.values[first:last] = value
        for store in case.cache:
            store.view(-1, *store.shape[2:])[slots] = value
        got, want = case.run(function, None), clean.run(function, None)
        assert torch.equal(got[:first], want[:first])
        assert torch.equal(got[last:], want[last:])
    assert set(called) == {(2, 1024), (1, 1024)}


def test_short_prompts_never_reach_cudnn() -> None:
    wanted = layout((32, 8), 128, torch.bfloat16, (None,))
    function, called = cudnn(wanted, 4096)
    case = FreshCase.random(wanted, (SHORTEST - 1, 600, 17, 1), 0)
    assert torch.equal(case.run(function, None), case.run(None, None))
    assert called == []


def test_cudnn_makes_no_plan_after_the_start() -> None:
    """A plan takes the host tens of milliseconds, a call of a known shape none. What counts is the shapes and strides:
    each is one that a start has called with."""
    wanted = layout((32, 8), 128, torch.bfloat16, (None,))
    function = choose("torch_cudnn", wanted, 8192).function
    assert isinstance(function, LongPrompts)
    keys: list[tuple[object, ...]] = []
    inner = function._function

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        keys.append((q.shape, q.stride(), k.stride(), v.stride()))
        return inner(q, k, v, scale)

    function._function = recording
    for count, length in function.shapes:
        FreshCase.random(wanted, (length,) * count, 0).run(function, None)
    tried = set(keys)
    for seed, lengths in enumerate(((3000, 1111), (2048, 2048, 4000), (700, 1024, 1024, 90, 5000))):
        FreshCase.random(wanted, lengths, seed).run(function, None)
    assert set(keys) == tried


def test_cudnn_is_not_for_sliding_windows_nor_for_float32() -> None:
    with pytest.raises(ValueError, match="no sliding windows"):
        choose("torch_cudnn", layout((32, 8), 128, torch.bfloat16, (None, 4096)), 8192)
    with pytest.raises(ValueError, match="no cuDNN attention"):
        choose("torch_cudnn", layout((32, 8), 128, torch.float32, (None,)), 8192)


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


def test_a_model_gives_the_same_with_cudnn_up_to_rounding(tiny_model_path: Callable[..., Path]) -> None:
    """Fresh prompts beside a decode and a chunk over a cached context."""
    path = tiny_model_path("llama", head_dim=64, max_position_embeddings=8192)
    seen = []
    for attention in ("triton", "torch_cudnn"):
        driver = ModelDriver(
            path, dtype="bfloat16", device="cuda", attention=attention, num_blocks=512, max_batch_tokens=4096
        )
        assert driver.runner.info(0.0).prefill_attention.startswith(attention)
        first, second, third = (driver.add(3 + i % 300 for i in range(n)) for n in (1500, 1200, 21))
        driver.step([(first, 1300), (third, 20)])
        driver.step([(second, 1200), (first, 200), (third, 1)])
        seen.append(torch.stack([driver.last_logits[seq.handle].float() for seq in (first, second, third)]))
        driver.runner.close()
    assert (seen[1] - seen[0]).norm() <= 3e-2 * seen[0].norm()
