"""Sequence: one request inside the engine, and what a step does with it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from lorax_backend.types import AdapterRef, EngineRequest, SamplingParams

if TYPE_CHECKING:
    from lorax_backend.scheduler.adapter_queue import AdapterQueue


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and place of one request. Only the Scheduler writes the fields below `arrival`.

    `token_ids` is the prompt and every token whose value is known; `num_tokens` counts these and the ones that launched
    steps are sampling, `num_in_flight` the latter alone. `num_computed` counts tokens whose keys and values are in the
    cache (or will be, once the steps already launched have run). `max_total` is how many tokens there are when it ends
    by length, `capacity` how many its blocks hold. `slot` is the sequence's row in the runner's per-sequence state
    while it runs, -1 otherwise. `adapter_slot` is the index the adapter provider gave, -1 for the base model.
    `cache_key` seeds the prefix hashes: two adapters, or two revisions of one, never share blocks. `block_hashes` holds
    the prefix hashes of the leading full blocks, as far as known; `num_registered` is how many of them the block
    manager has been offered for sharing, `num_announced` how many of them were known when it began to run. `queue` is
    that of its adapter, `order` its place in it, `token_cost` what a token is charged. `refused_since` is when it was
    first passed over since it last began to wait.
    """

    handle: int
    prompt_len: int
    sampling: SamplingParams
    adapter: AdapterRef | None
    priority: int
    arrival: float
    token_ids: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    num_cached: int = 0
    num_in_flight: int = 0
    num_preemptions: int = 0
    block_table: list[int] = field(default_factory=list)
    slot: int = -1
    adapter_slot: int = -1
    cache_key: str = ""
    first_scheduled: float | None = None
    block_hashes: list[bytes] = field(default_factory=list, repr=False)
    num_registered: int = 0
    num_announced: int = 0
    queue_timeout_s: float | None = None
    queue: AdapterQueue | None = field(default=None, repr=False)
    order: float = 0.0
    token_cost: float = 1.0
    refused_since: float | None = None
    capacity: int = 0
    num_tokens: int = field(init=False)
    max_total: int = field(init=False, repr=False)
    stop_token_ids: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.token_ids)
        self.max_total = self.prompt_len + self.sampling.max_new_tokens
        self.stop_token_ids = self.sampling.stop_token_ids

    @classmethod
    def from_request(cls, request: EngineRequest, arrival: float) -> Sequence:
        return cls(
            handle=request.handle,
            prompt_len=len(request.prompt_ids),
            sampling=request.sampling,
            adapter=request.adapter,
            priority=request.priority,
            arrival=arrival,
            token_ids=list(request.prompt_ids),
            queue_timeout_s=request.queue_timeout_s,
        )

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, known ones only."""
        return len(self.token_ids) - self.prompt_len


@dataclass(slots=True)
class ScheduledSequence:
    """`count` tokens of one sequence, from position `start` on, to be computed in one step.

    `sample` says that the last of them is the sequence's last token, so that a next token is drawn. When
    `start + count > len(seq.token_ids)`, the missing last id is the one the step before drew for `seq.slot`; it is
    still on the device. `generated_index` is the 0-based index of the token to be drawn (the position in the
    sequence's random stream). Nobody changes it; it is not frozen because that would double the cost of making it.
    """

    seq: Sequence
    start: int
    count: int
    sample: bool
    generated_index: int = 0


@dataclass(slots=True)
class ScheduledBatch:
    """One step. Sequences that decode (count 1) come first, then prefill chunks.

    Block tables are already long enough for every scheduled token. `finished_slots` are runner rows freed since the
    last step.
    """

    sequences: list[ScheduledSequence]
    num_tokens: int
    finished_slots: list[int] = field(default_factory=list)

    @property
    def num_sampled(self) -> int:
        return sum([item.sample for item in self.sequences])


@dataclass(slots=True)
class StepResult:
    """What a step drew: one entry a scheduled sequence with `sample`, in batch order.

    `logprobs` holds natural logs of the chosen tokens' probabilities after all processors, in fp32; None where the
    sequence did not ask. `top_logprobs` likewise, (id, logprob) pairs, best first. `prompt_logprobs` maps an entry's
    number to the log probabilities of its prompt's tokens but the first, for the first token of sequences that asked.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    top_logprobs: list[tuple[tuple[int, float], ...] | None]
    prompt_logprobs: dict[int, tuple[float, ...]] = field(default_factory=dict)
