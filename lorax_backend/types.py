"""The data that crosses module borders. Standard library only.

Two layers of request exist. A `GenerateRequest` is what a caller asked for, in text. An `EngineRequest` is what
the engine runs: token ids and numbers, small enough to pickle to another process.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

BASE_MODEL_ID = "__base_model__"


class FinishReason(str, Enum):
    """Why a sequence ended; the values are LoRAX's words on the wire."""

    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Which adapter a request names. Two requests share an adapter only if all fields are equal.

    `id` is a hub repository id, a folder or an address; `revision` is None for "whatever is current". `generation`
    is set by the engine alone: it grows when an adapter is reloaded, so that requests in flight keep their weights.
    """

    source: str
    id: str
    revision: str | None = None
    generation: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.id}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token of one sequence is chosen, and when the sequence ends by ids or count.

    `do_sample=False` is greedy; temperature, top_k and top_p then have no effect. `top_k=0` and `top_p=1.0` are
    off. `top_logprobs=None` asks for no log probabilities, 0 for the chosen token's, k > 0 for the k best beside it.
    `seed` is always set when `do_sample` is: whoever builds the object draws one if the caller gave none.
    `typical_p=1.0` is off. `logit_bias` holds (id, bias) pairs added to the raw logits. `prompt_logprobs` asks for the
    log probability of every prompt token but the first; such a request takes no block from the prefix cache.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    top_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    typical_p: float = 1.0
    watermark: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: bool = False


@dataclass(slots=True)
class EngineRequest:
    """One sequence for the engine. `handle` is unique for the life of the engine; `prompt_ids` is not empty and
    `len(prompt_ids) + sampling.max_new_tokens` is at most the engine's max_total_tokens. A request that has waited
    `queue_timeout_s` seconds without being scheduled once ends with an OverloadedError; None: no such limit."""

    handle: int
    prompt_ids: list[int]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    api_token: str | None = field(default=None, repr=False)
    priority: int = 0
    queue_timeout_s: float | None = None


class TokenOutput(NamedTuple):
    """One new token of one sequence, or its end. A NamedTuple because thousands a second are pickled.

    `token_id` is None only when the sequence ends without a token (an error). `top_logprobs` holds (id, logprob)
    pairs, best first. `error` is a `LoraxError.to_dict()`. `cached_tokens` (prompt tokens found in the prefix cache)
    and `queue_s` (seconds from submission to first scheduling) are set on a sequence's first token only, as is
    `prompt_logprobs`, one number for each prompt token but the first, for a request that asked.
    """

    handle: int
    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    finish_reason: FinishReason | None = None
    error: dict[str, Any] | None = None
    cached_tokens: int | None = None
    queue_s: float | None = None
    prompt_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts fixed once the engine is ready; shown in the start table and in the `info` control reply."""

    model_id: str
    model_type: str
    dtype: str
    device: str
    attention_backend: str
    lora_backend: str
    num_blocks: int
    block_size: int
    adapter_pages: int
    adapter_page_rank: int
    max_lora_rank: int
    max_input_length: int
    max_total_tokens: int
    max_num_seqs: int
    max_batch_tokens: int
    load_seconds: float
    weight_bytes: int = 0
    kv_cache_bytes: int = 0
    adapter_arena_bytes: int = 0
    cuda_graph_batch_sizes: tuple[int, ...] = ()
    prefill_attention: str = ""
    """Attention of prompts that begin in a step, and why it was chosen; empty where nothing was told."""
    prefill_graph_tokens: tuple[int, ...] = ()
    start_times: str = ""
    """How long each part of the start took, and how its kernels came to be; empty where nothing was told."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's state, taken between steps. `adapter_tiers` is the provider's whole `stats()`,
    `step_counts` what `engine.step_counters` counted, `max_tokens` what running sequences may come to together."""

    waiting: int = 0
    running: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    adapter_pages_total: int = 0
    adapter_pages_used: int = 0
    adapters_on_device: int = 0
    adapters_loading: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    adapter_tiers: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 0
    step_counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Which optional parts of an answer the caller wants; every flag costs something."""

    token_ids: bool = False
    tokens: bool = False
    finish_reason: bool = False
    logprobs: bool = False
    cumulative_logprob: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    details: bool = False


@dataclass(slots=True)
class GenerateRequest:
    """A caller's request after decoding and range checks, before tokenization.

    Exactly one of `prompt`, `messages` and `input_ids` is set; `tools` go to the chat template with `messages`.
    `sampling.max_new_tokens == 0` stands for "as many as the model's limit allows". Without `seed_given` the service
    draws the seed of a sampled request. The text ends with the stop string that ended it unless
    `include_stop_str_in_output` is false. `n` sequences are drawn and all returned, or `best_of` and the likeliest is.
    `queue_timeout_s` bounds the wait for the first step in seconds.
    """

    request_id: str
    sampling: SamplingParams
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    input_ids: list[int] | None = None
    adapter: AdapterRef | None = None
    api_token: str | None = field(default=None, repr=False)
    stop: tuple[str, ...] = ()
    stream: bool = False
    ignore_eos_token: bool = False
    truncate: int | None = None
    return_full_text: bool = False
    add_special_tokens: bool = True
    seed_given: bool = False
    priority: int = 0
    outputs: OutputOptions = OutputOptions()
    tools: list[dict[str, Any]] | None = None
    include_stop_str_in_output: bool = True
    n: int = 1
    best_of: int = 1
    queue_timeout_s: float | None = None
    guideline: str | None = None


@dataclass(slots=True)
class Token:
    """One generated token as the caller sees it; `text` may be empty while a character is incomplete."""

    id: int
    text: str
    logprob: float | None = None
    special: bool = False
    top_logprobs: tuple[tuple[int, str, float], ...] | None = None


@dataclass(slots=True)
class GenerationEvent:
    """A piece of an answer: the text and tokens since the last event. `finish_reason` or `error` marks the last of its
    sequence.

    `generated_text` (the whole text), `prompt_tokens`, `generated_tokens`, `seed` and `timings` (seconds: queue,
    first_token, total) are set on the last event. `index` tells the sequences of a request with n > 1 apart; `more`
    is true on the last event of one of them while others go on. `prefill` (the prompt's tokens, if asked for) and
    `best_of_sequences` (the answers that were not picked) come with the last event.
    """

    text: str = ""
    tokens: AbstractSequence[Token] = ()
    finish_reason: FinishReason | None = None
    error: dict[str, Any] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    generated_text: str | None = None
    cumulative_logprob: float | None = None
    seed: int | None = None
    timings: dict[str, float] | None = None
    index: int = 0
    more: bool = False
    prefill: AbstractSequence[Token] | None = None
    best_of_sequences: list[GenerationEvent] | None = None

    @property
    def final(self) -> bool:
        """True on the last event of the request."""
        return (self.finish_reason is not None or self.error is not None) and not self.more
