"""Long prompts in attention for sequences of one length: which rows go there, and which shapes it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_driver import ModelDriver

from lorax_backend.model import long_prompts
from lorax_backend.model.fresh_case import FreshCase
from lorax_backend.model.fresh_libraries import adapt_cudnn, installed
from lorax_backend.model.head_layout import HeadLayout
from lorax_backend.model.long_prompts import SHORTEST, LongPrompts
from lorax_backend.model.varlen import choose
from lorax_kernels import AttentionBatch

LAYOUT = HeadLayout(6, 2, 16, (None,), torch.float32, torch.device("cpu"))


class FakeCudnn:
    """Takes what `aten._scaled_dot_product_cudnn_attention` takes, and remembers the shapes it would make plans for."""

    def __init__(self, broken: tuple[int, int] | None = None) -> None:
        self.keys: list[tuple[Any, ...]] = []
        self.broken = broken

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(sizes[0], sizes[2]) for sizes, *_ in self.keys]

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: None, compute_log_sumexp: bool,
        dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        assert (attn_bias, compute_log_sumexp, dropout_p, is_causal) == (None, False, 0.0, True)
        assert q.shape[2] == k.shape[2] == v.shape[2]
        self.keys.append((tuple(q.shape), q.stride(), k.stride(), v.stride()))
        if self.shapes[-1] == self.broken:
            raise RuntimeError("No execution plans support the graph.")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True), None


def takes_all(q: torch.Tensor, num_kv_heads: int) -> None:
    return None


def fitted(fake: Callable[..., Any], max_tokens: int = 8192, layout: HeadLayout = LAYOUT) -> LongPrompts:
    function = adapt_cudnn(fake, takes_all)
    function.fit(layout, max_tokens)
    return function


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that are long at lengths a CPU has done at once."""
    monkeypatch.setattr(long_prompts, "SHORTEST", 32)
    monkeypatch.setattr(long_prompts, "_TOGETHER", {16: (3, 4), 32: (2, 3)})


def batch_of(queries: list[int], contexts: list[int]) -> AttentionBatch:
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    tables = np.zeros((len(queries), 1024), np.int32)
    slots = np.zeros(starts[-1], dtype=np.int64)
    return AttentionBatch.build(starts, np.array(contexts, np.int32), tables, slots, "cpu")


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        ([2048] * 4, [(4, 2048)]),
        ([2048] * 3 + [2020], [(3, 2048), (1, 1920)]),
        ([2047] * 2, [(1, 1920)] * 2),
        ([8192], [(1, 8192)]),
        ([5000, 300, 1024], [(1, 4608), (1, 1024)]),
        ([512] * 6 + [1024], [(6, 512), (1, 1024)]),
        ([512] * 3 + [1023], []),
        ([1024] * 7, [(6, 1024), (1, 1024)]),
    ],
)
def test_a_prompt_s_first_rows_go_as_many_as_there_is_a_shape_for(
    lengths: list[int], shapes: list[tuple[int, int]]
) -> None:
    thin = HeadLayout(1, 1, 8, (None,), torch.float32, torch.device("cpu"))
    seen: list[tuple[int, int]] = []

    def only_looks(q: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        seen.append((q.shape[0], q.shape[2]))
        return (q,)

    function = fitted(only_looks, 8192, thin)
    for index, shape in function._calls(lengths):
        assert set(lengths[index : index + shape[0]]) == {lengths[index]}
        assert lengths[index] >= shape[1] >= lengths[index] * 7 / 8
        seen.append(shape)
    assert seen == shapes
    assert set(seen) <= function.shapes


def test_there_are_few_shapes_and_none_that_no_step_has_room_for() -> None:
    assert len(fitted(FakeCudnn(), 8192).shapes) < 45
    assert len(fitted(FakeCudnn(), 32768).shapes) < 65
    assert all(count * length <= 2500 for count, length in fitted(FakeCudnn(), 2500).shapes)


@pytest.mark.usefixtures("small")
def test_the_answer_is_that_of_float64_for_any_mix_of_lengths() -> None:
    fake = FakeCudnn()
    function = fitted(fake, 512)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.sampled_from([1, 7, 16, 31, 32, 33, 61, 64, 65, 100]), min_size=1, max_size=9))
    def agrees(lengths: list[int]) -> None:
        case = FreshCase.random(LAYOUT, lengths, seed=sum(lengths))
        want = case.expected(None)
        torch.testing.assert_close(case.run(function, None).double(), want, atol=1e-5, rtol=1e-5)

    agrees()
    assert set(fake.shapes) >= {(1, 32), (1, 60), (1, 64), (1, 96)}
    assert set(fake.shapes) <= function.shapes
    strides = {key[1:] for key in fake.keys}
    assert len(strides) <= len(set(fake.shapes)), "a shape with other strides is another plan"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=str)
