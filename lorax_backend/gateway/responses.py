"""The bodies of answers, for the OpenAPI description. Answers themselves are passed through, not built from these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorResponse(BaseModel):
    """What every failure says."""

    error: str
    error_type: str


class AlternativeToken(BaseModel):
    """One of the likeliest tokens at a position."""

    id: int
    text: str
    logprob: float | None


class Token(BaseModel):
    """A generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool
    skipped: bool
    alternative_tokens: list[AlternativeToken] | None = None


class PrefillToken(BaseModel):
    """A token of the prompt."""

    id: int
    text: str
    logprob: float | None


class BestOfSequence(BaseModel):
    """A sequence drawn for `best_of` that was not picked."""

    generated_text: str
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]


class StreamDetails(BaseModel):
    """Facts about a finished stream."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class Details(StreamDetails):
    """Facts about a finished answer."""

    skipped_tokens: int
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateResponse(BaseModel):
    """A whole answer."""

    generated_text: str
    details: Details | None = None


class StreamResponse(BaseModel):
    """One event of a stream; the last has the text and, if asked for, the details."""

    token: Token
    generated_text: str | None
    details: StreamDetails | None


class TokenPlace(BaseModel):
    """A token of a text, and the characters it stands for."""

    id: int
    text: str
    start: int
    stop: int


class AdapterList(BaseModel):
    """The adapters that the servers know, and the names that stand for some of them."""

    adapters: list[dict[str, Any]]
    aliases: dict[str, Any]
