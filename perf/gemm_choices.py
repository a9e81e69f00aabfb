"""What `kernels_gemm.py` tries: configurations for a whole model, for a vocabulary, and for one weight of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

from lorax_kernels.configs import DEFAULT_GEMM, GemmConfig
from lorax_kernels.sizes import cdiv

SITES = ("gate_up", "down", "qkv", "o")
FIELDS = ("block_n", "block_k", "stages", "warps", "split_k", "ahead", "swap")
_ONE_ROW = (
    (4, 4096, 1, 4, 1, 0), (4, 2048, 1, 4, 1, 0), (4, 2048, 2, 4, 1, 0), (2, 4096, 1, 4, 1, 0), (8, 1024, 2, 4, 1, 0),
    (8, 2048, 1, 4, 1, 0), (8, 2048, 1, 8, 1, 0), (8, 1024, 1, 4, 1, 0), (16, 1024, 1, 4, 1, 0), (16, 1024, 1, 8, 1, 0),
    (16, 512, 2, 4, 1, 0), (4, 1024, 2, 2, 1, 0), (4, 1024, 1, 2, 1, 0), (2, 2048, 2, 2, 1, 0), (2, 2048, 1, 2, 1, 0),
    (4, 4096, 1, 8, 1, 0), (4, 2048, 1, 2, 1, 0),
)  # fmt: skip
_TO_16 = (
    (32, 256, 6, 4, 1, 6), (32, 256, 4, 4, 1, 4), (32, 256, 7, 4, 1, 6), (32, 256, 8, 4, 1, 8), (32, 256, 6, 4, 1, 4),
    (32, 256, 6, 4, 1, 8), (32, 256, 6, 2, 1, 6), (32, 256, 6, 4, 2, 6), (32, 128, 12, 4, 1, 8), (32, 512, 4, 4, 1, 4),
    (16, 512, 3, 4, 1, 2), (16, 512, 4, 2, 1, 4), (16, 512, 4, 1, 1, 4), (16, 256, 4, 2, 1, 4), (16, 256, 6, 2, 1, 6),
    (16, 256, 8, 2, 1, 8), (64, 128, 8, 4, 2, 8), (64, 256, 5, 8, 2, 4), (64, 128, 4, 4, 2, 4, True),
    (64, 128, 5, 4, 4, 6, True), (64, 256, 4, 4, 2, 4, True), (128, 128, 4, 4, 4, 4, True),
)  # fmt: skip
_TO_32 = (
    (128, 128, 4, 8, 4, 4), (128, 128, 5, 8, 4, 4), (128, 128, 4, 8, 8, 4), (128, 128, 4, 4, 4, 4),
    (128, 128, 4, 8, 4, 8), (128, 64, 8, 8, 4, 8), (64, 128, 6, 4, 4, 8), (64, 128, 6, 8, 4, 8), (64, 128, 6, 4, 2, 8),
    (64, 128, 6, 4, 8, 8), (64, 128, 8, 4, 4, 8), (64, 128, 5, 4, 4, 6), (64, 256, 4, 8, 4, 4), (64, 256, 4, 4, 4, 4),
    (32, 256, 6, 4, 1, 6), (32, 256, 6, 4, 2, 6), (32, 128, 10, 4, 1, 8), (128, 128, 4, 4, 4, 4, True),
    (128, 128, 5, 4, 8, 4, True), (128, 128, 5, 8, 4, 4, True), (128, 64, 8, 4, 4, 8, True),
    (64, 128, 4, 4, 4, 4, True), (64, 128, 5, 4, 4, 6, True), (64, 256, 4, 4, 4, 4, True),
)  # fmt: skip
_HEAD = {
    1: ((4, 4096, 1, 4, 1, 0), (8, 1024, 2, 4, 1, 0), (8, 2048, 1, 4, 1, 0), (4, 2048, 2, 4, 1, 0),
        (2, 4096, 1, 4, 1, 0), (16, 512, 2, 4, 1, 0), (16, 1024, 1, 4, 1, 0)),
    16: ((32, 256, 6, 4, 1, 6), (32, 256, 4, 4, 1, 4), (64, 128, 6, 4, 1, 8), (64, 256, 4, 8, 1, 4),
         (32, 128, 8, 4, 1, 8), (16, 512, 4, 2, 1, 4), (128, 64, 6, 4, 1, 8), (128, 128, 4, 8, 1, 4),
         (64, 128, 4, 4, 1, 4, True), (128, 128, 4, 4, 1, 4, True)),
    32: ((128, 128, 4, 8, 1, 4), (32, 256, 6, 4, 1, 6), (64, 128, 6, 4, 1, 8), (64, 128, 8, 8, 1, 8),
         (64, 256, 4, 8, 1, 4), (128, 64, 8, 8, 1, 8), (32, 128, 10, 4, 1, 8), (64, 128, 4, 4, 1, 4, True),
         (128, 128, 4, 4, 1, 4, True)),
}  # fmt: skip
"""For the product with the vocabulary, by the most rows that a kernel is compiled for."""
_TILES_TO_16 = (
    (16, 256, 4, 2), (16, 256, 6, 2), (32, 128, 4, 4), (32, 256, 4, 4), (64, 128, 4, 4), (64, 64, 6, 4, True),
    (64, 128, 3, 4, True), (64, 128, 4, 4, True), (128, 64, 5, 4, True),
)  # fmt: skip
_TILES_TO_32 = (
    (32, 128, 4, 4), (64, 128, 3, 4), (64, 128, 5, 4), (128, 64, 5, 4), (128, 128, 3, 8), (64, 64, 6, 4, True),
    (64, 128, 3, 4, True), (64, 128, 4, 4, True), (128, 64, 4, 4, True), (128, 64, 6, 4, True),
    (128, 128, 4, 4, True),
)  # fmt: skip
"""Columns, elements of K, stages, warps and `swap` for one weight. Of most, two to four programs fit on a
multiprocessor."""
_MOST_SPLITS = 16
_EVEN = 1.1
_LEAST_STEPS = 2
_AHEAD = 512  # elements of K that a program asks of L2


def made(values: tuple[int, ...], **others: bool) -> GemmConfig:
    """A configuration of `FIELDS`, of which the last may be missing."""
    return GemmConfig(kernel="triton", pdl=True, **dict(zip(FIELDS, values, strict=False)), **others)  # type: ignore[arg-type]


def choices(rows: int, head: bool = False) -> list[GemmConfig]:
    """What is tried for a number of rows; the first once more without starting early."""
    if head:
        listed: Iterable[tuple[int, ...]] = _HEAD[1 if rows == 1 else 16 if rows <= 16 else 32]
    else:
        listed = _ONE_ROW if rows == 1 else _TO_16 if rows <= 16 else _TO_32
    found = [made(values) for values in listed]
    return [*found, replace(found[0], pdl=False)]


def imbalance(columns: int, width: int, config: GemmConfig, sms: int) -> float:
    """What the multiprocessor with most of the weight [columns, width] reads over what it would with an equal share,
    if programs of an exact `config` are dealt out in turns."""
    steps = cdiv(width, config.split_k * config.block_k)
    programs = cdiv(columns, config.block_n) * cdiv(width, steps * config.block_k)
    read = cdiv(programs, sms) * config.block_n * min(width, steps * config.block_k)
    return read * sms / (columns * width)


def site_choices(
    rows: int, site: str, shape: tuple[int, int], sms: int, best: list[GemmConfig]
) -> list[GemmConfig]:
    """What is tried for one weight [columns, width]: `best`, which were best for all of them, and tiles that leave room
    for several programs, with as few splits as load all multiprocessors alike with one program each, and with two."""
    if rows == 1:
        return _unlike([*best, *choices(rows)[:-1]])
    columns, width = shape
    found = [*best, DEFAULT_GEMM]
    for block_n, block_k, *rest in _TILES_TO_16 if rows <= 16 else _TILES_TO_32:
        stages, warps, swap = (*rest, False)[:3]
        values = (block_n, block_k, stages, warps, 1, max(stages, _AHEAD // block_k), swap)
        whole = made(values, exact=True)
        if site == "gate_up":  # whose product does SiLU too, where it is not split
            found.append(whole)
            continue
        for least in (1, 2):
            even = _even_splits(columns, width, whole, sms, least)
            found += [replace(whole, split_k=even)] if even else []
    return _unlike(found)


def _even_splits(columns: int, width: int, whole: GemmConfig, sms: int, least: int) -> int | None:
    """The fewest splits with about `least` programs a multiprocessor and more, and an even load."""
    for splits in range(1, min(_MOST_SPLITS, width // (_LEAST_STEPS * whole.block_k)) + 1):
        enough = cdiv(columns, whole.block_n) * splits * 10 >= sms * least * 9
        if enough and imbalance(columns, width, replace(whole, split_k=splits), sms) <= _EVEN:
            return splits
    return None


def _unlike(configs: list[GemmConfig]) -> list[GemmConfig]:
    return list(dict.fromkeys(configs))


def shown(config: GemmConfig) -> str:
    """In a few letters: columns, K, stages, warps, splits, ahead."""
    if config.kernel == "blas":
        return "blas"
    values = asdict(config)
    text = ",".join(str(values[name]) for name in FIELDS[:-1])
    marks = [name for name, is_set in (
        ("exact", config.exact), ("swap", config.swap), ("early", config.pdl), ("apart", not config.fuse_sum),
    ) if is_set]  # fmt: skip
    return " ".join([text, *marks])
