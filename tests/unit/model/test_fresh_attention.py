"""Attention of prompts that begin in a step: which rows are theirs, and which implementation is trusted with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_driver import ModelDriver

from lorax_backend.model.attention import fresh_rows
from lorax_backend.model.fresh_libraries import adapt, adapt_torch, installed
from lorax_backend.model.head_layout import HeadLayout
from lorax_backend.model.varlen import choose
from lorax_kernels import AttentionBatch

LAYOUT = HeadLayout(6, 2, 16, (None,), torch.float32, torch.device("cpu"))


def sdpa_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float,
    window: int | None,
) -> torch.Tensor:  # fmt: skip
    """What a varlen flash attention computes, by one dense attention a sequence."""
    assert starts.dtype == torch.int32
    assert int(starts[0]) == 0
    assert int(starts[-1]) == len(q) == len(k) == len(v)
    assert longest == int(starts.diff().max())
    parts = []
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        position = torch.arange(last - first)
        seen = position <= position[:, None]
        if window is not None:
            seen &= position > position[:, None] - window
        heads = (t[first:last].transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def forgets_windows(*args: Any) -> torch.Tensor:
    return sdpa_varlen(*args[:6], None)


def missing() -> Any:
    raise ImportError("No module named 'flash_attn'")


def batch_of(queries: list[int], contexts: list[int]) -> AttentionBatch:
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    tables = np.zeros((len(queries), 9), np.int32)
    slots = np.arange(starts[-1], dtype=np.int64)
    return AttentionBatch.build(starts, np.array(contexts, np.int32), tables, slots, "cpu")


def test_the_rows_of_a_mixed_step_are_parted_where_the_fresh_prompts_begin() -> None:
    fresh = fresh_rows(batch_of([1, 1, 5, 8, 3], [40, 1, 25, 8, 3]))
    assert fresh is not None
    assert fresh.first_row == 7
    assert fresh.starts.tolist() == [0, 8, 11]
    assert fresh.longest == 8
    assert fresh.slots.tolist() == list(range(7, 18))
    assert fresh.rest is not None
    assert fresh.rest.num_decodes == 2
    assert fresh.rest.query_start.tolist() == [0, 1, 2, 7]
    assert (fresh.rest.max_query, fresh.rest.max_context) == (5, 40)


def test_a_step_of_one_kind_is_not_parted() -> None:
    whole = fresh_rows(batch_of([4, 9], [4, 9]))
    assert whole is not None
    assert whole.rest is None
    assert fresh_rows(batch_of([1, 1], [9, 1])) is None
    assert fresh_rows(batch_of([1, 6], [9, 20])) is None


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_any_mix_of_steps_gives_what_it_gives_without(
    architecture: str, tiny_model_path: Callable[..., Path]
) -> None:
    """Decodes, chunks over a cached context and fresh prompts in one step, in an order that is not the rows'."""
    results = []
    calls: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(len(args[0]))
        return sdpa_varlen(*args)

    options = {"sliding_window": 24} if architecture == "mistral" else {}
    for function in (None, counted):
        driver = ModelDriver(tiny_model_path(architecture, **options))
        driver.runner.decoder.fresh_attention = function
        rng = np.random.default_rng(5)
        lengths = (30, 70, 9, 41, 2)
        first, second, third, fourth, fifth = (driver.add(rng.integers(3, 384, n).tolist()) for n in lengths)
        seen = []

        def step(*work: tuple[Any, int], driver: ModelDriver = driver, seen: list[Any] = seen) -> None:
            result = driver.step(work)
            sampled = [seq for seq, _ in sorted(work, key=lambda pair: pair[1] > 1)
                       if seq.num_computed == len(seq.token_ids)]  # fmt: skip
            for seq, token in zip(sampled, result.token_ids, strict=True):
                seen.append(driver.last_logits[seq.handle])
                seq.token_ids.append(token)

        step((first, 30), (second, 20))
        step((third, 9), (second, 20), (first, 1), (fourth, 11))
        step((fourth, 30), (fifth, 2), (third, 1), (first, 1), (second, 30))
        step((first, 1), (fifth, 1), (third, 1))
        results.append(seen)
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)
    layers = driver.runner.model_config.num_layers
    assert calls == [rows for rows in (50, 20, 2) for _ in range(layers)]


def test_on_a_cpu_nothing_is_looked_for(tiny_model_path: Callable[..., Path]) -> None:
    info = ModelDriver(tiny_model_path("llama")).runner.info(0.0)
    assert (info.attention_backend, info.prefill_attention) == ("torch", "torch")