def test_a_neighbour_s_numbers_do_not_get_in(value: float) -> None:
    """Not even into rows that lie in one call, nor through keys that a mask would hide."""
    function = fitted(FakeCudnn(), 512)
    lengths = (32, 50, 32, 32, 32, 9, 61)
    for spoiled in range(len(lengths)):
        case, clean = (FreshCase.random(LAYOUT, lengths, seed=1) for _ in range(2))
        first, last = sum(lengths[:spoiled]), sum(lengths[: spoiled + 1])
        slots = case.batch.slot_mapping[first:last]
        for rows in (case.queries[first:last], case.values[first:last]):
            rows.fill_(value)
        for store in case.cache:
            store.view(-1, *store.shape[2:])[slots] = value
        got, want = case.run(function, None), clean.run(function, None)
        assert torch.equal(got[:first], want[:first])
        assert torch.equal(got[last:], want[last:])
        assert not torch.equal(got[first:last], want[first:last])


@pytest.mark.usefixtures("small")
def test_any_mix_of_steps_of_a_model_gives_what_it_gives_without(
    tiny_model_path: Callable[..., Path],
) -> None:
    """Decodes, chunks over a cached context, and fresh prompts, of which some rows are cuDNN's."""
    results = []
    fake = FakeCudnn()
    for wanted in (False, True):
        driver = ModelDriver(tiny_model_path("llama"))
        config = driver.runner.model_config
        if wanted:
            layout = HeadLayout(
                config.num_heads, config.num_kv_heads, config.head_dim, (None,), torch.float32, LAYOUT.device
            )
            driver.runner.decoder.fresh_attention = fitted(fake, 512, layout)
        rng = np.random.default_rng(5)
        lengths = (70, 90, 9, 41, 32, 32, 33)
        sequences = [driver.add(rng.integers(3, 384, n).tolist()) for n in lengths]
        seen = []
        for work in (
            [(0, 70), (1, 40)],
            [(2, 9), (1, 50), (0, 1), (3, 41)],
            [(4, 32), (5, 32), (2, 1), (0, 1), (6, 33)],
            [(0, 1), (5, 1), (2, 1)],
        ):
            result = driver.step([(sequences[index], count) for index, count in work])
            sampled = [sequences[index] for index, count in sorted(work, key=lambda pair: pair[1] > 1)
                       if sequences[index].num_computed == len(sequences[index].token_ids)]  # fmt: skip
            for seq, token in zip(sampled, result.token_ids, strict=True):
                seen.append(driver.last_logits[seq.handle])
                seq.token_ids.append(token)
        results.append(seen)
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)
    layers = config.num_layers
    each = ([(1, 64), (1, 40)], [(1, 40)], [(2, 32), (1, 32)])
    assert fake.shapes == [shape for step in each for _ in range(layers) for shape in step]


@pytest.mark.usefixtures("small")
def test_what_it_was_not_made_for_goes_to_our_own_kernel() -> None:
    fake = FakeCudnn()
    function = fitted(fake, 512)
    case = FreshCase.random(LAYOUT, (64, 50), seed=0)
    torch.testing.assert_close(case.run(function, 20).double(), case.expected(20), atol=1e-5, rtol=1e-5)
    packed = replace(case, values=case.values.contiguous())
    torch.testing.assert_close(packed.run(function, None).double(), case.expected(None), atol=1e-5, rtol=1e-5)
    assert fake.keys == []
    case.run(function, None)
    assert fake.shapes == [(1, 64), (1, 48)]


def test_a_chunk_over_a_cached_context_is_no_prompt_that_begins_here() -> None:
    function = fitted(FakeCudnn())
    assert function._split(batch_of([1, 2048, 1023], [4096, 4096, 1023])) is None
    split = function._split(batch_of([1, 2048, 2048], [4096, 4096, 2048]))
    assert split is not None
    assert split.first == 2049
    assert split.rest is not None
    assert split.rest.query_start.tolist() == [0, 1, 2049]


