"""LoRA kernels in situ: shapes and batches, timing, and the search for block sizes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import numpy as np
import torch
from kernels_nodes import FUSE_CHOICES, Chain
from kernels_timing import graph_us

from lorax_kernels import LoraBatch, LoraSite, PageLayout, WorkBuffer, lora_triton, pages_for_rank
from lorax_kernels.configs import LoraConfig

SHAPES = {
    "8b": {
        "o": LoraSite(4096, (4096,)),
        "qkv": LoraSite(4096, (4096, 1024, 1024)),
        "gate_up": LoraSite(4096, (14336, 14336)),
        "down": LoraSite(14336, (4096,)),
    },
    "1b": {
        "o": LoraSite(2048, (2048,)),
        "qkv": LoraSite(2048, (2048, 512, 512)),
        "gate_up": LoraSite(2048, (8192, 8192)),
        "down": LoraSite(8192, (2048,)),
    },
}
HEAD_DIM = {"8b": 128, "1b": 64}
MIXED_RANKS = (8, 16, 16, 32, 64)
LAYERS = 8


@dataclass(frozen=True)
class Row:
    """A batch: its tokens, distinct adapters and their rank (0: 8 to 64 mixed). `goal_us` a layer on the H100."""

    tokens: int
    adapters: int
    rank: int = 16
    goal_us: float = 0.0

    @property
    def ranks(self) -> list[int]:
        return [self.rank or MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(self.adapters)]

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.adapters} adapters, rank {self.rank or 'mixed'}"


ROWS = [
    Row(1, 1, 16, 8), Row(32, 1, 16, 12), Row(32, 32, 16, 42), Row(128, 1, 16, 25), Row(128, 32, 16, 55),
    Row(128, 128, 16, 150), Row(32, 32, 0, 80), Row(128, 128, 64, 490), Row(8192, 32, 16, 650),
]  # fmt: skip
SHRINK_CHOICES = [
    {"block_k": k, "shrink_warps": w, "split_shift": s, "target_log2": t, "shrink_waves": v}
    for k, w, s, t, v in (
        (512, 4, 3, 9, 6), (512, 4, 3, 10, 7), (1024, 4, 2, 9, 5), (1024, 8, 2, 9, 3), (256, 4, 3, 10, 8),
        (512, 2, 3, 9, 8), (1024, 4, 2, 8, 5), (256, 4, 4, 10, 8), (512, 4, 2, 9, 6),
    )
]  # fmt: skip
EXPAND_CHOICES = [
    {"row_n": rn, "block_n": n, "expand_warps": w, "expand_registers": g, "expand_waves": v}
    for rn, n, w, g, v in (
        (512, 128, 2, 128, 8), (1024, 128, 4, 128, 4), (1024, 256, 4, 128, 4), (512, 128, 4, 0, 4), (256, 128, 2, 0, 8),
        (256, 64, 2, 0, 8), (512, 64, 2, 96, 10), (256, 64, 1, 0, 16),
    )
]  # fmt: skip
MODE_CHOICES = [
    {"pdl": p, "overlap": o}
    for p, o in (
        (False, "none"),
        (True, "none"),
        (False, "shrink_first"),
        (False, "product_first"),
        (True, "shrink_first"),
    )
]
ONE_ROW_CHOICES = [
    {"block_k": k, "shrink_warps": w, "split_shift": s, "target_log2": t, "shrink_waves": v}
    for k, w, s, t, v in (
        (256, 4, 4, 10, 8), (256, 4, 3, 9, 8), (512, 4, 3, 9, 6), (512, 4, 2, 9, 6), (1024, 4, 2, 9, 5),
        (512, 8, 3, 9, 4), (256, 2, 4, 10, 12),
    )
]  # fmt: skip
PREFILL_SHRINK_CHOICES = [
    {"prefill_block_k": k, "prefill_splits": s, "prefill_stages": t, "prefill_shrink_warps": w}
    for k, s, t, w in (
        (128, 2, 3, 4),
        (64, 2, 4, 4),
        (128, 1, 3, 4),
        (64, 4, 4, 4),
        (128, 2, 4, 4),
        (256, 2, 2, 4),
    )
]
PREFILL_EXPAND_CHOICES = [
    {"prefill_block_n": n, "prefill_expand_warps": w}
    for n, w in ((256, 4), (128, 4), (64, 2), (128, 2), (256, 8))
]


_TURNS = 7
_ROUNDING = 2.0**-8  # the most that rounding to bfloat16 changes a number, as a share of it


def exact_deltas(
    x: torch.Tensor,
    lora: tuple[torch.Tensor, torch.Tensor],
    pages: list[list[int]],
    out_slices: tuple[int, ...],
) -> torch.Tensor:
    """What adapters add to a site's output in float64, [R, out], for rows x [R, in] whose adapters have `pages` of the
    A and B in `lora`."""
    a, b = lora
    deltas = []
    for row, listed in zip(x.double(), pages, strict=True):
        h = torch.einsum("psui,i->psu", a[listed].double(), row)
        parts = b[listed].double().split(out_slices, dim=2)
        deltas.append(torch.cat([torch.einsum("pu,puo->o", h[:, s], part) for s, part in enumerate(parts)]))
    return torch.stack(deltas)


class WrongResultError(Exception):
    """A kernel's result is not what float64 gives."""


