"""ModelConfig: what a checkpoint's config.json says, in one form for all supported architectures.

Standard library only, so that every process can read it. Configurations of transformers 5 (`rope_parameters`,
`dtype`) and of older versions (`rope_theta`, `rope_scaling`, `torch_dtype`) are both understood.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_backend.model.architectures import Architecture, WindowRule, find_architecture

_ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # type -> (needed, optional)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
         "truncate"),
    ),
}  # fmt: skip
_DEFAULT_WINDOW = 4096  # transformers' default where a config does not name the field; a null switches it off
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base wavelength `theta`, and the scaling of `rope_type` (see `layers.rope_frequencies`).

    `parameters` holds (name, value) pairs, sorted, of what the type needs beyond theta.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    parameters: tuple[tuple[str, float], ...] = ()

    def get(self, name: str) -> float | None:
        """One parameter, None if it is not given."""
        return dict(self.parameters).get(name)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of one model. `layer_windows[i]` is how many tokens, itself included, a token of layer i
    attends to; None for all. `sliding_window` is the width where any layer has one."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    layer_windows: tuple[int | None, ...]
    torch_dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads; the same for values."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read `config.json`, and `generation_config.json` where there is one.

        Raises:
            ValueError: if the folder holds no usable config, or asks for something this server cannot do.
        """
        folder = Path(path)
        raw = _read_json(folder / "config.json")
        if raw is None:
            raise ValueError(f"{folder}: no config.json; this is not a Hugging Face model folder")
        generation = _read_json(folder / "generation_config.json") or {}
        try:
            return cls.from_dict(raw, generation)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Build from the parsed `config.json` and `generation_config.json`; raises ValueError like `from_folder`."""
        names = raw.get("architectures") or ()
        row = find_architecture(str(raw.get("model_type", "")), tuple(str(name) for name in names))
        _refuse_unsupported(raw)
        sizes = {name: _integer(raw, name) for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
        )}  # fmt: skip
        heads = sizes["num_attention_heads"]
        kv_heads = _integer(raw, "num_key_value_heads", heads)
        head_dim = _integer(raw, "head_dim", row.default_head_dim or sizes["hidden_size"] // heads)
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} is odd; rotary embeddings need pairs")
        attention_bias = bool(raw.get("attention_bias", False))
        windows = _layer_windows(row, raw, sizes["num_hidden_layers"])
        ids = (generation or {}).get("eos_token_id")
        limit = _integer(raw, "max_position_embeddings", 2048)
        return cls(
            model_type=row.model_type,
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=sizes["vocab_size"],
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_rope(raw, limit),
            max_position_embeddings=limit,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=attention_bias if row.qkv_bias is None else row.qkv_bias,
            o_bias=attention_bias if row.o_bias is None else row.o_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)) if row.mlp_bias is None else row.mlp_bias,
            qk_norm=row.qk_norm,
            sliding_window=next((window for window in windows if window is not None), None),
            layer_windows=windows,
            torch_dtype=_dtype(raw),
            eos_token_ids=_token_ids(raw.get("eos_token_id") if ids is None else ids),
            bos_token_id=next(iter(_token_ids(raw.get("bos_token_id"))), None),
            pad_token_id=next(iter(_token_ids(raw.get("pad_token_id"))), None),
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return parsed


def _integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} is {value!r}, not a positive number")
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Things that would change the result if they were ignored."""
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"quantized checkpoints ({method}) are not supported; use the unquantized model")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation!r} is not supported, only silu")


def _dtype(raw: Mapping[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}")
    return name


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise ValueError(f"eos_token_id/bos_token_id {value!r} is not an id or a list of ids")
    return tuple(dict.fromkeys(values))


def _layer_windows(row: Architecture, raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window", _DEFAULT_WINDOW)
    if row.window is WindowRule.LISTED_LAYERS and not raw.get("use_sliding_window", False):
        window = None
    if row.window is WindowRule.NONE or window is None:
        return (None,) * num_layers
    window = _integer(raw, "sliding_window", _DEFAULT_WINDOW)
    if row.window is WindowRule.ALL_LAYERS:
        return (window,) * num_layers
    listed = raw.get("layer_types")
    if listed is None:
        first = int(raw.get("max_window_layers", 28))  # transformers' default of both Qwen families
        listed = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    unknown = set(listed) - {"sliding_attention", "full_attention"}
    if unknown or len(listed) != num_layers:
        raise ValueError(f"layer_types must name full_attention or sliding_attention for {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in listed)


def _rope(raw: Mapping[str, Any], limit: int) -> RopeConfig:
    given: dict[str, Any] = dict(raw.get("rope_scaling") or {})
    given.update(raw.get("rope_parameters") or {})
    theta = float(given.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    rope_type = str(given.pop("rope_type", None) or given.pop("type", None) or "default")
    given.pop("type", None)
    if rope_type not in _ROPE_FIELDS:
        raise ValueError(f"rope type {rope_type!r} is not supported; supported: {', '.join(_ROPE_FIELDS)}")
    if float(given.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    needed, optional = _ROPE_FIELDS[rope_type]
    if rope_type == "yarn" and given.get("original_max_position_embeddings") is None:
        given["original_max_position_embeddings"] = raw.get("original_max_position_embeddings") or limit
    missing = [name for name in needed if given.get(name) is None]
    if missing:
        raise ValueError(f"rope type {rope_type} needs {', '.join(missing)}")
    kept = {name: float(given[name]) for name in (*needed, *optional) if given.get(name) is not None}
    return RopeConfig(rope_type, theta, tuple(sorted(kept.items())))
