"""Tiny random models, tokenizers and adapters, written in the files' own formats without torch or transformers.

The weights are scaled so that activations stay near 1 and logits spread over several units: greedy choices of two
correct implementations then agree. Equal arguments give equal files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = 384
_WORDS = (
    " the and ing er on to in he re of at en nd es or te ar st hello world is that was for you with his they be are"
    " this have from one had by word but not what all were we when your can said there use an each which she do how"
    " their if will up other about out many then them these so some her would make like him into time has look two"
    " more write go see number no way could people my than first water been call who oil its now find long down day"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def write_tiny_model(
    folder: Path, architecture: str = "llama", seed: int = 0, tokenizer: str = "byte_level", **config: Any
) -> Path:
    """Write config, generation config, float32 safetensors, tokenizer and chat template; returns `folder`.

    Args:
        architecture: llama, mistral, qwen2 or qwen3.
        tokenizer: "byte_level" (as of GPT-2, Llama 3, Qwen) or "byte_fallback" (as of Llama 2, Mistral).
        config: overrides of config.json, such as `num_hidden_layers=1` or `tie_word_embeddings=True`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = _config(architecture) | config
    _write_json(folder / "config.json", settings)
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    _write_json(folder / "generation_config.json", ids)
    write_tiny_tokenizer(folder, tokenizer)
    _save(folder / "model.safetensors", _weights(settings, np.random.default_rng(seed)))
    return folder


def write_tiny_tokenizer(folder: Path, kind: str = "byte_level") -> None:
    """Write tokenizer.json and tokenizer_config.json of a 384-token vocabulary that can spell any text."""
    content = _byte_level_tokenizer() if kind == "byte_level" else _byte_fallback_tokenizer()
    _write_json(folder / "tokenizer.json", content)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_tiny_adapter(
    folder: Path,
    model_path: Path,
    rank: int = 8,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random PEFT LoRA folder for a model of `write_tiny_model`; returns `folder`.

    Args:
        targets: names of linear modules: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head.
        config: overrides of adapter_config.json. `rank_pattern` (keys are module paths or their last parts) and
            `layers_to_transform` also change the tensors written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_path),
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    } | config
    rng = np.random.default_rng(seed)
    tensors = {}
    layers = settings["layers_to_transform"]
    for path, (rows, columns) in linear_shapes(json.loads((model_path / "config.json").read_text())).items():
        name = path.rsplit(".", 1)[-1]
        if name not in targets or (
            layers is not None and path != "lm_head" and int(path.split(".")[2]) not in layers
        ):
            continue
        patterns = settings["rank_pattern"]
        r = patterns.get(path, patterns.get(name, rank))
        prefix = f"base_model.model.{path}"
        a = rng.standard_normal((r, columns)) / np.sqrt(columns)
        b = rng.standard_normal((rows, r)) / np.sqrt(r) * 0.5
        tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = b.astype(np.float32)
    _write_json(folder / "adapter_config.json", settings)
    _save(folder / "adapter_model.safetensors", tensors)
    return folder


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Module path -> (out_features, in_features) of every linear module an adapter can target."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, int]] = {}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.self_attn.q_proj"] = (query, hidden)
        shapes[f"{layer}.self_attn.k_proj"] = (kv, hidden)
        shapes[f"{layer}.self_attn.v_proj"] = (kv, hidden)
        shapes[f"{layer}.self_attn.o_proj"] = (hidden, query)
        shapes[f"{layer}.mlp.gate_proj"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj"] = (hidden, inner)
    shapes["lm_head"] = (config["vocab_size"], hidden)
    return shapes


def _config(architecture: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "dtype": "float32",
        "eos_token_id": EOS_ID,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB_SIZE,
    }
    if architecture == "mistral":
        config["sliding_window"] = None
    if architecture in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2}
    return config


def _weights(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    def normal(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    def norm_weight(size: int) -> np.ndarray:
        return (1.0 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    hidden = config["hidden_size"]
    tied = config["tie_word_embeddings"]
    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden, scale=0.5 if tied else 1.0)}
    biased = config["model_type"] == "qwen2" or config["attention_bias"]
    for path, (rows, columns) in linear_shapes(config).items():
        if path == "lm_head":
            continue
        tensors[f"{path}.weight"] = normal(rows, columns, scale=columns**-0.5)
        if biased and path.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[f"{path}.bias"] = normal(rows, scale=0.5)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = norm_weight(hidden)
        tensors[f"{layer}.post_attention_layernorm.weight"] = norm_weight(hidden)
        if config["model_type"] == "qwen3":
            tensors[f"{layer}.self_attn.q_norm.weight"] = norm_weight(config["head_dim"])
            tensors[f"{layer}.self_attn.k_norm.weight"] = norm_weight(config["head_dim"])
    tensors["model.norm.weight"] = norm_weight(hidden)
    if not tied:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden, scale=0.5)
    return tensors


def _merges(alphabet: set[str], words: Sequence[str], room: int) -> tuple[list[str], list[list[str]]]:
    """New tokens and merges that build each word letter by letter, until `room` tokens are made."""
    tokens: list[str] = []
    merges: list[list[str]] = []
    known = set(alphabet)
    for word in words:
        left = word[0]
        for letter in word[1:]:
            if left + letter not in known:
                if len(tokens) == room:
                    return tokens, merges
                known.add(left + letter)
                tokens.append(left + letter)
                merges.append([left, letter])
            left += letter
    return tokens, merges


def _added_tokens(contents: Sequence[str]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": content, **flags} for i, content in enumerate(contents)]


def _bos_post_processor() -> dict[str, Any]:
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS_ID], "tokens": ["<s>"]}},
    }


def _model(vocab: list[str], merges: list[list[str]], byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<pad>" if byte_fallback else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(vocab)},
        "merges": merges,
    }


def _byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256)]


def _byte_level_tokenizer() -> dict[str, Any]:
    alphabet = _byte_alphabet()
    words = ["Ġ" + word for word in _WORDS.split()]
    tokens, merges = _merges(set(alphabet), words, VOCAB_SIZE - len(SPECIAL_TOKENS) - 256)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(SPECIAL_TOKENS),
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": _model([*SPECIAL_TOKENS, *alphabet, *tokens], merges, byte_fallback=False),
    }


def _byte_fallback_tokenizer() -> dict[str, Any]:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *"etaoinshrdlucmfwypvbgkjqxz"]
    words = ["▁" + word for word in _WORDS.split()]
    room = VOCAB_SIZE - len(SPECIAL_TOKENS) - 256 - len(letters)
    tokens, merges = _merges(set(letters), words, room)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(SPECIAL_TOKENS),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _bos_post_processor(),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": _model([*SPECIAL_TOKENS, *byte_tokens, *letters, *tokens], merges, byte_fallback=True),
    }


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, {"format": "pt"}
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
