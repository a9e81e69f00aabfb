"""Adapters in pages do what PEFT does with the same files."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PREFIX, TINY, Base, lora_config, lora_tensors, write_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lorax_kernels.layout import PAGE_RANK, pages_for_rank

EXAMPLES = (
    "json-extract pirate shout tag-cedar tag-falcon tag-maple tag-otter ticket-label".split()  # noqa: SIM905
)
Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def peft_smollm2(adapters_path: Path, smollm2: Base) -> PeftModel:
    """A base of SmolLM2's shape (its weights do not matter here) with all example adapters put on by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LlamaConfig(
            **{key: value for key, value in smollm2.config.items() if key != "architectures"}
        )
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        base.to_empty(device="cpu")
        model = PeftModel.from_pretrained(base, str(adapters_path / EXAMPLES[0]), adapter_name=EXAMPLES[0])
        for name in EXAMPLES[1:]:
            model.load_adapter(str(adapters_path / name), adapter_name=name)
    return model


def peft_layers(model: PeftModel, adapter: str) -> dict[str, Any]:
    """PEFT's layers that have this adapter, by the base model's module path."""
    layers = model.get_base_model().named_modules()
    return {name: layer for name, layer in layers if adapter in getattr(layer, "lora_A", {})}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_delta_of_the_example_adapters_equals_pefts(
    name: str, adapters_path: Path, smollm2: Base, peft_smollm2: PeftModel
) -> None:
    adapter = smollm2.load(adapters_path / name)
    expected = peft_layers(peft_smollm2, name)
    assert set(adapter.modules) == set(expected)
    for module, layer in expected.items():
        a, b = smollm2.factors(adapter, module)
        rank, scaling = layer.r[name], layer.scaling[name]
        assert torch.equal(a[:rank], layer.lora_A[name].weight), module
        torch.testing.assert_close(
            b[:rank].T, layer.lora_B[name].weight * scaling, rtol=1e-6, atol=0, msg=module
        )
        if any(part in module for part in ("layers.0.", "layers.15.", "layers.29.v", "lm_head")):
            delta = layer.get_delta_weight(name)
            torch.testing.assert_close(
                smollm2.delta(adapter, module), delta, rtol=1e-5, atol=1e-6, msg=module
            )


@pytest.mark.parametrize("name", EXAMPLES)
def test_pages_follow_the_rank_and_hold_nothing_else(name: str, adapters_path: Path, smollm2: Base) -> None:
    adapter = smollm2.load(adapters_path / name)
    rank = json.loads((adapters_path / name / "adapter_config.json").read_text())["r"]
    assert (adapter.rank, adapter.num_pages) == (rank, pages_for_rank(rank))
    assert adapter.nbytes == adapter.num_pages * smollm2.layout.page_size * 4
    weights = load_file(adapters_path / name / "adapter_model.safetensors")
    assert int(adapter.pages.count_nonzero()) <= sum(tensor.numel() for tensor in weights.values())
    assert adapter.sites == {smollm2.targets[module].site for module in adapter.modules}
    untouched = set(smollm2.layout.sites) - adapter.sites
    assert all(not smollm2.layout.a_view(adapter.pages, site).any() for site in untouched)