@pytest.mark.parametrize(("milliseconds", "name"), [(0.5, "torch_varlen"), (0.99, "torch"), (1.3, "torch")])
def test_auto_takes_what_is_measured_to_be_faster(milliseconds: float, name: str) -> None:
    calls: list[int] = []

    def ours_then_theirs(call: Callable[[], object]) -> float:
        call()
        calls.append(1)
        return 1.0 if len(calls) % 2 else milliseconds

    choice = choose("auto", LAYOUT, 512, {"torch_varlen": lambda: sdpa_varlen}, ours_then_theirs)
    assert choice.name == name
    assert (choice.function is sdpa_varlen) == (name == "torch_varlen")
    assert f"torch_varlen takes {milliseconds:.2f} of torch's time" in choice.description


def test_a_named_one_is_taken_however_slow_it_is() -> None:
    choice = choose("torch_varlen", LAYOUT, 512, {"torch_varlen": lambda: sdpa_varlen}, lambda call: 1.0)
    assert (choice.name, choice.function) == ("torch_varlen", sdpa_varlen)


def test_a_name_with_several_versions_means_the_fastest_that_is_right() -> None:
    times = iter((1.0, 5.0, 3.0))
    candidates = {
        "flash_attn 4": missing,
        "flash_attn 3": lambda: sdpa_varlen,
        "flash_attn 2": lambda: sdpa_varlen,
        "torch_varlen": missing,
    }
    assert choose("flash_attn", LAYOUT, 512, candidates, lambda call: next(times)).name == "flash_attn 2"


def test_what_gives_wrong_numbers_is_not_used() -> None:
    windowed = replace(LAYOUT, windows=(None, 24))
    candidates = {"torch_varlen": lambda: forgets_windows}
    fine = choose("torch_varlen", LAYOUT, 512, candidates, lambda call: 1.0)
    assert fine.function is forgets_windows
    assert choose("auto", windowed, 512, candidates, lambda call: 0.0).function is None
    with pytest.raises(
        ValueError, match=r"attention is torch_varlen.*self-check.*window 24.*use auto or torch$"
    ):
        choose("torch_varlen", windowed, 512, candidates, lambda call: 1.0)


def test_numbers_that_are_none_fail_the_check() -> None:
    candidates = {"torch_varlen": lambda: lambda q, *_: torch.full_like(q, float("nan"))}
    assert choose("auto", LAYOUT, 512, candidates, lambda call: 0.0).function is None


def test_a_named_one_that_is_missing_ends_the_start_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"attention is flash_attn.*No module named.*install flash-attn"):
        choose("flash_attn", LAYOUT, 512, {"flash_attn 2": missing}, lambda call: 1.0)
    assert choose("auto", LAYOUT, 512, {"flash_attn 2": missing}, lambda call: 1.0).function is None


def test_what_this_torch_has_can_be_called() -> None:
    assert callable(installed()["torch_varlen"]())


def test_every_torch_is_called_by_the_parameters_it_has() -> None:
    seen: list[dict[str, Any]] = []

    def torch_2_11(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Any:  # fmt: skip
        seen.append({"scale": scale, "window_size": window_size, "longest": (max_q, max_k)})
        return query

    def torch_2_13(*args: Any, scale: Any = None, window_size: Any = None, enable_gqa: bool = False) -> Any:
        seen.append({"window_size": window_size, "enable_gqa": enable_gqa})
        return args[0]

    def torch_2_10(query: Any, key: Any, value: Any, is_causal: bool = False) -> Any:
        return query

    arguments = (torch.zeros(2, 1, 1),) * 3 + (torch.tensor([0, 2]), 2, 0.5)
    adapt_torch(torch_2_11)(*arguments, None)
    adapt_torch(torch_2_13)(*arguments, 100)
    assert seen[0] == {"scale": 0.5, "window_size": (-1, 0), "longest": (2, 2)}
    assert seen[1] == {"window_size": (99, 0), "enable_gqa": True}
    with pytest.raises(ImportError, match="window_size"):
        adapt_torch(torch_2_10)


def test_every_flash_attn_is_called_by_the_parameters_it_has() -> None:
    seen: list[dict[str, Any]] = []

    def version_2(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
                  dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
                  window_size: tuple[int, int] = (-1, -1)) -> Any:  # fmt: skip
        seen.append({"longest": max_seqlen_k, "causal": causal, "window": window_size})
        return q

    def version_4(q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
                  softmax_scale: Any = None, causal: bool = False,
                  window_size: tuple[Any, Any] = (None, None)) -> Any:  # fmt: skip
        seen.append({"causal": causal, "window": window_size, "scale": softmax_scale})
        return q, None

    arguments = (torch.zeros(2, 1, 1),) * 3 + (torch.tensor([0, 2]), 2, 0.5)
    assert adapt(version_2)(*arguments, 64) is arguments[0]
    assert adapt(version_4)(*arguments, None) is arguments[0]
    assert seen[0] == {"longest": 2, "causal": True, "window": (63, 0)}
    assert seen[1] == {"causal": True, "window": (None, None), "scale": 0.5}
