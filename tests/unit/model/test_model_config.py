"""Reading config.json: old and new spellings, every family's differences, and clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_backend.model.config import ModelConfig
from lorax_backend.model.layers import rope_frequencies
from lorax_backend.model.lora import lora_targets, page_layout

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def test_fields_that_old_configs_leave_out_get_the_usual_values() -> None:
    config = ModelConfig.from_dict(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (4, 16, 10000.0)
    assert not any((config.tie_word_embeddings, config.attention_bias, config.mlp_bias, config.qk_norm))
    assert config.layer_windows == (None, None)


def test_old_and_new_spellings_of_rope_and_dtype_mean_the_same() -> None:
    old = ModelConfig.from_dict(
        LLAMA
        | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_ROPE}, "torch_dtype": "bfloat16"}
    )
    new = ModelConfig.from_dict(
        LLAMA
        | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}, "dtype": "bfloat16"}
    )
    assert old == new


def test_families_differ_by_their_row() -> None:
    qwen2 = ModelConfig.from_dict(QWEN2)
    assert (qwen2.attention_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = ModelConfig.from_dict(LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.attention_bias) == (128, True, False)
    biased = ModelConfig.from_dict(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert (biased.attention_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)
    mistral = ModelConfig.from_dict(
        LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 32}
    )
    assert (mistral.sliding_window, mistral.layer_windows) == (32, (32, 32))


def test_a_mistral_config_without_the_window_field_means_4096_and_null_means_none() -> None:
    raw = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    assert ModelConfig.from_dict(raw).sliding_window == 4096
    assert ModelConfig.from_dict(raw | {"sliding_window": None}).sliding_window is None


def test_qwen_windows_only_the_layers_it_says_and_only_if_switched_on() -> None:
    windowed = QWEN2 | {"sliding_window": 16, "max_window_layers": 1}
    assert ModelConfig.from_dict(windowed).layer_windows == (None, None)
    assert ModelConfig.from_dict(windowed | {"use_sliding_window": True}).layer_windows == (None, 16)
    listed = windowed | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    assert ModelConfig.from_dict(listed).layer_windows == (16, None)


def test_end_ids_come_from_the_generation_config_if_it_has_any() -> None:
    raw = LLAMA | {"eos_token_id": 2, "bos_token_id": 1}
    assert ModelConfig.from_dict(raw).eos_token_ids == (2,)
    assert ModelConfig.from_dict(raw, {"eos_token_id": [2, 7]}).eos_token_ids == (2, 7)
    assert ModelConfig.from_dict(LLAMA).eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            ["GPT2LMHeadModel", "LlamaForCausalLM"],
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["longrope", "llama3"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "high_freq_factor"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
        ({"hidden_size": "64"}, ["hidden_size"]),
        ({"torch_dtype": "int8"}, ["int8"]),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\w") as refused:
        ModelConfig.from_dict(LLAMA | changes)
    assert all(word in str(refused.value) for word in words)


def test_a_folder_without_config_or_with_broken_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "bloom", "architectures": []}))
    with pytest.raises(ValueError, match=r"config\.json: unsupported model architecture: bloom"):
        ModelConfig.from_folder(tmp_path)


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", **LLAMA3_ROPE},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: "-".join(map(str, rope.values())))
def test_rope_frequencies_equal_transformers(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = LLAMA | {"rope_parameters": rope | {"rope_theta": 10000.0}, "head_dim": 64}
    config = ModelConfig.from_dict(raw)
    peer = LlamaRotaryEmbedding(LlamaConfig(**raw))
    frequencies, factor = rope_frequencies(config.rope, config.head_dim)
    torch.testing.assert_close(frequencies, peer.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(float(peer.attention_scaling))


def test_targets_cover_every_linear_layer_with_its_place_in_the_pages(
    tiny_model_path: Callable[..., Path],
) -> None:
    folder = tiny_model_path("llama")
    config = ModelConfig.from_folder(folder)
    layout, targets = page_layout(config), lora_targets(config)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        linear = {name.removesuffix(".weight"): file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
    linear = {name: shape for name, shape in linear.items() if name.endswith(("_proj", "lm_head"))}
    assert set(linear) == set(targets)
    for name, target in targets.items():
        site = layout.sites[target.site]
        assert (target.out_features, target.in_features) == tuple(linear[name])
        assert (site.in_features, site.out_slices[target.slice]) == (target.in_features, target.out_features)
