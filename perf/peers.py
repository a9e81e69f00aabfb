"""What ours is compared with: the card's limits, the peers' recorded numbers, and our goals.

Everything is for one NVIDIA H100 80GB HBM3 with torch 2.11.0+cu130 and triton 3.6.0, bfloat16 and random weights, rank
16 on all seven projections unless a row says otherwise. A byte floor is the time in which the card's copy bandwidth
moves what a step must read. None stands for "not measured" and "no goal".
"""

from __future__ import annotations

from dataclasses import dataclass

HARDWARE = "NVIDIA H100 80GB HBM3"
MEASURED = "2026-11-21"
VLLM = (
    "vLLM 0.26.0, AsyncLLM with CUDA graphs and async scheduling, LoRA on the seven projections, 128 slots of rank 16,"
    " prefix caching off"
)
KERNEL_PEERS = "the unmodified kernels of vLLM 0.26.0 and SGLang 0.5.23"
KINDS = ("base", "one adapter", "all distinct")
COPY_GBS = 2998.0
MATMUL_TFLOPS = 731.0
GOAL_MISSED = 3  # exit status of a program that measured everything and found a goal missed


@dataclass(frozen=True, slots=True)
class Decode:
    """Table B: prompt 128, output 128. Milliseconds between tokens (median); vLLM's also in tokens a second."""

    streams: int
    kind: str
    floor_ms: float
    vllm_ms: float | None
    vllm_tokens_s: float | None
    goal_ms: float


def _decode_rows(
    streams: int,
    floors: tuple[float, float],
    vllm: list[tuple[float, float] | None],
    goals: list[float | None],
) -> list[Decode]:
    # One adapter adds 84 MB to what a step reads: the base model's floor to two digits.
    floor = {"base": floors[0], "one adapter": floors[0], "all distinct": floors[1]}
    rows = []
    for kind, peer, goal in zip(KINDS, vllm, goals, strict=True):
        if goal is not None:
            rows.append(Decode(streams, kind, floor[kind], *(peer or (None, None)), goal))
    return rows


DECODE: dict[str, list[Decode]] = {
    "llama3-8b": [
        *_decode_rows(1, (5.0, 5.0), [(6.46, 155), (10.88, 92), None], [6.0, 6.4, None]),
        *_decode_rows(8, (5.1, 5.3), [(6.59, 1206), (11.16, 711), (13.68, 580)], [6.2, 6.6, 6.9]),
        *_decode_rows(32, (5.3, 6.2), [(6.98, 4555), (11.55, 2746), (22.63, 1402)], [6.6, 7.2, 8.3]),
        *_decode_rows(64, (5.5, 7.3), [(7.53, 8412), (13.63, 4674), (36.25, 1752)], [7.2, 7.8, 10.0]),
        *_decode_rows(128, (6.1, 9.7), [(8.72, 14608), (15.96, 7964), (51.14, 2472)], [8.6, 9.3, 14.0]),
    ],
    "llama3-1b": [
        *_decode_rows(1, (0.83, 0.83), [(1.61, 612), (3.12, 321), None], [1.05, 1.25, None]),
        *_decode_rows(32, (0.89, 1.13), [(2.61, 12154), (3.32, 9559), (6.70, 4241)], [1.30, 1.50, 1.80]),
        *_decode_rows(128, (1.1, 2.05), [(3.62, 33687), (5.21, 24869), (13.88, 8225)], [2.2, 2.5, 3.4]),
    ],
}


@dataclass(frozen=True, slots=True)
class Prefill:
    """Table C: prompt 2048, output 16. Prompt and answer tokens a second, all streams together."""

    streams: int
    kind: str
    vllm_tokens_s: float
    goal_tokens_s: float


PREFILL: dict[str, list[Prefill]] = {
    "llama3-8b": [
        Prefill(8, "base", 32568, 36000),
        Prefill(8, "one adapter", 13842, 32000),
        Prefill(8, "all distinct", 13395, 32000),
        Prefill(32, "base", 38230, 42000),
        Prefill(32, "one adapter", 15700, 36000),
        Prefill(32, "all distinct", 14756, 36000),
    ]
}
PREFILL_CEILING = {"llama3-8b": 55_000.0}  # tokens a second at the card's matrix rate


@dataclass(frozen=True, slots=True)
class Kernels:
    """Table E: (base products + LoRA) - base products of a layer's four sites, microseconds. Rank 0: 8 to 64 mixed."""

    tokens: int
    adapters: int
    rank: int
    floor_us: float
    vllm_us: float
    csgmv_us: float
    triton_v2_us: float
    torch_us: float | None
    goal_us: float


KERNELS: dict[str, list[Kernels]] = {
    "8b": [
        Kernels(1, 1, 16, 0.9, 52, 81, 13.9, 85, 8),
        Kernels(32, 1, 16, 3.3, 47, 98, 17.4, 196, 12),
        Kernels(32, 32, 16, 30, 431, 124, 57, 216, 42),
        Kernels(128, 1, 16, 10.5, 112, 167, 33.5, 412, 25),
        Kernels(128, 32, 16, 38, 442, 172, 72, 444, 55),
        Kernels(128, 128, 16, 122, 1494, 295, 189, 510, 150),
        Kernels(8192, 32, 16, 644, 5142, 3063, 777, None, 650),
        Kernels(32, 32, 0, 48, 815, 205, 115, None, 80),
        Kernels(128, 128, 64, 457, 2172, 1184, 504, None, 490),
    ]
}


@dataclass(frozen=True, slots=True)
class ServedGoals:
    """Table F: what the way through tritonserver's gRPC may cost against the engine alone, at 128 streams."""

    streams: int = 128
    tokens_share: float = 0.95
    step_mean_ratio: float = 1.05
    step_p99_ratio: float = 1.50
    first_token_ms: float = 3.0


SERVED = ServedGoals()

# A step down in tokens/s from one number of registered adapters to the next is a cliff below this share.
SWEEP_REGISTERED = (1, 8, 32, 128, 512, 1024)
SWEEP_STREAMS = 128
SWEEP_CLIFF = 0.5
