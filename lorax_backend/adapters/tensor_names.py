"""Names of tensors in adapter files, and the layer of the base model each belongs to. Standard library only.

PEFT writes `base_model.model.<module>.lora_A.weight`; other trainers leave the prefix out, keep the adapter's name
(`lora_A.default.weight`), or add a wrapper of their own (`_orig_mod`, `module`, `language_model`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

LORA_A = "lora_A"
LORA_B = "lora_B"

_WRAPPERS = frozenset({"base_model", "model", "language_model", "text_model", "_orig_mod", "module"})
_LORA_WEIGHT = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B)(?:\.(?P<adapter>[^.]+))?\.weight")
_UNSUPPORTED = (
    (
        "lora_embedding_",
        "LoRA on an embedding is not supported; train without embed_tokens in target_modules",
    ),
    ("lora_magnitude_vector", "DoRA is not supported (use_dora)"),
    ("trainable_tokens_", "trained token embeddings are not supported (trainable_token_indices)"),
    ("modules_to_save", "fully trained modules are not supported (modules_to_save)"),
    ("lora_diag", "KaSA is not supported (kasa_config)"),
)
_FULL_WEIGHTS = (
    "full weights beside the LoRA are not supported (modules_to_save, or embeddings saved along: save again with "
    "save_embedding_layers=False)"
)


@dataclass(frozen=True, slots=True)
class TensorName:
    """`module` is a module path of the base model, `raw_module` the same in the adapter's words without PEFT's
    prefix, `part` LORA_A or LORA_B; all empty if `problem` says why the tensor cannot be used."""

    module: str = ""
    raw_module: str = ""
    part: str = ""
    problem: str = ""


def parse_tensor_name(name: str, targets: Mapping[str, object]) -> TensorName:
    """Find the base model's module a tensor belongs to; `targets` are the modules that can have LoRA."""
    for mark, problem in _UNSUPPORTED:
        if mark in name:
            return TensorName(problem=problem)
    match = _LORA_WEIGHT.fullmatch(name)
    if match is None:
        if re.search(r"\.lora_[AB]\b.*\.bias$", name):
            return TensorName(problem="a bias on LoRA is not supported (lora_bias)")
        if name.endswith((".weight", ".bias")) and "lora_" not in name:
            return TensorName(problem=_FULL_WEIGHTS)
        return TensorName(problem="not a LoRA weight this server knows")
    raw = match["module"].removeprefix("base_model.model.")
    module = _find_module(match["module"], targets)
    if module is None:
        supported = supported_modules(targets)
        kind = raw.rpartition(".")[2]
        if kind in supported:
            return TensorName(problem=f"the base model has no {kind} at this place; is it for another model?")
        return TensorName(problem=f"module {kind!r} cannot have LoRA here, only {', '.join(supported)} can")
    return TensorName(module, raw, match["part"])


def supported_modules(targets: Iterable[str]) -> list[str]:
    """The last parts of module paths, in model order: ['q_proj', 'k_proj', ...]."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path in targets))


def _find_module(path: str, targets: Container[str]) -> str | None:
    """Drop wrappers from the front until the rest, with or without 'model.', is a module of the base."""
    parts = path.split(".")
    for start in range(len(parts)):
        rest = ".".join(parts[start:])
        for candidate in (rest, f"model.{rest}"):
            if candidate in targets:
                return candidate
        if parts[start] not in _WRAPPERS:
            return None
    return None
