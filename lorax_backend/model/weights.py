"""The weights of a model: allocated once in the form the forward pass wants, filled from safetensors or at random.

Layers that share their input are fused: q, k and v in one matrix, gate and up in another. Checkpoint tensors are
copied straight into their rows of the fused ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorax_backend.model.config import ModelConfig
from lorax_backend.model.layers import Linear

Progress = Callable[[str], None]
_LISTED_PROBLEMS = 12
_DUMMY_STD = 0.02


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer. Norm weights are [hidden]; qk_norms, of queries and keys, [head_dim] where the family has
    them."""

    input_norm: torch.Tensor
    qkv: Linear
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(slots=True)
class ModelWeights:
    """All weights; `embedding` is [vocab, hidden]. With tied embeddings `lm_head` starts on the same memory."""

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    lm_head: Linear
    nbytes: int

    def pack(self) -> None:
        """Put the linear layers into the CPU's fast format, see `Linear.pack`."""
        for layer in self.layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                linear.pack()
        self.lm_head.pack()


def allocate_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[ModelWeights, dict[str, torch.Tensor]]:
    """Uninitialised weights, and the view each checkpoint tensor is to be copied into, by its name."""
    names: dict[str, torch.Tensor] = {}

    def vector(name: str, size: int) -> torch.Tensor:
        names[name] = torch.empty(size, dtype=dtype, device=device)
        return names[name]

    def linear(
        prefix: str, modules: tuple[str, ...], sizes: tuple[int, ...], shape: tuple[int, bool]
    ) -> Linear:
        in_features, with_bias = shape
        weight = torch.empty(sum(sizes), in_features, dtype=dtype, device=device)
        bias = torch.empty(sum(sizes), dtype=dtype, device=device) if with_bias else None
        for module, rows in zip(modules, weight.split(sizes), strict=True):
            names[f"{prefix}{module}.weight"] = rows
        if bias is not None:
            for module, rows in zip(modules, bias.split(sizes), strict=True):
                names[f"{prefix}{module}.bias"] = rows
        return Linear(weight, bias)

    def layer(prefix: str) -> LayerWeights:
        hidden, q, kv, wide = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return LayerWeights(
            input_norm=vector(prefix + "input_layernorm.weight", hidden),
            qkv=linear(
                attention, ("q_proj", "k_proj", "v_proj"), (q, kv, kv), (hidden, config.attention_bias)
            ),
            qk_norms=(
                vector(attention + "q_norm.weight", config.head_dim),
                vector(attention + "k_norm.weight", config.head_dim),
            )
            if config.qk_norm
            else None,
            o=linear(attention, ("o_proj",), (hidden,), (q, config.o_bias)),
            post_norm=vector(prefix + "post_attention_layernorm.weight", hidden),
            gate_up=linear(mlp, ("gate_proj", "up_proj"), (wide, wide), (hidden, config.mlp_bias)),
            down=linear(mlp, ("down_proj",), (hidden,), (wide, config.mlp_bias)),
        )

    embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
    names["model.embed_tokens.weight"] = embedding
    layers = [layer(f"model.layers.{index}.") for index in range(config.num_layers)]
    norm = vector("model.norm.weight", config.hidden_size)
    if config.tie_word_embeddings:
        head = Linear(embedding)
    else:
        head = linear("", ("lm_head",), (config.vocab_size,), (config.hidden_size, False))
    nbytes = sum(view.numel() * view.element_size() for view in names.values())
    return ModelWeights(embedding, layers, norm, head, nbytes), names


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> ModelWeights:
    """Fill the weights from the safetensors files of a Hugging Face model folder.

    Raises:
        ValueError: a file is missing or broken, or tensors are missing, unexpected or of another shape; all of these
            are listed together.
    """
    weights, views = allocate_weights(config, dtype, device)
    missing = dict(views)
    unexpected: list[str] = []
    misshaped: list[str] = []
    done = 0
    for label, name, tensor in _tensors(folder, _shards(folder)):
        view = missing.pop(name, None)
        if view is None:
            if not _ignorable(name, config):
                unexpected.append(name)
        elif tensor.shape != view.shape:
            misshaped.append(f"{name} is {list(tensor.shape)}, the config says {list(view.shape)}")
        else:
            view.copy_(tensor)
            done = _report(progress, label, (done, done + view.numel() * view.element_size(), weights.nbytes))
    problems = [
        f"{kind}: {_shortened(names)}"
        for kind, names in (
            ("missing", list(missing)),
            ("unexpected", unexpected),
            ("wrong shape", misshaped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{folder}: the checkpoint does not fit its config.json; tensors " + "; ".join(problems)
        )
    return weights


def dummy_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int) -> ModelWeights:
    """Random weights of the right shapes, made on the device: normal with standard deviation 0.02, norms all 1."""
    weights, views = allocate_weights(config, dtype, device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, view in views.items():
        if name.endswith("norm.weight"):
            view.fill_(1.0)
        else:
            view.normal_(0.0, _DUMMY_STD, generator=generator)
    return weights


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: cannot be read: {error}") from None
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(
                f"{folder}: weight files are missing: {_shortened(absent)}; download the model again"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not found:
        hint = "; convert its .bin files to safetensors" if list(folder.glob("*.bin")) else ""
        raise ValueError(f"{folder}: no safetensors weights found{hint}")
    return found


def _tensors(folder: Path, shards: list[Path]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(which shard, tensor name, tensor) for every tensor of the checkpoint; one is in memory at a time."""
    for number, shard in enumerate(shards, 1):
        label = f"file {number} of {len(shards)}"
        try:
            with safe_open(shard, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                    yield label, name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(
                f"{folder / shard.name}: broken or cut off ({error}); download it again"
            ) from None


def _ignorable(name: str, config: ModelConfig) -> bool:
    """Tensors some checkpoints carry although they can be derived from others."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _report(progress: Progress | None, label: str, counted: tuple[int, int, int]) -> int:
    """Tell `progress` when another tenth of the bytes is in; `counted` is before, after, total."""
    before, after, total = counted
    if progress is not None and after * 10 // total != before * 10 // total:
        progress(f"loading weights: {after * 100 // total}% ({label})")
    return after


def _shortened(names: list[str]) -> str:
    more = len(names) - _LISTED_PROBLEMS
    return ", ".join(names[:_LISTED_PROBLEMS]) + (f" and {more} more" if more > 0 else "")
