"""Block sizes and split counts of the kernels, by device and batch size.

The tables are written by `perf/kernels.py --tune` on the device they name. A device without a table gets
`DEFAULT`, which is sensible on any recent NVIDIA GPU.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """How the LoRA kernels are launched.

    Waves are programs per multiprocessor of a persistent launch; registers are a limit a thread, 0 for none. At most
    2**`split_shift` splits of the input dimension, fewer where the work list has about 2**`target_log2` pieces anyway.
    `row_n` columns of a single row, or `block_n` of up to 16 rows, are one piece of expand.

    `pdl` lets expand start while shrink still runs (programmatic dependent launch, compute capability 9.0 and up);
    `overlap` runs shrink beside the base layer's product on a second stream: "none", "shrink_first" or "product_first".

    `fuse_norm`, `fuse_silu` and `fuse_rope` leave the deltas of decode to the norm, to SiLU and multiplication or to
    the rotation after the base layer (`expand_nodes`), launched early with `fuse_pdl`. A program of the rotation has
    `fuse_rope_heads` heads of a row. SiLU and multiplication then takes `fuse_row_n` columns of
    a single row or `fuse_block_n` of up to 16 rows at a time, with `fuse_warps` warps a program, `fuse_registers` a
    thread at most and `fuse_waves` programs a multiprocessor.

    With `one_row_in_product` the product of a single row adds the delta itself, where a Triton kernel computes it
    (`GemmConfig`); this goes before `overlap` and before leaving deltas to nodes.

    An input of `long_input` elements and more, none with 0, is read `long_block_k` at a time by a single row and split
    into up to 2**`long_split_shift` parts, until there are about 2**`long_target_log2` pieces.
    """

    block_k: int = 512
    split_shift: int = 3
    target_log2: int = 9
    shrink_waves: int = 6
    shrink_warps: int = 4
    shrink_registers: int = 0
    stages: int = 3
    row_n: int = 512
    block_n: int = 128
    expand_waves: int = 8
    expand_warps: int = 2
    expand_registers: int = 0
    pdl: bool = False
    overlap: str = "none"
    one_row_in_product: bool = False
    long_input: int = 0
    long_block_k: int = 1024
    long_split_shift: int = 4
    long_target_log2: int = 10
    fuse_norm: bool = False
    fuse_silu: bool = False
    fuse_rope: bool = False
    fuse_rope_heads: int = 8
    fuse_pdl: bool = False
    fuse_row_n: int = 512
    fuse_block_n: int = 128
    fuse_warps: int = 4
    fuse_waves: int = 3
    fuse_registers: int = 0
    prefill_block_k: int = 128
    prefill_splits: int = 2
    prefill_stages: int = 3
    prefill_shrink_warps: int = 4
    prefill_block_n: int = 128
    prefill_expand_warps: int = 4

    def for_itemsize(self, itemsize: int) -> LoraConfig:
        """The tables are for two-byte elements; wider ones get smaller tiles, so that they fit in registers."""
        return self if itemsize <= 2 else _narrowed(self)

    def for_input(self, in_features: int) -> LoraConfig:
        """With the fields for long inputs in the place of the others, if this is one."""
        return _lengthened(self) if self.long_input and in_features >= self.long_input else self


@functools.cache
def _lengthened(config: LoraConfig) -> LoraConfig:
    return replace(
        config,
        block_k=config.long_block_k,
        split_shift=config.long_split_shift,
        target_log2=config.long_target_log2,
        long_input=0,
    )


@functools.cache
def _narrowed(config: LoraConfig) -> LoraConfig:
    return replace(
        config,
        block_k=max(128, config.block_k // 2),
        long_block_k=max(128, config.long_block_k // 2),
        row_n=config.row_n // 2,
        block_n=max(32, config.block_n // 2),
        fuse_row_n=config.fuse_row_n // 2,
        fuse_block_n=max(32, config.fuse_block_n // 2),
        expand_registers=0,
        fuse_registers=0,
        shrink_registers=0,
        prefill_block_k=32,
        prefill_block_n=max(32, config.prefill_block_n // 2),
    )


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """How the attention kernels are launched.

    `block_n` keys a tile for heads of up to 128 two-byte elements, fewer for wider ones. A context is split over
    programs only where every part has `min_split` tokens, and into at most as many parts as make `waves` programs a
    multiprocessor.
    """

    block_n: int = 64
    stages: int = 3
    warps: int = 4
    min_split: int = 128
    waves: int = 4
    prefill_block_m: int = 128
    prefill_block_n: int = 64
    prefill_stages: int = 2
    prefill_warps: int = 8


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """How the small kernels between the matrix products and decode's attention are launched: with `pdl`, before the
    launch before them is over (compute capability 9.0 and up)."""

    pdl: bool = False


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """How base layers of up to 32 rows are computed: `kernel` "blas", or "triton" as the other fields say.

    A program has up to `block_n` columns of the result and reads `block_k` elements of each at a time, `stages` tiles
    ahead. K is split into at most `split_k` parts where columns alone are too few programs; with `exact` it is split
    into just that many, whose sizes differ where K is no multiple of `split_k` times `block_k`, and programs have just
    `block_n` columns. With `pdl` a launch begins before the one before it is over, and asks L2 for its first `ahead`
    tiles; one row has `stages` of them, at most 2, in registers instead.

    With `fuse_silu` the product of gate and up also does SiLU and multiplication, where K is not split; with
    `fuse_sum` the norm after a product sums its splits.

    With `swap` the weight is the left operand of a product of 2 rows and more, which suits tensor cores that read from
    shared memory: `block_n` of 64 and more, `warps` of 4 and more. It needs one tile more of shared memory.
    """

    kernel: str = "blas"
    block_n: int = 32
    block_k: int = 256
    stages: int = 4
    warps: int = 4
    split_k: int = 1
    ahead: int = 4
    pdl: bool = False
    fuse_silu: bool = True
    fuse_sum: bool = True
    swap: bool = False
    exact: bool = False

    def for_itemsize(self, itemsize: int) -> GemmConfig:
        """The tables are for two-byte elements; wider ones get smaller tiles, which need no more memory."""
        return self if itemsize <= 2 else _narrowed_gemm(self)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How base layers of many rows are computed: `kernel` "blas", or "triton" as the other fields say.

    A tile is `block_m` rows and `block_n` columns of the result, with `stages` reads of `block_k` on their way;
    `group` rows of tiles are gone through together. There are `programs` programs a multiprocessor, each of which goes
    from tile to tile, or one a tile with 0. See `prefill_gemm_kernels` for `parts` and `flatten`; before SiLU and
    multiplication `block_n` counts the columns of gate.

    With `delta` the product of a site adds the adapters' deltas itself, whatever `kernel` says, unless some tile would
    go through more than `most_groups` pairs of pages; without it, or then, a kernel of its own does (`lora_triton`).
    """

    kernel: str = "blas"
    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 3
    warps: int = 8
    group: int = 8
    programs: int = 1
    parts: int = 1
    flatten: bool = True
    delta: bool = False
    most_groups: int = 48


