"""The budgets and rules a Scheduler keeps to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from lorax_backend.errors import ValidationError


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """Budgets of one engine; all counts are at least 1.

    `max_batch_tokens` bounds the tokens of one step, `max_num_seqs` the sequences that run at once. With
    `chunked_prefill` off a prompt is computed whole in one step, so the step budget is at least `max_input_length`.

    `skip_bound_s` is how long (seconds) later sequences may be admitted past one that finds no room. A level of
    `priority` counts as `priority_weight_s` seconds of waiting: higher priorities go first, yet none waits for ever.

    Steps of up to `small_step_tokens` cost the runner less than their share of a larger one (0: none do). Where
    sequences decode and no more prompt tokens wait than two such steps compute, a step is no larger.

    Adapters, and the base model, share the engine by `adapter_weights` (id -> weight, 1 for those not named; the base
    model is BASE_MODEL_ID). `fairness_bound_s` is how long one that waits may be given nothing before it goes first.
    When adapters wait for room on the device, those that have been in use for `adapter_cycle_time_s` seconds yield
    theirs. An adapter has at most `max_running_per_adapter` sequences running and `max_queued_per_adapter` waiting to
    be started (those preempted do not count); 0 is no cap.

    Raises:
        ValueError: a count or weight is too small.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    max_input_length: int
    max_total_tokens: int
    chunked_prefill: bool = True
    prefix_caching: bool = True
    skip_bound_s: float = 5.0
    priority_weight_s: float = 30.0
    fairness_bound_s: float = 10.0
    adapter_cycle_time_s: float = 2.0
    max_running_per_adapter: int = 0
    max_queued_per_adapter: int = 0
    small_step_tokens: int = 0
    adapter_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in fields(self):
            least = 0 if option.default == 0 else 1
            if option.type == "int" and getattr(self, option.name) < least:
                raise ValueError(f"{option.name} must be at least {least}, not {getattr(self, option.name)}")
        if self.adapter_cycle_time_s < 0:
            raise ValueError(f"adapter_cycle_time_s must not be negative, as {self.adapter_cycle_time_s} is")
        for name, weight in self.adapter_weights.items():
            if not 0.001 <= weight <= 1000:
                raise ValueError(
                    f"adapter_weights: {name!r} has {weight}, which is not within 0.001 and 1000"
                )

    @property
    def step_budget(self) -> int:
        """Tokens that one step may compute."""
        return (
            self.max_batch_tokens
            if self.chunked_prefill
            else max(self.max_batch_tokens, self.max_input_length)
        )

    @property
    def num_rows(self) -> int:
        """Sequences that run at once: never more than a step has tokens, so that every one can decode in each."""
        return min(self.max_num_seqs, self.step_budget)

    @property
    def grouping(self) -> float:
        """Tokens by which adapters that run already may get ahead of others."""
        return float(self.max_batch_tokens)

    def check_fits(self, prompt_len: int, max_new_tokens: int) -> None:
        """Refuse a request that could not run even alone.

        Raises:
            ValidationError: naming the limit and what to change.
        """
        if prompt_len < 1:
            raise ValidationError("prompt: it has no tokens; send at least one")
        if max_new_tokens < 1:
            raise ValidationError(
                f"max_new_tokens: {max_new_tokens} is less than 1; ask for at least one token"
            )
        if prompt_len > self.max_input_length:
            raise ValidationError(
                f"prompt: {prompt_len} tokens exceed max_input_length={self.max_input_length}; shorten the prompt"
            )
        total = prompt_len + max_new_tokens
        asked = f"max_new_tokens: a prompt of {prompt_len} tokens and max_new_tokens={max_new_tokens}"
        if total > self.max_total_tokens:
            raise ValidationError(
                f"{asked} exceed max_total_tokens={self.max_total_tokens}; shorten the prompt or lower max_new_tokens"
            )
        needed = -(-(total - 1) // self.block_size)  # nothing reads the keys and values of the last token
        if needed > self.num_blocks:
            raise ValidationError(
                f"{asked} need {needed} KV blocks of {self.block_size} tokens, but this server has {self.num_blocks}; "
                "shorten the prompt, lower max_new_tokens, or give the server more KV memory"
            )


def parse_weights(text: str) -> dict[str, float]:
    """The option `adapter_weights`: a JSON object of numbers, or nothing.

    Raises:
        ValueError: naming what is wrong.
    """
    if not text.strip():
        return {}
    try:
        weights = json.loads(text)
    except ValueError as error:
        raise ValueError(f"adapter_weights: not JSON ({error})") from None
    if not isinstance(weights, dict):
        raise ValueError(f"adapter_weights: expected a JSON object of numbers, not {text}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"adapter_weights: {name!r} has {weight!r}, which is not a number")
    return {name: float(weight) for name, weight in weights.items()}