@pytest.mark.usefixtures("small")
def test_after_the_start_only_shapes_are_asked_for_that_have_been_tried_and_are_faster() -> None:
    fake = FakeCudnn()

    def timer(call: Callable[[], object]) -> float:
        """Half of our own time, but for three prompts at once, which take longer than ours."""
        before = len(fake.keys)
        call()
        if len(fake.keys) == before:
            return 1.0
        return 1.1 if fake.shapes[-1][0] == 3 else 0.5

    function = adapt_cudnn(fake, takes_all)
    choice = choose("auto", LAYOUT, 100, {"torch_cudnn": lambda: function}, timer)
    assert (choice.name, choice.function) == ("torch_cudnn", function)
    every = fitted(FakeCudnn(), 100).shapes
    assert function.shapes == {shape for shape in every if shape[0] != 3}
    assert f"; {len(function.shapes)} of {len(every)} shapes in " in choice.description
    tried = {key for key in fake.keys if (key[0][0], key[0][2]) in function.shapes}
    fake.keys.clear()
    rng = np.random.default_rng(0)
    for seed in range(60):
        lengths = rng.choice([5, 16, 32, 33, 40, 64, 70, 96], size=rng.integers(1, 4)).tolist()
        FreshCase.random(LAYOUT, lengths, seed).run(function, None)
    assert fake.keys
    assert set(fake.keys) <= tried, "nothing is built while serving"


@pytest.mark.usefixtures("small")
def test_prompts_of_a_shape_that_cannot_be_had_are_cut_to_the_next() -> None:
    fake = FakeCudnn(broken=(1, 72))
    function = adapt_cudnn(fake, takes_all)
    choice = choose("torch_cudnn", LAYOUT, 100, {"torch_cudnn": lambda: function}, lambda call: 1.0)
    assert choice.description.startswith("torch_cudnn (as configured; ")
    assert function.shapes == fitted(FakeCudnn(), 100).shapes - {(1, 72)}
    fake.keys.clear()
    FreshCase.random(LAYOUT, (75,), 0).run(function, None)
    assert fake.shapes == [(1, 64)]


def test_models_and_steps_that_it_is_not_for_are_refused_with_the_reason() -> None:
    def error(layout: HeadLayout, max_tokens: int, refusal: Any = takes_all) -> str:
        with pytest.raises(ValueError, match="attention is torch_cudnn, which cannot be used here") as caught:
            choose(
                "torch_cudnn", layout, max_tokens, {"torch_cudnn": lambda: adapt_cudnn(FakeCudnn(), refusal)}
            )
        return str(caught.value)

    assert "no sliding windows" in error(replace(LAYOUT, windows=(None, 4096)), 8192)
    assert f"max_batch_tokens is {SHORTEST - 1}" in error(LAYOUT, SHORTEST - 1)
    assert "heads are odd" in error(LAYOUT, 8192, lambda q, kv: f"heads are odd: {q.shape[1]} {kv}")


@pytest.mark.usefixtures("small")
def test_what_forgets_the_mask_or_gives_no_numbers_is_not_used() -> None:
    def sees_all(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, scale: float
    ) -> tuple[torch.Tensor]:
        return (F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True),)

    def no_numbers(q: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (torch.full_like(q, float("nan")),)

    for wrong in (sees_all, no_numbers):
        candidates = {"torch_cudnn": lambda wrong=wrong: adapt_cudnn(wrong, takes_all)}
        assert choose("auto", LAYOUT, 256, candidates, lambda call: 0.0).function is None
        with pytest.raises(ValueError, match=r"none of \d+ shapes passes; .* tokens: off by .* from our own"):
            choose("torch_cudnn", LAYOUT, 256, candidates, lambda call: 0.0)


@pytest.mark.usefixtures("small")
def test_none_that_is_faster_leaves_our_own_kernel() -> None:
    fake = FakeCudnn()
    candidates = {"torch_cudnn": lambda: adapt_cudnn(fake, takes_all)}
    assert choose("auto", LAYOUT, 256, candidates, lambda call: 1.0).name == "torch"
    assert set(fake.shapes) == fitted(FakeCudnn(), 256).shapes


def test_this_torch_has_it_and_says_that_a_cpu_cannot_run_it() -> None:
    function = installed()["torch_cudnn"]()
    assert isinstance(function, LongPrompts)
    with pytest.raises(ValueError, match=r"no cuDNN attention for 6 heads on 2 of 16 in torch\.float32"):
        function.fit(LAYOUT, 8192)
