#!/usr/bin/env python3
"""Draws the results in perf/results: milliseconds a step against the byte floor and the peers, tokens a second over
the number of adapters, and what LoRA adds to a layer.

    python perf/plots.py                 # writes perf/results/*.svg
    python perf/plots.py --format png --out /tmp

Needs matplotlib (`pip install -c constraints.txt '.[perf]'`). A picture names the SHA-256 of the JSON it was drawn
from; a test finds pictures that are older than their numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf" / "results"
sys.path[:0] = [str(ROOT / "perf")]

import peers
from readme_table import DECODE_1B, DECODE_8B, KERNELS, SWEEP, Source, find

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito).
_OURS, _VLLM, _FLOOR, _GOAL, _SGLANG, _OTHER = (
    "#0072B2",
    "#D55E00",
    "#666666",
    "#009E73",
    "#E69F00",
    "#CC79A7",
)
_DIGEST = "data sha256 "


def digest(result: dict[str, Any]) -> str:
    """SHA-256 of what a picture shows: the result and the peers' numbers."""
    text = json.dumps(result, sort_keys=True) + (ROOT / "perf" / "peers.py").read_text()
    return hashlib.sha256(text.encode()).hexdigest()


def drawn_from(picture: Path) -> str | None:
    """The digest that an SVG names."""
    found = re.search(_DIGEST + r"([0-9a-f]{64})", picture.read_text())
    return found[1] if found else None


def _figure(columns: int, width: float = 11.0, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, sharey=columns > 1)
    return figure, list(axes) if columns > 1 else [axes]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def decode_figure(result: dict[str, Any]) -> Figure:
    """Milliseconds between tokens over the number of streams, one panel for each kind of batch."""
    figure, panels = _figure(3)
    listed = peers.DECODE[result["shape"]]
    for axes, kind in zip(panels, peers.KINDS, strict=True):
        ours = [(row["streams"], row["ms_p50"]) for row in result["decode"] if row["adapters"] == kind]
        rows = [row for row in listed if row.kind == kind]
        streams = sorted({row.streams for row in rows} | {count for count, _ in ours})
        place = {count: index for index, count in enumerate(streams)}
        series: list[tuple[str, list[tuple[int, float | None]], str, str, str]] = [
            ("vLLM 0.26", [(row.streams, row.vllm_ms) for row in rows], _VLLM, "s-", "measured"),
            ("our goal", [(row.streams, row.goal_ms) for row in rows], _GOAL, "_", "goal"),
            ("ours", list(ours), _OURS, "o-", "measured"),
            ("byte floor", [(row.streams, row.floor_ms) for row in rows], _FLOOR, "--", "floor"),
        ]
        for label, points, colour, style, _ in series:
            known = [(place[count], value) for count, value in points if value is not None]
            size = 14 if style == "_" else 5
            axes.plot(
                *zip(*known, strict=True), style, color=colour, label=label, markersize=size, linewidth=1.8
            )
        title = {"base": "base model", "all distinct": "every stream its own adapter"}.get(kind, kind)
        axes.set_title(title, fontsize=11)
        axes.set_xticks(range(len(streams)), [str(count) for count in streams])
        axes.set_xlabel("streams")
        axes.set_yscale("log")
        _plain(axes)
    panels[0].set_ylabel("ms between tokens (median)")
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50) if panels[0].get_ylim()[0] <= t <= panels[0].get_ylim()[1]]
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].minorticks_off()
    panels[0].legend(frameon=False, fontsize=9)
    name = {"llama3-8b": "Llama-3-8B", "llama3-1b": "Llama-3.2-1B"}.get(result["shape"], result["shape"])
    ours = "" if "through" in result else " (ours: the model's steps alone, without a scheduler)"
    figure.suptitle(
        f"Decoding, {name}'s shape, {result['environment']['gpu'].split(',')[0]}{ours}", fontsize=12
    )
    return figure


