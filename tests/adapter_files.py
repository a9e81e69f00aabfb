"""PEFT adapters made on the spot, right ones and wrong ones, and the bases they are for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorax_backend.adapters.checkpoint import AdapterInspector
from lorax_backend.adapters.host_adapter import HostAdapter
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.lora import LoraTarget, lora_targets, page_layout
from lorax_kernels.layout import PageLayout

PREFIX = "base_model.model."
_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
SMOLLM2 = {
    **_COMMON,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
TINY = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Base:
    """A base model's shape, as adapters see it."""

    config: Mapping[str, Any]
    targets: Mapping[str, LoraTarget]
    layout: PageLayout

    def inspector(
        self, dtype: torch.dtype = torch.float32, max_rank: int = 64, **more: Any
    ) -> AdapterInspector:
        return AdapterInspector(self.targets, self.layout, dtype, max_rank, **more)

    def load(self, folder: Path, dtype: torch.dtype = torch.float32, max_rank: int = 64) -> HostAdapter:
        return self.inspector(dtype, max_rank).inspect(folder).load()

    def factors(self, adapter: HostAdapter, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [padded rank, in] and scaled, transposed B [padded rank, out] of a module, through the views of pages."""
        target = self.targets[module]
        offset = sum(self.layout.sites[target.site].out_slices[: target.slice])
        a = self.layout.a_view(adapter.pages, target.site)[:, target.slice]
        b = self.layout.b_view(adapter.pages, target.site)[:, :, offset : offset + target.out_features]
        return a.reshape(-1, target.in_features), b.reshape(-1, target.out_features)

    def delta(self, adapter: HostAdapter, module: str) -> torch.Tensor:
        """[out, in]: what the adapter adds to a module's weight."""
        a, b = self.factors(adapter, module)
        return b.float().T @ a.float()


def make_base(folder: Path, config: Mapping[str, Any]) -> Base:
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig.from_folder(folder)
    return Base(config, lora_targets(model), page_layout(model))


def lora_tensors(
    targets: Mapping[str, LoraTarget],
    modules: Iterable[str],
    rank: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Random A [rank, in] and B [out, rank] for modules of the base, named as PEFT names them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        target = targets[module]
        a = torch.randn(rank, target.in_features, generator=generator)
        b = torch.randn(target.out_features, rank, generator=generator)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.to(dtype)
    return tensors


def lora_config(modules: Iterable[str], rank: int = 4, **changes: Any) -> dict[str, Any]:
    """An adapter_config.json for these modules."""
    names = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names, "bias": "none"}
    return {**config, **changes}


def write_adapter(
    folder: Path, config: Mapping[str, Any] | None, tensors: Mapping[str, torch.Tensor] | None
) -> Path:
    """Write what is given; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    """All files of a folder, to be put on a hub."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
