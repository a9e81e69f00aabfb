"""A GGUF file of the built-in model's kind, small enough to convert in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

HIDDEN, HEADS, KV_HEADS = 16, 2, 1
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdĠ", "ab", "Ġa"]


def tiny_gguf_weights() -> dict[str, np.ndarray]:
    """Its tensors by GGUF's names, float32."""
    rng = np.random.default_rng(3)
    shapes = {
        "token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,), "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (8, HIDDEN),
        "blk.0.attn_v": (8, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN), "blk.0.ffn_gate": (32, HIDDEN),
        "blk.0.ffn_up": (32, HIDDEN), "blk.0.ffn_down": (HIDDEN, 32),
    }  # fmt: skip
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_tiny_gguf(path: Path, weights: dict[str, np.ndarray]) -> Path:
    """Write the file and return its path."""
    gguf = pytest.importorskip("gguf")
    path.parent.mkdir(parents=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(32)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
