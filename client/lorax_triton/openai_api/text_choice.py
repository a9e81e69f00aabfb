"""One choice of a text answer, as it grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorax_triton.openai_api.backend import Piece
from lorax_triton.openai_api.generation import finish_reason
from lorax_triton.openai_api.logprobs import ServerToken, ShownTokens, completion_logprobs


@dataclass(slots=True)
class Echo:
    """What `echo` puts before a choice: the prompt's text, and its tokens if log probabilities are wanted."""

    text: str = ""
    tokens: list[ServerToken] = field(default_factory=list)
    details: Mapping[str, Any] = field(default_factory=dict)


class TextChoice:
    """One choice of a text answer, as it grows."""

    def __init__(self, index: int, echo: Echo, logprobs: int | None) -> None:
        self._index = index
        self._echo = echo
        self._top = logprobs
        self._shown = ShownTokens()
        self._offset = sum(len(token.get("text") or "") for token in echo.tokens)
        self.tokens: list[ServerToken] = []
        self.details: Mapping[str, Any] = {}

    def echo_chunk(self, last: bool) -> dict[str, Any]:
        """The chunk that holds the prompt; the only one if `last`."""
        if last:
            self.details = {**self._echo.details, "generated_tokens": 0}
        return self._chunk(self._echo.text, self._echo.tokens, 0, "length" if last else None)

    def feed(self, piece: Piece) -> dict[str, Any] | None:
        """The chunk for a piece; None if there is nothing to tell yet."""
        tokens = self._shown.add(piece.tokens, piece.text)
        if piece.details is not None:
            self.details = piece.details
            tokens += self._shown.rest()
        elif not piece.text and not tokens:
            return None
        self.tokens += tokens
        offset = self._offset
        self._offset += sum(len(token.get("text") or "") for token in tokens)
        finish = None if piece.details is None else finish_reason(piece.details)
        return self._chunk(piece.text, tokens, offset, finish)

    def _chunk(self, text: str, tokens: list[ServerToken], offset: int, finish: str | None) -> dict[str, Any]:
        logprobs = None if self._top is None else completion_logprobs(tokens, self._top, offset)
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish}
