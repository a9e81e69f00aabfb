"""Where LoRA deltas are added in a model: the mapping from module names of checkpoints to places in adapter pages."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_backend.model.config import ModelConfig
from lorax_kernels.layout import LoraSite, PageLayout

LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """One linear layer that an adapter may change: slice number `slice` of page site `site`. Its A is
    [rank, in_features], its B [out_features, rank]."""

    site: str
    slice: int
    in_features: int
    out_features: int


def _layer_sites(config: ModelConfig) -> dict[str, tuple[LoraSite, tuple[str, ...]]]:
    """Sites of one decoder layer, each with the names of the modules fused in it, in slice order."""
    hidden, q, kv, wide = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    return {
        "qkv": (LoraSite(hidden, (q, kv, kv)), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        "o": (LoraSite(q, (hidden,)), ("self_attn.o_proj",)),
        "gate_up": (LoraSite(hidden, (wide, wide)), ("mlp.gate_proj", "mlp.up_proj")),
        "down": (LoraSite(wide, (hidden,)), ("mlp.down_proj",)),
    }


def page_layout(config: ModelConfig) -> PageLayout:
    """The layout of adapter pages for this model: sites 'layers.{i}.qkv', '.o', '.gate_up', '.down' and 'lm_head'."""
    sites = {
        f"layers.{layer}.{name}": site
        for layer in range(config.num_layers)
        for name, (site, _) in _layer_sites(config).items()
    }
    sites[LM_HEAD] = LoraSite(config.hidden_size, (config.vocab_size,))
    return PageLayout(sites)


def lora_targets(config: ModelConfig) -> dict[str, LoraTarget]:
    """Every linear layer an adapter may change, by its module path in a Hugging Face checkpoint
    ('model.layers.0.self_attn.q_proj', ..., 'lm_head')."""
    targets = {
        f"model.layers.{layer}.{module}": LoraTarget(
            f"layers.{layer}.{name}", index, site.in_features, site.out_slices[index]
        )
        for layer in range(config.num_layers)
        for name, (site, modules) in _layer_sites(config).items()
        for index, module in enumerate(modules)
    }
    targets[LM_HEAD] = LoraTarget(LM_HEAD, 0, config.hidden_size, config.vocab_size)
    return targets
