"""Models and adapters of random weights in real models' shapes, as folders that an engine or a server loads."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "llama3-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024, "tie_word_embeddings": False,
    },
}  # fmt: skip
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
               "mlp.up_proj", "mlp.down_proj")  # fmt: skip
MIXED_RANKS = (8, 16, 64, 12, 32)


def write_model(folder: Path, shape: str) -> Path:
    """A config.json alone: weights are random."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "attention_bias": False, "mlp_bias": False,
        "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | SHAPES[shape]))
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One word a token, `w7` for id 7: enough to decode whatever a random model says."""
    vocab = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<s>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )


def write_adapters(root: Path, shape: dict[str, Any], ranks: list[int], unique: int = 8) -> list[str]:
    """PEFT folders of random bfloat16 weights on all seven projections. Adapters of one rank share at most `unique`
    files, by hard links, so that a thousand of them take the room of a few."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    q = shape["num_attention_heads"] * shape["head_dim"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    widths = dict(zip(PROJECTIONS, [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner),
                                    (hidden, inner), (inner, hidden)], strict=True))  # fmt: skip
    made: dict[tuple[int, int], Path] = {}
    folders = []
    for index, rank in enumerate(ranks):
        folder = root / f"adapter-{index:03d}-r{rank}"
        folder.mkdir(parents=True)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
                  "target_modules": [name.split(".")[1] for name in PROJECTIONS]}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))
        weights, key = folder / "adapter_model.safetensors", (rank, index % unique)
        if key in made:
            weights.hardlink_to(made[key])
        else:
            _write_weights(weights, widths, shape["num_hidden_layers"], rank, index)
            made[key] = weights
        folders.append(str(folder))
    return folders


def _write_weights(path: Path, widths: dict[str, tuple[int, int]], layers: int, rank: int, seed: int) -> None:
    header: dict[str, Any] = {}
    end = 0
    for layer in range(layers):
        for name, (inputs, outputs) in widths.items():
            for leaf, shape in (("lora_A", [rank, inputs]), ("lora_B", [outputs, rank])):
                size = 2 * shape[0] * shape[1]
                header[f"base_model.model.model.layers.{layer}.{name}.{leaf}.weight"] = {
                    "dtype": "BF16", "shape": shape, "data_offsets": [end, end + size],
                }  # fmt: skip
                end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(seed).standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)
    half = (block.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16 by truncation
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        left = end
        while left:
            file.write(half[: min(left, len(half))])
            left -= min(left, len(half))


def host_bytes(adapters: list[str], limit_gib: float, factor: int = 1) -> int:
    """Host memory for all of them, with room to spare, or the limit; `factor` is the engine's element size over the
    files'."""
    size = sum(Path(folder, "adapter_model.safetensors").stat().st_size for folder in adapters)
    return min(factor * 5 * size // 4 + (64 << 20), int(limit_gib * 2**30))