def sweep_figure(result: dict[str, Any]) -> Figure:
    """Tokens a second over the number of registered adapters."""
    figure, (axes,) = _figure(1, width=7.0)
    counts = [row["registered"] for row in result["sweep"]]
    rates = [row["tokens_s"] for row in result["sweep"]]
    axes.plot(range(len(counts)), rates, "o-", color=_OURS, linewidth=1.8)
    for index, rate in enumerate(rates):
        axes.annotate(
            f"{rate:,.0f}", (index, rate), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=9
        )
    fitting = [index for index, count in enumerate(counts) if count <= result["arena_adapters"]]
    if fitting and len(fitting) < len(counts):
        edge = len(fitting) - 0.5
        axes.axvline(edge, color=_FLOOR, linestyle="--", linewidth=1)
        axes.annotate(
            "more than the GPU holds", (edge, 0), textcoords="offset points", xytext=(6, 6), fontsize=9
        )
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set_ylim(0, max(rates) * 1.15)
    axes.set_xlabel("adapters registered, requests drawn evenly")
    axes.set_ylabel("tokens/s")
    gpu = result["environment"]["gpu"].split(",")[0]
    axes.set_title(
        f"{result['streams']} streams, {result['shape']}, {gpu if gpu != 'none' else 'CPU'}", fontsize=11
    )
    _plain(axes)
    return figure


def kernel_figure(result: dict[str, Any]) -> Figure:
    """What LoRA adds to a layer, in microseconds, ours and the peers' beside the byte floor."""
    figure, (axes,) = _figure(1)
    listed = {(row.tokens, row.adapters, row.rank): row for row in peers.KERNELS["8b"]}
    rows = [(row, listed[key]) for row in result["lora"]
            if (key := (row["tokens"], row["adapters"], row["rank"])) in listed]  # fmt: skip
    series: tuple[tuple[str, str, Callable[[Any, peers.Kernels], float]], ...] = (
        ("vLLM 0.26", _VLLM, lambda _, peer: peer.vllm_us),
        ("SGLang csgmv", _SGLANG, lambda _, peer: peer.csgmv_us),
        ("SGLang triton_v2", _OTHER, lambda _, peer: peer.triton_v2_us),
        ("ours", _OURS, lambda mine, _: mine["in_situ_us"]),
    )
    width = 0.8 / len(series)
    for index, (label, colour, value) in enumerate(series):
        places = [at + (index - (len(series) - 1) / 2) * width for at in range(len(rows))]
        axes.bar(places, [value(*pair) for pair in rows], width * 0.92, color=colour, label=label)
    for at, (mine, _) in enumerate(rows):
        label = "byte floor" if at == 0 else None
        axes.plot([at - 0.42, at + 0.42], [mine["floor_us"]] * 2, color="black", linewidth=1.6, label=label)
    names = [f"{m['tokens']:,} tokens\n{m['adapters']} adapters\nrank {m['rank'] or '8-64'}" for m, _ in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("microseconds a layer")
    axes.legend(frameon=False, fontsize=9, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.02))
    axes.set_ylim(top=axes.get_ylim()[1] * 2.5)
    axes.set_title(f"LoRA in situ, {result['environment']['gpu'].split(',')[0]}", fontsize=11)
    _plain(axes)
    return figure


PICTURES: tuple[tuple[str, Source, Callable[[dict[str, Any]], Figure]], ...] = (
    ("decode-llama3-8b-h100", DECODE_8B, decode_figure),
    ("decode-llama3-1b-h100", DECODE_1B, decode_figure),
    ("sweep-llama3-8b-h100", SWEEP, sweep_figure),
    ("kernels-llama3-8b-h100", KERNELS, kernel_figure),
)


def draw(results: Path, out: Path, kind: str = "svg") -> list[Path]:
    """Draw every picture for which there is a result."""
    import matplotlib

    # Text stays text, and equal data give equal files.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lorax-triton", "font.size": 10})
    made = []
    for name, source, make in PICTURES:
        found = find(source, results)
        if found is None:
            continue
        path = out / f"{name}.{kind}"
        metadata: dict[str, Any] = {"Description": _DIGEST + digest(found[1])}
        if kind == "svg":
            metadata["Date"] = None
        make(found[1]).savefig(path, metadata=metadata, dpi=110)
        made.append(path)
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, help="default: beside the results")
    args = parser.parse_args(argv)
    out = args.out or args.results
    out.mkdir(parents=True, exist_ok=True)
    for path in draw(args.results, out, args.format):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
