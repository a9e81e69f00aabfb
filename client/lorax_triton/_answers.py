"""What comes back from the server, in LoRAX's words: plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


@dataclass
class InputToken:
    """A token of the prompt; the first has no log probability."""

    id: int
    text: str
    logprob: float | None = None


@dataclass
class AlternativeToken:
    """One of the best tokens at a position, whether chosen or not."""

    id: int
    text: str
    logprob: float | None = None


@dataclass
class Token:
    """A generated token.

    Attributes:
        id: vocabulary index; -1 for text that came without a token of its own.
        text: what the token adds to the text; empty while a character is incomplete.
        logprob: natural logarithm of the token's probability, or None if the server did not compute it.
        special: True for tokens such as end-of-sequence, which are no part of the text.
        alternative_tokens: the `return_k_alternatives` best tokens, best first, if asked for.
        skipped: True if a speculative step accepted it together with the token before.
    """

    id: int
    text: str
    logprob: float | None = None
    special: bool = False
    alternative_tokens: list[AlternativeToken] | None = None
    skipped: bool = False


class FinishReason(str, Enum):
    """Why the text ended: `max_new_tokens` reached, end-of-sequence token, or one of `stop_sequences`."""

    Length = "length"
    EndOfSequenceToken = "eos_token"
    StopSequence = "stop_sequence"


@dataclass
class BestOfSequence:
    """One of the other sequences drawn for `best_of`."""

    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None = None
    prefill: list[InputToken] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)


@dataclass
class StreamDetails:
    """Facts about a finished stream. `timings` are seconds (queue, first_token, total), as the server saw them;
    `cached_tokens` are prompt tokens that it did not have to compute."""

    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    seed: int | None = None
    cached_tokens: int = 0
    timings: dict[str, float] = field(default_factory=dict)


@dataclass
class Details(StreamDetails):
    """Facts about a finished answer, with its tokens."""

    prefill: list[InputToken] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    best_of_sequences: list[BestOfSequence] | None = None
    skipped_tokens: int = 0


@dataclass
class Response:
    """A whole answer; `details` is None if they were not asked for."""

    generated_text: str
    details: Details | None = None


@dataclass
class StreamResponse:
    """One token of a stream; `generated_text` and `details` come with the last one."""

    token: Token
    generated_text: str | None = None
    details: StreamDetails | None = None


@dataclass
class DeployedModel:
    """A model some server has; `sha` is its revision."""

    model_id: str
    sha: str


@dataclass
class EmbedResponse:
    """The embedding of one text."""

    embeddings: list[float] | None


@dataclass
class ClassifyResponse:
    """The entities found in one text: each has `entity_group`, `score`, `word`, `start` and `end`."""

    entities: list[dict[str, Any]] | None
