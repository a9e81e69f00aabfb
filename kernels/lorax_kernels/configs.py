"""How kernels are launched: block sizes, splits, warps, and which kernels do what.

`tuning` has the values for a device and a batch; the defaults here are sensible on any recent NVIDIA GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace


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
    `fuse_rope_heads` heads of a row. SiLU and multiplication then takes `fuse_row_n` columns of a single row or
    `fuse_block_n` of up to 16 rows at a time, with `fuse_warps` warps a program, `fuse_registers` a thread at most and
    `fuse_waves` programs a multiprocessor.

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


def launch_options(pdl: bool, registers: int = 0) -> dict[str, int | bool]:
    """Options of a launch: whether it may start before the last one is over, and a limit of registers a thread."""
    options: dict[str, int | bool] = {"launch_pdl": True} if pdl else {}
    if registers:
        options["maxnreg"] = registers
    return options
