"""Configurations of the kernels by device and batch size.

The tables are written by `perf/kernels.py --tune` and its like on the device they name. A device without a table gets
the defaults.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lorax_kernels.configs import (
    DEFAULT,
    DEFAULT_ATTENTION,
    DEFAULT_GEMM,
    DEFAULT_NODE,
    DEFAULT_PREFILL,
    DEFAULT_PREFILL_DELTA,
    DEFAULT_PREFILL_SILU,
    DEFAULT_PREFILL_SILU_DELTA,
    AttentionConfig,
    GemmConfig,
    LoraConfig,
    NodeConfig,
    PrefillConfig,
)

_Config = TypeVar("_Config", LoraConfig, AttentionConfig, NodeConfig, GemmConfig, PrefillConfig)


@functools.lru_cache(maxsize=4096)
def lora_config(num_tokens: int, decode: bool, device: int | None = None) -> LoraConfig:
    """The configuration for a batch of `num_tokens` rows on CUDA device `device`; None has no table."""
    return _pick(device, "lora", DEFAULT, num_tokens if decode else _LARGEST)


@functools.lru_cache(maxsize=4096)
def attention_config(num_sequences: int, device: int | None = None) -> AttentionConfig:
    """The configuration for `num_sequences` decoding sequences on CUDA device `device`."""
    return _pick(device, "attention", DEFAULT_ATTENTION, num_sequences)


@functools.cache
def node_config(device: int | None = None) -> NodeConfig:
    """The configuration of the small kernels on CUDA device `device`."""
    return _pick(device, "node", DEFAULT_NODE, _LARGEST)


@functools.lru_cache(maxsize=4096)
def gemm_config(num_tokens: int, columns: int, width: int, device: int | None = None) -> GemmConfig:
    """The configuration of a base layer [columns, width] for `num_tokens` rows on CUDA device `device`.

    The entries of this very shape count together with those of the model, which by the nearest hidden size are for any
    shape: the smaller of a weight's two sizes is taken for that. The product with a vocabulary has the latter of its
    own. An entry for the next more rows goes first, and of two for the same rows that of the shape.
    """
    tables = {} if device is None else _gemm_table(device)
    of_head = tables.get("head") if columns >= _HEAD_RATIO * width else None
    widths = of_head or tables.get("configs", {})
    size = min(columns, width)
    nearest = min(widths, key=lambda known: abs(math.log2(int(known) / size)), default="")
    of_shape = tables.get("shapes", {}).get(f"{columns}x{width}", {})
    return _choose(widths.get(nearest, {}) | of_shape, "gemm", DEFAULT_GEMM, num_tokens)


@functools.lru_cache(maxsize=4096)
def prefill_config(
    num_tokens: int,
    columns: int,
    width: int,
    device: int | None = None,
    silu: bool = False,
    delta: bool = False,
) -> PrefillConfig:
    """The configuration of a base layer [columns, width] for many rows on CUDA device `device`, with SiLU and
    multiplication after it if `silu`, and adapters if `delta`.

    Only what was measured counts: the entry of this very shape for the most rows that are not over `num_tokens`.
    """
    shapes = {} if device is None else _prefill_table(device, silu, delta)
    sizes = shapes.get(f"{columns}x{width}", {})
    nearest = max((rows for rows in sizes if rows <= num_tokens), default=0)
    _, default = _PREFILL[silu, delta]
    return _choose({nearest: sizes[nearest]} if nearest else {}, "prefill", default, num_tokens)


def prefill_rows(device: int | None) -> list[int]:
    """Numbers of rows from which `prefill_config` has another entry for some shape."""
    if device is None:
        return []
    tables = (_prefill_table(device, silu, delta) for silu, delta in _PREFILL)
    return sorted({rows for table in tables for sizes in table.values() for rows in sizes})


def forget_configs() -> None:
    """Look at the tables and the environment again."""
    for kept in (lora_config, attention_config, node_config, gemm_config, prefill_config):
        kept.cache_clear()


_LARGEST = 1 << 30
_PREFILL = {
    (False, False): ("configs", DEFAULT_PREFILL),
    (True, False): ("silu", DEFAULT_PREFILL_SILU),
    (False, True): ("delta", DEFAULT_PREFILL_DELTA),
    (True, True): ("silu+delta", DEFAULT_PREFILL_SILU_DELTA),
}
"""By whether SiLU follows and whether adapters' deltas are added: the section of the table, and the default."""
_HEAD_RATIO = 16  # so many times more columns than width has a vocabulary's weight, and no layer's
OVERRIDE = "LORAX_{kind}_CONFIG"
"""Environment variables, such as LORAX_LORA_CONFIG, with fields of a configuration as JSON that go before every table:
for comparing, not for use."""


def _override(kind: str, known: set[str]) -> dict[str, Any]:
    """Fields that the environment sets.

    Raises:
        ValueError: the variable holds no JSON object, or one with an unknown field.
    """
    name = OVERRIDE.format(kind=kind.upper())
    text = os.environ.get(name)
    if not text:
        return {}
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: {text!r} is no JSON: {error}") from None
    if not isinstance(given, dict) or not known.issuperset(given):
        raise ValueError(f"{name}: {text!r} is no JSON object with fields of {sorted(known)}")
    return given


def _pick(device: int | None, kind: str, default: _Config, size: int) -> _Config:
    """The entry for the smallest size that is not under `size`, else the largest."""
    return _choose({} if device is None else _table(device, kind), kind, default, size)


def _choose(table: dict[int, dict[str, Any]], kind: str, default: _Config, size: int) -> _Config:
    known = {f.name for f in fields(default)}
    fitting = [entry for entry in table if entry >= size]
    values = table[min(fitting) if fitting else max(table)] if table else {}
    chosen = {name: value for name, value in values.items() if name in known} | _override(kind, known)
    return replace(default, **chosen)


@functools.cache
def _table(device: int, kind: str) -> dict[int, dict[str, Any]]:
    return {int(size): entry for size, entry in _read(device, kind).get("configs", {}).items()}


@functools.cache
def _gemm_table(device: int) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """{"configs": {width: {rows: entry}}, "head": the same, "shapes": {"COLUMNSxWIDTH": {rows: entry}}}; any may be
    missing."""
    file = _read(device, "gemm")
    return {
        part: {key: {int(rows): entry for rows, entry in sizes.items()} for key, sizes in file[part].items()}
        for part in ("configs", "head", "shapes")
        if part in file
    }


@functools.cache
def _prefill_table(device: int, silu: bool, delta: bool) -> dict[str, dict[int, dict[str, Any]]]:
    """By shape and rows: {"configs": {"COLUMNSxWIDTH": {rows: entry}}, "silu": the same}, and with adapters "delta" and
    "silu+delta"; any may be missing."""
    section, _ = _PREFILL[silu, delta]
    shapes = _read(device, "prefill").get(section, {})
    return {shape: {int(rows): entry for rows, entry in sizes.items()} for shape, sizes in shapes.items()}


def table_path(kind: str, device: int | None = None) -> Path:
    """Where the table of a kind ("lora", "attention", "node", "gemm", "prefill") for a CUDA device, the current one if
    None, comes with the kernels. There may be none."""
    major, minor = torch.cuda.get_device_capability(device)
    return Path(__file__).parent / "tuned" / f"{kind}_sm{major}{minor}.json"


def _read(device: int, kind: str) -> dict[str, Any]:
    path = table_path(kind, device)
    table: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return table
