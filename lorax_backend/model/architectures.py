"""The decoder-only architectures this server runs, each as one row of what it is made of.

All of them are the same pre-norm transformer (RMSNorm, rotary attention with grouped key/value heads, gated SiLU MLP);
a row says where a family differs. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WindowRule(Enum):
    """Which layers attend to the last `sliding_window` tokens only."""

    NONE = "none"
    ALL_LAYERS = "all layers"
    LISTED_LAYERS = "layers that layer_types lists, or from max_window_layers on"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row. A bias of None means that the model's config decides (`attention_bias`, `mlp_bias`, default off)."""

    model_type: str
    class_name: str
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    window: WindowRule = WindowRule.NONE
    default_head_dim: int | None = None


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama", "LlamaForCausalLM", mlp_bias=None),
        Architecture(
            "mistral", "MistralForCausalLM", qkv_bias=False, o_bias=False, window=WindowRule.ALL_LAYERS
        ),
        Architecture(
            "qwen2", "Qwen2ForCausalLM", qkv_bias=True, o_bias=False, window=WindowRule.LISTED_LAYERS
        ),
        Architecture(
            "qwen3", "Qwen3ForCausalLM", qk_norm=True, window=WindowRule.LISTED_LAYERS, default_head_dim=128
        ),
    )
}


def find_architecture(model_type: str, class_names: tuple[str, ...]) -> Architecture:
    """The row for a config.json's `model_type`.

    Raises:
        ValueError: naming the supported architectures, if this one is not among them.
    """
    row = ARCHITECTURES.get(model_type)
    if row is None or (class_names and row.class_name not in class_names):
        got = ", ".join(class_names) or model_type or "none named"
        supported = ", ".join(
            f"{known.class_name} (model_type {known.model_type})" for known in ARCHITECTURES.values()
        )
        raise ValueError(f"unsupported model architecture: {got}; supported: {supported}")
    return row