@functools.cache
def _narrowed_gemm(config: GemmConfig) -> GemmConfig:
    return replace(config, block_k=max(32, config.block_k // 4))


DEFAULT = LoraConfig()
DEFAULT_ATTENTION = AttentionConfig()
DEFAULT_NODE = NodeConfig()
DEFAULT_GEMM = GemmConfig()
DEFAULT_PREFILL = PrefillConfig()
DEFAULT_PREFILL_SILU = PrefillConfig(block_n=128, stages=4)
# What a delta brings to shared memory has room where the result leaves in more pieces.
DEFAULT_PREFILL_DELTA = PrefillConfig(stages=4, parts=4)
DEFAULT_PREFILL_SILU_DELTA = PrefillConfig(block_n=128, stages=4, group=16, parts=2)
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
    if delta:
        default = DEFAULT_PREFILL_SILU_DELTA if silu else DEFAULT_PREFILL_DELTA
    else:
        default = DEFAULT_PREFILL_SILU if silu else DEFAULT_PREFILL
    return _choose({nearest: sizes[nearest]} if nearest else {}, "prefill", default, num_tokens)


def prefill_rows(device: int | None) -> list[int]:
    """Numbers of rows from which `prefill_config` has another entry for some shape."""
    if device is None:
        return []
    tables = (_prefill_table(device, silu, delta) for silu in (False, True) for delta in (False, True))
    return sorted({rows for table in tables for sizes in table.values() for rows in sizes})


def forget_configs() -> None:
    """Look at the tables and the environment again."""
    for kept in (lora_config, attention_config, node_config, gemm_config, prefill_config):
        kept.cache_clear()


def launch_options(pdl: bool, registers: int = 0) -> dict[str, int | bool]:
    """Options of a launch: whether it may start before the last one is over, and a limit of registers a thread."""
    options: dict[str, int | bool] = {"launch_pdl": True} if pdl else {}
    if registers:
        options["maxnreg"] = registers
    return options


_LARGEST = 1 << 30
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
    kind = ("silu+delta" if silu else "delta") if delta else ("silu" if silu else "configs")
    shapes = _read(device, "prefill").get(kind, {})
    return {shape: {int(rows): entry for rows, entry in sizes.items()} for shape, sizes in shapes.items()}


def _read(device: int, kind: str) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(device)
    path = Path(__file__).parent / "tuned" / f"{kind}_sm{major}{minor}.json"
    table: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return table