def tiny_peft(tmp_path: Path, config: LoraConfig) -> PeftModel:
    """A tiny Llama with a random adapter, saved as PEFT saves it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_config(
            LlamaConfig(**{k: v for k, v in TINY.items() if k != "architectures"})
        )
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    return model


ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ALL_SEVEN, "r": 3, "lora_alpha": 5},
        {"target_modules": [*ALL_SEVEN, "lm_head"], "r": 11, "lora_alpha": 4, "use_rslora": True},
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 17, r"layers\.2\.\w+\.q_proj": 1},
        },
        {
            "target_modules": ["q_proj", "v_proj"],
            "alpha_pattern": {"layers.1.self_attn.v_proj": 64, "^model.*q_proj": 3},
        },
        {
            "target_modules": ALL_SEVEN,
            "use_rslora": True,
            "rank_pattern": {".*mlp.*": 9},
            "alpha_pattern": {"up_proj": 7},
        },
        {"target_modules": ["o_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["o_proj", "k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*layers\.[01]\..*(q|gate)_proj"},
        {"target_modules": ["self_attn.q_proj", "model.layers.2.mlp.up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
        {"target_modules": ALL_SEVEN, "exclude_modules": r".*\.mlp\..*"},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.5},
    ],
    ids=lambda options: "+".join(options),
)
def test_what_peft_saves_has_the_deltas_peft_computes(
    options: dict[str, Any], tmp_path: Path, tiny: Base
) -> None:
    model = tiny_peft(tmp_path, LoraConfig(task_type="CAUSAL_LM", **options))
    adapter = tiny.load(tmp_path)
    expected = peft_layers(model, "default")
    assert set(adapter.modules) == set(expected)
    assert expected
    for module, layer in expected.items():
        delta = layer.get_delta_weight("default")
        torch.testing.assert_close(tiny.delta(adapter, module), delta, rtol=1e-5, atol=1e-5, msg=module)


RENAMINGS: dict[str, Callable[[str], str]] = {
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "without PEFT's prefix": lambda name: name.removeprefix(PREFIX),
    "without any prefix": lambda name: name.removeprefix(PREFIX + "model."),
    "trained on the bare backbone": lambda name: name.replace(PREFIX + "model.", PREFIX),
    "wrapped twice": lambda name: name.replace(PREFIX, PREFIX + "model."),
    "compiled": lambda name: name.replace(PREFIX, PREFIX + "_orig_mod."),
    "in a data-parallel module": lambda name: "module." + name,
    "trained on a vision-language model": lambda name: name.replace(
        "model.layers", "model.language_model.layers"
    ),
}


@pytest.mark.parametrize("rename", RENAMINGS.values(), ids=RENAMINGS.keys())
def test_other_trainers_names_find_the_same_modules(
    rename: Callable[[str], str], tmp_path: Path, tiny: Base
) -> None:
    tensors = lora_tensors(tiny.targets, [Q0, DOWN1])
    config = lora_config([Q0, DOWN1])
    plain = tiny.load(write_adapter(tmp_path / "plain", config, tensors))
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    other = tiny.load(write_adapter(tmp_path / "other", config, renamed))
    assert torch.equal(plain.pages, other.pages)
    assert other.modules == (Q0, DOWN1)


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 16, 33, 64])
def test_any_rank_is_padded_with_zeros_only(rank: int, make_adapter: Callable[..., Path], tiny: Base) -> None:
    adapter = tiny.load(make_adapter(modules=(Q0,), rank=rank))
    a = tiny.layout.a_view(adapter.pages, "layers.0.qkv")[:, 0].reshape(-1, 32)
    assert a.shape[0] == pages_for_rank(rank) * PAGE_RANK
    assert a[:rank].all(dim=1).all()
    assert not a[rank:].any()
    assert not tiny.layout.a_view(adapter.pages, "layers.0.qkv")[:, 1:].any(), (
        "k and v are not this adapter's"
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16])
def test_the_scaling_is_applied_before_the_cast(
    stored: torch.dtype, served: torch.dtype, tmp_path: Path, tiny: Base
) -> None:
    tensors = lora_tensors(tiny.targets, [Q0], rank=3, dtype=stored)
    adapter = tiny.load(write_adapter(tmp_path, lora_config([Q0], 3, lora_alpha=7), tensors), served)
    b = tiny.layout.b_view(adapter.pages, "layers.0.qkv")[0, :3, :32]
    expected = (tensors[f"{PREFIX}{Q0}.lora_B.weight"].to(torch.float32) * (7 / 3)).to(served).T
    assert adapter.pages.dtype == served
    assert torch.equal(b, expected)


def test_weights_may_be_split_over_files(tmp_path: Path, tiny: Base) -> None:
    tensors = lora_tensors(tiny.targets, [Q0, DOWN1])
    whole = tiny.load(write_adapter(tmp_path / "whole", lora_config([Q0, DOWN1]), tensors))
    (tmp_path / "split").mkdir()
    for index, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / "split" / f"adapter_{index}.safetensors")
    write_adapter(tmp_path / "split", lora_config([Q0, DOWN1]), None)
    (tmp_path / "split" / "training_args.safetensors").write_bytes(b"not weights")
    assert torch.equal(tiny.load(tmp_path / "split").pages, whole.pages)


def test_an_adapter_of_an_8b_model_is_read_in_a_moment(tmp_path: Path) -> None:
    from dataclasses import replace

    from lorax_backend.model.config import ModelConfig
    from lorax_backend.model.lora import lora_targets, page_layout

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    config = replace(
        ModelConfig.from_folder(tmp_path),
        hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    )  # fmt: skip
    base = Base({}, lora_targets(config), page_layout(config))
    modules = [module for module in base.targets if module != "lm_head"]
    folder = write_adapter(
        tmp_path / "adapter",
        lora_config(modules, 16),
        lora_tensors(base.targets, modules, 16, dtype=torch.bfloat16),
    )
    started = time.thread_time()
    adapter = base.load(folder, torch.bfloat16)
    assert time.thread_time() - started < 5.0  # a third of one on an idle machine
    assert len(adapter.modules) == 224