class Case:
    """One site of one row on the device, with the weights of `layers` different layers, and the node after it."""

    def __init__(self, row: Row, model: str, name: str, layers: int, seed: int = 0) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.row, self.site = row, SHAPES[model][name]
        site = self.site
        counts = [pages_for_rank(r) for r in row.ranks]
        layout = PageLayout({str(i): site for i in range(layers)})
        pages = torch.empty(sum(counts), layout.page_size, dtype=torch.bfloat16, device="cuda")
        pages.normal_(generator=generator).mul_(4 * site.in_features**-0.5)
        self.weights = [(layout.a_view(pages, str(i)), layout.b_view(pages, str(i))) for i in range(layers)]
        order = np.random.default_rng(seed)
        ends = np.cumsum(counts)
        table = np.full((row.adapters, max(counts)), -1, np.int32)
        for i, (end, count) in enumerate(zip(ends, counts, strict=True)):
            table[i, :count] = np.arange(end - count, end)
        ids = (np.arange(row.tokens) % row.adapters).astype(np.int32)
        if row.tokens <= 256:
            order.shuffle(ids)
        else:
            ids.sort()
        self.ids, self.table = ids, table
        # Decode as the engine runs it: launches sized for the largest rank admitted, not for this batch.
        buffer = WorkBuffer(row.tokens, max(8, *counts, 0), "cuda") if row.tokens <= 256 else None
        batch = LoraBatch.build(ids, table, np.array(row.ranks, np.int32), "cuda", buffer)
        assert batch is not None
        self.batch = batch
        self.x = torch.randn(row.tokens, site.in_features, device="cuda", generator=generator).bfloat16()
        self.chain = Chain(name, row.tokens, site.out_slices, HEAD_DIM[model], generator)
        self._wanted: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def call(self, layer: int, product: torch.Tensor, config: LoraConfig) -> tuple[torch.Tensor, ...]:
        """The site with its adapters, and the node."""
        return self.chain.lora(self.x, product, self.weights[layer], self.batch, config)

    def check(self, product: torch.Tensor, config: LoraConfig) -> None:
        """Raise if what the node makes of the first layer is wrong in one of up to 64 rows."""
        rows, wanted = self._expected(product)
        for got, want in zip(self.call(0, product, config), wanted, strict=True):
            # The norm of a row: its errors are those of rounding h, the sum, and what the node does.
            error = (got[rows].double() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
            if not float(error.max()) <= 4 * _ROUNDING:
                raise WrongResultError(
                    f"wrong result: {self.row}, {self.site}, {config}: {float(error.max()):.4f}"
                )

    def _expected(self, product: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Up to 64 rows, and what the node gives for them in float64."""
        if self._wanted is None:
            chosen = np.unique(np.linspace(0, self.row.tokens - 1, 64).astype(int))
            rows = torch.from_numpy(chosen).to(self.x.device)
            x, pages = (
                self.x[rows],
                [[p for p in row if p >= 0] for row in self.table[self.ids[chosen]].tolist()],
            )
            deltas = exact_deltas(x, self.weights[0], pages, self.site.out_slices)
            site = x.double() @ product.double().T + deltas
            self._wanted = rows, self.chain.expected(rows, site)
        return self._wanted

    def floor_us(self, copy_gbs: float, tflops: float) -> float:
        weights = sum(self.row.ranks) * (
            len(self.site.out_slices) * self.site.in_features + self.site.out_features
        )
        moved = 2 * weights + 2 * self.row.tokens * (self.site.in_features + 2 * self.site.out_features)
        operations = 2 * weights / self.row.adapters * self.row.tokens
        return max(moved / copy_gbs / 1e3, operations / tflops / 1e6)


class Bench:
    """Times configurations on the sites of a model shape; keeps what it has measured."""

    def __init__(self, model: str, rep: int) -> None:
        self.model, self.shapes, self.rep = model, SHAPES[model], rep
        self._cases: dict[tuple[Row, str], Case] = {}
        self._base: dict[tuple[Row, str], float] = {}
        self._known: dict[tuple[Row, str, LoraConfig], float] = {}
        self._products: dict[str, list[torch.Tensor]] = {}

    def in_situ_us(self, row: Row, config: LoraConfig) -> float:
        """A layer's four sites."""
        return sum(self.site_us(row, name, config) for name in self.shapes)

    def site_us(self, row: Row, name: str, config: LoraConfig) -> float:
        """A site and its node with adapters, minus the same without."""
        case, products = self.case(row, name), self.products(name)
        if not (case.chain.kind == "silu" and config.fuse_silu):
            config = replace(config, **FUSE_CHOICES[0])  # which are SiLU's alone
        key = (row, name, config)
        if key not in self._known:
            case.check(products[0], config)
            reps = range(LAYERS if row.tokens <= 256 else 2)
            calls = [
                lambda i=i: case.call(i % len(case.weights), products[i % len(products)], config)
                for i in reps
            ]
            if row.tokens <= 256:
                self._known[key] = graph_us(calls, self.rep) - self.base_us(row, name)
            else:
                # A warm device is slower: products that take milliseconds are timed beside each other, turn by turn.
                turns = [graph_us(calls, self.rep) - self._base_again_us(row, name) for _ in range(_TURNS)]
                self._known[key] = statistics.median(turns)
        return self._known[key]

    def _base_again_us(self, row: Row, name: str) -> float:
        self._base.pop((row, name), None)
        return self.base_us(row, name)

    def alone_us(self, row: Row, name: str, config: LoraConfig) -> tuple[float, float]:
        """Shrink, and expand as a launch of its own, each by itself."""
        case = self.case(row, name)
        out = torch.randn(row.tokens, case.site.out_features, device="cuda").bfloat16()
        work = case.batch.work
        assert work is not None
        plain = replace(config, pdl=False)
        made = [lora_triton.shrink(case.x, a, work, plain) for a, _ in case.weights]
        shrinks = [lambda a=a: lora_triton.shrink(case.x, a, work, plain) for a, _ in case.weights]
        expands = [
            lambda h=h, b=b: lora_triton.expand(h, b, work, out, case.site.out_slices)
            for h, (_, b) in zip(made, case.weights, strict=True)
        ]
        return graph_us(shrinks, self.rep), graph_us(expands, self.rep)

    def base_us(self, row: Row, name: str) -> float:
        """A site and its node without adapters."""
        key = (row, name)
        if key not in self._base:
            case, products = self.case(row, name), self.products(name)
            reps = range(LAYERS if row.tokens <= 256 else 2)
            calls = [lambda i=i: case.chain.base(case.x, products[i % len(products)]) for i in reps]
            self._base[key] = graph_us(calls, 2 * self.rep)
        return self._base[key]

    def case(self, row: Row, name: str) -> Case:
        key = (row, name)
        if key not in self._cases:
            self._cases[key] = Case(row, self.model, name, LAYERS if row.tokens <= 256 else 2)
        return self._cases[key]

    def forget(self, row: Row) -> None:
        for key in [k for k in self._cases if k[0] == row]:
            del self._cases[key]
        torch.cuda.empty_cache()

    def products(self, name: str) -> list[torch.Tensor]:
        """Base weights, enough different ones to exceed L2."""
        if name not in self._products:
            site = self.shapes[name]
            count = max(1, min(4, -(-100_000_000 // (2 * site.in_features * site.out_features))))
            self._products[name] = [
                torch.randn(site.out_features, site.in_features, device="cuda")
                .mul_(site.in_features**-0.5)
                .bfloat16()
                for _ in range(count)
            ]
        return self._products[name]


def tune(
    bench: Bench, rows: list[Row], start: LoraConfig, stages: list[list[dict[str, object]]], log: list
) -> tuple[float, LoraConfig]:
    """Coordinate descent: the best of each stage, by the sum over `rows` of time over goal, is kept for the next. Its
    score, infinite if no choice of a stage could be measured, and itself."""
    score, best = float("inf"), start
    for choices in stages:
        scores = [(float("inf"), best)]
        for choice in choices:
            config = replace(best, **choice)
            try:
                times = {str(row): bench.in_situ_us(row, config) for row in rows}
            except Exception as error:  # whatever it is, it says nothing about the next choice
                print(f"  left out {choice}: {error}", flush=True)
                log.append(
                    {"choice": choice, "fused": [config.fuse_norm, config.fuse_silu], "error": str(error)}
                )
                continue
            score = sum(times[str(row)] / (row.goal_us or 1.0) for row in rows)
            scores.append((score, config))
            log.append(
                {"choice": choice, "fused": [config.fuse_norm, config.fuse_silu], "us": times, "score": score}
            )
            print(f"  {score:7.3f} {choice} " + " ".join(f"{t:.1f}" for t in times.values()), flush=True)
        score, best = min(scores, key=lambda item: item[0])
    return score, best
