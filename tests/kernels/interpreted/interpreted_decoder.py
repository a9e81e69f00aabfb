"""A decode step of a whole tiny model on the Triton kernels, in the interpreter: its logits, and how many launches it
takes, since a dependent launch costs a graph more than the work of a few rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from model_driver import ModelDriver
from triton.runtime.interpreter import InterpretedFunction

from lorax_backend.model import layers
from lorax_kernels import LoraBatch, dispatch, skinny_gemm, tuning

LAYERS = 2
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = ({"rank": 1, "targets": ("q_proj",)}, {"rank": 12, "targets": MODULES})
PROMPTS = [[3 + (7 * i + k) % 200 for k in range(3 + 2 * i)] for i in range(5)]
PRODUCT = {"kernel": "triton", "block_n": 16, "block_k": 32, "stages": 1, "split_k": 2}
SMALL = {"block_k": 32, "row_n": 64, "block_n": 32, "split_shift": 1}


@contextmanager
def on_triton(
    monkeypatch: pytest.MonkeyPatch, product: dict[str, object] | None = None, **config: object
) -> Iterator[None]:
    """CPU tensors go to the Triton kernels, LoRA with `config`, and base layers with `product` if that is given."""
    plain = LoraBatch.build

    def with_work(*arguments: object) -> LoraBatch | None:
        batch = plain(*arguments)
        return None if batch is None else batch.with_work("cpu")

    with monkeypatch.context() as patched:
        patched.setenv(tuning.OVERRIDE.format(kind="LORA"), json.dumps(SMALL | config))
        if product is not None:
            patched.setenv(tuning.OVERRIDE.format(kind="GEMM"), json.dumps(product))
            patched.setattr(layers, "_on_device", lambda tensor: True)
        patched.setattr(dispatch, "_uses_triton", lambda tensor: True)
        patched.setattr(LoraBatch, "build", with_work)
        tuning.forget_configs()
        yield
    tuning.forget_configs()


@pytest.fixture
def decode(
    tiny_model_path: Callable[..., Path], tiny_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, object] | None], tuple[torch.Tensor, Counter[str]]]:
    """Logits of one decode step of five sequences, on the torch path (None) or on Triton with these fields of
    `LoraConfig`, and the launches it took. The prompts are always read on the torch path."""
    monkeypatch.setattr(layers, "_packing_supported", False)  # plain weights, as on a device
    path = tiny_model_path("llama", num_hidden_layers=LAYERS, hidden_size=128)
    folders = [tiny_adapter(path, seed=i, **adapter) for i, adapter in enumerate(ADAPTERS)]
    launches: Counter[str] = Counter()
    plain_run, plain_linear = InterpretedFunction.run, torch.nn.functional.linear

    def run(self: InterpretedFunction, *arguments: object, **options: object) -> object:
        launches[self.__name__] += 1
        return plain_run(self, *arguments, **options)

    def linear(*arguments: torch.Tensor) -> torch.Tensor:
        launches["linear"] += 1
        return plain_linear(*arguments)

    def step(
        config: dict[str, object] | None,
        product: dict[str, object] | None = None,
        plain: bool = False,
        rows: int = 5,
    ) -> tuple[torch.Tensor, Counter[str]]:
        driver = ModelDriver(path, dtype="float32", num_blocks=32, max_batch_size=8, adapter_pages=8)
        slots = [driver.add_adapter(folder) for folder in folders]
        slots_of = [-1] * 5 if plain else [slots[1], slots[0], -1, slots[1], slots[1]]
        sequences = [driver.add(ids, slot) for ids, slot in zip(PROMPTS[:rows], slots_of, strict=False)]
        driver.generate(sequences, 1)
        launches.clear()
        with monkeypatch.context() as patched:
            patched.setattr(InterpretedFunction, "run", run)
            patched.setattr(torch.nn.functional, "linear", linear)
            work = [(seq, 1) for seq in sequences]
            if config is None:
                driver.step(work)
            else:
                with on_triton(monkeypatch, product, **config):
                    driver.step(work)
        return torch.stack([driver.last_logits[seq.handle] for seq in sequences]), Counter(launches)

    return step


def test_a_decode_step_gives_the_logits_of_the_torch_path_in_17_launches_a_layer(
    decode: Callable[[dict[str, object] | None], tuple[torch.Tensor, Counter[str]]],
) -> None:
    want, _ = decode(None)
    separate, before = decode({})
    torch.testing.assert_close(separate, want, atol=1e-4, rtol=1e-4)
    assert nodes_per_layer(before) == 17


def nodes_per_layer(launches: Counter[str]) -> float:
    """Without the last norm, the head and the drawing."""
    assert launches["greedy_kernel"] == 1
    return (sum(launches.values()) - 3) / LAYERS


def test_nodes_that_add_the_deltas_leave_14_launches_a_layer_and_give_the_same_logits(
    decode: Callable[[dict[str, object] | None], tuple[torch.Tensor, Counter[str]]],
) -> None:
    want, _ = decode(None)
    fused, after = decode({"fuse_norm": True, "fuse_silu": True, "fuse_block_n": 32, "fuse_row_n": 32})
    torch.testing.assert_close(fused, want, atol=1e-4, rtol=1e-4)
    assert nodes_per_layer(after) == 14 + 1 / LAYERS  # no norm comes after the last layer


FUSING = {"fuse_norm": True, "fuse_silu": True, "fuse_block_n": 32, "fuse_row_n": 32}


@pytest.mark.parametrize(
    ("rows", "plain", "nodes"),
    [(5, True, 8), (5, False, 15 + 1 / LAYERS), (1, True, 8), (1, False, 12)],
    ids=["rows", "rows with adapters", "a row", "a row with an adapter"],
)
def test_norms_sum_what_split_products_leave_and_products_do_silu(
    rows: int,
    plain: bool,
    nodes: float,
    decode: Callable[..., tuple[torch.Tensor, Counter[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several rows the first product of a layer and its last are split. No norm comes after that of the last layer,
    and what adapters add to the first comes after its sum."""
    monkeypatch.setattr(skinny_gemm, "_INTERPRETER_SMS", 16)
    skinny_gemm._num_sms.cache_clear()
    config = {"one_row_in_product": True} if rows == 1 else FUSING
    want, _ = decode(None, plain=plain, rows=rows)
    apart, before = decode(config, PRODUCT | {"fuse_silu": False, "fuse_sum": False}, plain, rows)
    got, after = decode(config, PRODUCT, plain, rows)
    skinny_gemm._num_sms.cache_clear()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(got, apart), "it is the same sums and the same rounding"
    assert before["sum_planes_kernel"] == (2 * LAYERS if rows > 1 else 0)
    assert nodes_per_layer(after) == nodes + (rows > 1) / LAYERS, after


def test_a_rotation_that_adds_the_deltas_sums_what_the_product_leaves(
    decode: Callable[..., tuple[torch.Tensor, Counter[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launches a layer fewer: expand, and the sum of the first product's parts."""
    monkeypatch.setattr(skinny_gemm, "_INTERPRETER_SMS", 16)
    skinny_gemm._num_sms.cache_clear()
    want, _ = decode(None, plain=False, rows=5)
    got, after = decode(FUSING | {"fuse_rope": True}, PRODUCT, False, 5)
    skinny_gemm._num_sms.cache_clear()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    # No norm comes after the last product: its deltas are expanded, and its parts summed.
    assert after["bgmv_expand_kernel"] == 1
    assert nodes_per_layer(after) == 13 + 2 / LAYERS, after
