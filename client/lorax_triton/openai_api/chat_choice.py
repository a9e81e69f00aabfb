"""One choice of a chat answer, as it grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorax_triton.openai_api.backend import Piece
from lorax_triton.openai_api.generation import finish_reason
from lorax_triton.openai_api.logprobs import ServerToken, ShownTokens, chat_logprobs
from lorax_triton.openai_api.tool_parser import (
    MARK_TOKENS,
    Arguments,
    CallStart,
    Content,
    Delta,
    ToolCallParser,
)
from lorax_triton.openai_api.tools import Tools, new_call_id


class ChatChoice:
    """Collects a sequence's pieces, and tells of each as stream chunks do.

    Args:
        logprobs: alternatives beside each token, or None for no log probabilities.
    """

    def __init__(self, index: int, tools: Tools, logprobs: int | None) -> None:
        self._index = index
        self._parser = ToolCallParser(tools.names) if tools.callable else None
        self._max_calls = None if tools.parallel else 1
        self._top = logprobs
        self._shown = ShownTokens()
        self._tokens: list[ServerToken] = []
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self.details: Mapping[str, Any] = {}

    def first_chunk(self) -> dict[str, Any]:
        """The chunk that opens the choice."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def feed(self, piece: Piece) -> list[dict[str, Any]]:
        """Take in a piece; its chunks, without empty ones. The last piece's end with the finish reason."""
        last = piece.details is not None
        tokens = self._shown.add(piece.tokens, piece.text)
        deltas: list[Delta] = []
        if self._parser is not None:
            deltas += self._parser.feed(_text_with_marks(piece))
            if last:
                deltas += self._parser.finish()
        elif piece.text:
            deltas.append(Content(piece.text))
        if last:
            tokens += self._shown.rest()
        chunks = self._tell(deltas, tokens)
        if piece.details is not None:
            self.details = piece.details
            chunks.append(self._chunk({}, finish=self._finish_reason()))
        return chunks

    def whole(self) -> dict[str, Any]:
        """The finished choice of an answer that is not streamed."""
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._calls and not content else content,
            "refusal": None,
        }
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = None if self._top is None else chat_logprobs(self._tokens, self._top)
        return {
            "index": self._index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason(),
        }

    def _tell(self, deltas: Sequence[Delta], tokens: list[ServerToken]) -> list[dict[str, Any]]:
        """Chunks for what is new; the tokens' log probabilities go with the first of them."""
        self._tokens += tokens
        chunks = []
        for delta in _joined(deltas):
            shown = self._shown_delta(delta)
            if shown is not None:
                chunks.append(self._chunk(shown, tokens))
                tokens = []
        if tokens and self._top is not None:
            chunks.append(self._chunk({"content": ""}, tokens))
        return chunks

    def _shown_delta(self, delta: Delta) -> dict[str, Any] | None:
        if isinstance(delta, Content):
            self._content.append(delta.text)
            return {"content": delta.text}
        if self._max_calls is not None and delta.index >= self._max_calls:
            return None
        if isinstance(delta, CallStart):
            function = {"name": delta.name, "arguments": ""}
            call = {"id": new_call_id(), "type": "function", "function": function}
            self._calls.append(call | {"function": dict(function)})
            return {"tool_calls": [{"index": delta.index, **call}]}
        self._calls[delta.index]["function"]["arguments"] += delta.text
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}

    def _finish_reason(self) -> str:
        reason = finish_reason(self.details)
        return "tool_calls" if self._calls and reason == "stop" else reason

    def _chunk(
        self, delta: dict[str, Any], tokens: Sequence[ServerToken] = (), finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = None if self._top is None or not tokens else chat_logprobs(tokens, self._top)
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _text_with_marks(piece: Piece) -> str:
    """The piece's text, with the marks of tool calls that the tokenizer holds as special tokens."""
    if not any(token.get("special") and token.get("text") in MARK_TOKENS for token in piece.tokens):
        return piece.text
    return "".join(
        str(token.get("text") or "")
        for token in piece.tokens
        if not token.get("special") or token.get("text") in MARK_TOKENS
    )


def _joined(deltas: Sequence[Delta]) -> list[Delta]:
    """The deltas with neighbours of a kind made one."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if isinstance(delta, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + delta.text)
        elif isinstance(delta, Arguments) and isinstance(last, Arguments) and delta.index == last.index:
            joined[-1] = Arguments(delta.index, last.text + delta.text)
        else:
            joined.append(delta)
    return joined
