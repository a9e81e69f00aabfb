"""What is decided before a model runs: device, dtype, backends, and the step that memory is measured with."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import torch

from lorax_backend.config import ServerConfig
from lorax_backend.model.compile_ahead import CompileAhead, Progress, most_processes
from lorax_backend.model.config import ModelConfig
from lorax_backend.model.graphs import graph_sizes
from lorax_backend.model.head_layout import HeadLayout
from lorax_backend.model.limits import Limits
from lorax_backend.model.rehearsal_plan import StartPlan
from lorax_backend.model.varlen import FreshAttention, choose
from lorax_backend.scheduler.sequence import ScheduledBatch, ScheduledSequence, Sequence
from lorax_backend.types import SamplingParams
from lorax_kernels.device_facts import DeviceFacts


def pick_device(name: str) -> torch.device:
    """The device that the option `device` means.

    Raises:
        ValueError: it asks for a GPU, and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device is cuda, but torch finds no usable GPU; set device to cpu or auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def pick_dtype(name: str, model: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype that the option `dtype` means: "auto" is the checkpoint's on CUDA, float32 on a CPU."""
    if name == "auto":
        name = model.torch_dtype if device.type == "cuda" else "float32"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_backends(config: ServerConfig, device: torch.device) -> None:
    """Refuse options that this device cannot do, or that contradict each other.

    Raises:
        ValueError: naming the option and what to set it to.
    """
    if config.prefill_graph_tokens > 0 and not config.cuda_graphs:
        raise ValueError(
            f"prefill_graph_tokens is {config.prefill_graph_tokens}, but cuda_graphs is off; turn that on, or set "
            "prefill_graph_tokens to 0"
        )
    native = "triton" if device.type == "cuda" else "torch"
    # These are looked at more closely by `choose_attention`.
    fresh = ("torch_varlen", "torch_cudnn", "flash_attn") if device.type == "cuda" else ()
    for option, value, others in (
        ("attention", config.attention, fresh),
        ("lora_kernels", config.lora_kernels, ()),
    ):
        if value not in ("auto", native, *others):
            raise ValueError(
                f"{option} is {value}, which cannot be had on {device.type}; use auto or {native}"
            )


@torch.inference_mode()
def choose_attention(
    config: ServerConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    report: Callable[[str], None],
) -> FreshAttention:
    """What computes prompts that begin in a step of up to `max_tokens`; see `varlen.choose`.

    Raises:
        ValueError: the option `attention` names one that is missing or wrong.
    """
    windows = tuple(dict.fromkeys(model.layer_windows))
    layout = HeadLayout(
        model.num_heads, model.num_kv_heads, model.head_dim, windows, dtype, device, config.block_size
    )
    if device.type == "cpu":
        return choose("torch", layout, max_tokens)
    report("comparing attention implementations")
    choice = choose(config.attention, layout, max_tokens)
    torch.cuda.empty_cache()  # what was tried on is the KV cache's
    report(f"attention of fresh prompts: {choice.description}")
    return choice


def max_blocks(limits: Limits, block_size: int) -> int:
    """KV blocks of the longest sequence."""
    return -(-limits.max_total_tokens // block_size) + 1


def compile_ahead(
    config: ServerConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    limits: Limits,
    prefill_sizes: tuple[int, ...],
    report: Progress,
) -> CompileAhead | None:
    """Begin to compile the kernels of a start with graphs, or only to count them, as `compile_processes` says; None
    where there is nothing to capture."""
    if device.type != "cuda" or not config.cuda_graphs:
        return None
    plan = StartPlan(
        device=DeviceFacts.of(device),
        model=model,
        dtype=str(dtype).removeprefix("torch."),
        block_size=config.block_size,
        max_blocks=max_blocks(limits, config.block_size),
        max_num_seqs=limits.max_num_seqs,
        max_total_tokens=limits.max_total_tokens,
        max_lora_rank=config.max_lora_rank,
        sizes=graph_sizes(limits.max_num_seqs),
        prefill_sizes=prefill_sizes,
    )
    return CompileAhead(plan, most_processes(config.compile_processes), report)


class StartTimes:
    """Hands on what is reported of a start, and adds up how long each part of it took. Call it as a `Progress`."""

    def __init__(self, report: Progress) -> None:
        self._report = report
        self._part = "the device and the configuration"
        self._since = time.monotonic()
        self._seconds: dict[str, float] = {}

    def __call__(self, text: str) -> None:
        self._change(re.split(r"[:,]", text, maxsplit=1)[0])
        self._report(text)

    def told(self) -> str:
        """The parts of more than a tenth of a second, in words."""
        self._change(self._part)
        return ", ".join(
            f"{part} {seconds:.1f} s" for part, seconds in self._seconds.items() if seconds > 0.1
        )

    def _change(self, part: str) -> None:
        now = time.monotonic()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now


def largest_batch(limits: Limits, block_size: int) -> ScheduledBatch:
    """A step of `max_batch_tokens` prompt tokens in as many sequences as may run, all of which sample in all ways: each
    takes memory of its own for every row of logits."""
    count = min(limits.max_num_seqs, limits.max_batch_tokens)
    params = SamplingParams(
        max_new_tokens=2,
        min_new_tokens=1,
        stop_token_ids=(0,),
        do_sample=True,
        temperature=0.9,
        top_p=0.9,
        typical_p=0.9,
        repetition_penalty=1.1,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        top_logprobs=5,
        watermark=True,
        logit_bias=((0, 0.1),),
    )
    items: list[ScheduledSequence] = []
    blocks = 0
    for slot in range(count):
        length = min(limits.max_batch_tokens // count, limits.max_input_length)
        seq = Sequence(slot, length, params, None, 0, 0.0, token_ids=[0] * length, slot=slot)
        needed = -(-length // block_size)
        seq.block_table = list(range(blocks, blocks + needed))
        blocks += needed
        items.append(ScheduledSequence(seq, 0, length, sample=True))
    return ScheduledBatch(items, sum(item.count for item in items))
