"""LoRA kernels in situ: shapes and batches, timing, and the search for block sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
from kernels_timing import graph_us

from lorax_kernels import LoraBatch, LoraSite, PageLayout, WorkBuffer, lora_triton, pages_for_rank
from lorax_kernels.tuning import LoraConfig

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


class WrongResultError(Exception):
    """A kernel's result is not what float64 gives."""


class Case:
    """One site of one row on the device, with the weights of `layers` different layers."""

    def __init__(self, row: Row, site: LoraSite, layers: int, seed: int = 0) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.row, self.site = row, site
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

    def check(self, config: LoraConfig) -> None:
        """Raise if the delta is wrong on any of up to 64 rows."""
        a, b = self.weights[0]
        base = torch.randn(self.row.tokens, self.site.out_features, device="cuda").bfloat16()
        got = base.clone()
        lora_triton.add_lora(self.x, a, b, self.batch, got, self.site.out_slices, config)
        rows = np.unique(np.linspace(0, self.row.tokens - 1, 64).astype(int))
        error = norm = 0.0
        for row in rows:
            pages = [int(p) for p in self.table[self.ids[row]] if p >= 0]
            h = torch.einsum("psui,i->psu", a[pages].double(), self.x[row].double())
            begin = 0
            for s, width in enumerate(self.site.out_slices):
                want = torch.einsum("pu,puo->o", h[:, s], b[pages][:, :, begin : begin + width].double())
                delta = got[row, begin : begin + width].double() - base[row, begin : begin + width].double()
                error += float((delta - want).square().sum())
                norm += float(
                    want.square().sum() + 1e-4 * base[row, begin : begin + width].double().square().sum()
                )
                begin += width
        if not error**0.5 <= 2e-2 * norm**0.5:
            raise WrongResultError(
                f"wrong result: {self.row}, {self.site}, {config}: error {error**0.5 / norm**0.5:.4f}"
            )

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
        self.shapes, self.rep = SHAPES[model], rep
        self._cases: dict[tuple[Row, str], Case] = {}
        self._base: dict[tuple[int, str], float] = {}
        self._known: dict[tuple[Row, str, LoraConfig], float] = {}
        self._products: dict[str, list[torch.Tensor]] = {}

    def in_situ_us(self, row: Row, config: LoraConfig) -> float:
        """A layer's four sites."""
        return sum(self.site_us(row, name, config) for name in self.shapes)

    def site_us(self, row: Row, name: str, config: LoraConfig) -> float:
        key = (row, name, config)
        if key not in self._known:
            case, products = self.case(row, name), self.products(name)
            case.check(config)
            reps = LAYERS if row.tokens <= 256 else 2

            def call(i: int) -> None:
                lora_triton.linear(
                    case.x,
                    (products[i % len(products)], None),
                    case.weights[i % len(case.weights)],
                    case.batch,
                    case.site.out_slices,
                    config,
                )

            total = graph_us([lambda i=i: call(i) for i in range(reps)], self.rep)
            self._known[key] = total - self.base_us(row, name)
            if row.tokens > 256:
                # A warm device is slower: products that take milliseconds are timed again beside each other.
                again = (
                    self._base_again_us(row, name),
                    graph_us([lambda i=i: call(i) for i in range(reps)], self.rep),
                )
                self._known[key] = (total + again[1]) / 2 - again[0]
        return self._known[key]

    def _base_again_us(self, row: Row, name: str) -> float:
        del self._base[row.tokens, name]
        return self.base_us(row, name)

    def alone_us(self, row: Row, name: str, config: LoraConfig) -> tuple[float, float]:
        """Shrink and expand by themselves."""
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
        key = (row.tokens, name)
        if key not in self._base:
            x, products = self.case(row, name).x, self.products(name)
            reps = LAYERS if row.tokens <= 256 else 2
            calls = [
                lambda i=i: torch.nn.functional.linear(x, products[i % len(products)]) for i in range(reps)
            ]
            self._base[key] = graph_us(calls, 2 * self.rep)
        return self._base[key]

    def case(self, row: Row, name: str) -> Case:
        key = (row, name)
        if key not in self._cases:
            self._cases[key] = Case(row, self.shapes[name], LAYERS if row.tokens <= 256 else 2)
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
                torch.randn(site.out_features, site.in_features, device="cuda").bfloat16()
                for _ in range(count)
            ]
        return self._products[name]


def tune(
    bench: Bench, rows: list[Row], start: LoraConfig, stages: list[list[dict[str, object]]], log: list
) -> LoraConfig:
    """Coordinate descent: the best of each stage, by the sum over `rows` of time over goal, is kept for the next."""
    best = start
    for choices in stages:
        scores = []
        for choice in choices:
            config = replace(best, **choice)
            try:
                times = {str(row): bench.in_situ_us(row, config) for row in rows}
            except (WrongResultError, triton.runtime.errors.OutOfResources) as error:
                print(f"  left out {choice}: {error}", flush=True)
                log.append({"choice": choice, "error": str(error)})
                continue
            score = sum(times[str(row)] / (row.goal_us or 1.0) for row in rows)
            scores.append((score, config))
            log.append({"choice": choice, "us": times, "score": score})
            print(f"  {score:7.3f} {choice} " + " ".join(f"{t:.1f}" for t in times.values()), flush=True)
        best = min(scores, key=lambda item: item[0])[1]
    return best
