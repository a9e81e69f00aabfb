"""Log probabilities in OpenAI's two forms, out of the server's tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ServerToken = Mapping[str, Any]


class ShownTokens:
    """Hands out tokens together with the text that shows them.

    The server may hold text back that could become a stop string; a token belongs to the text in which it ends. Tokens
    that are no part of the text, such as the end token and those of a stop string that was cut off, are left out.
    """

    def __init__(self) -> None:
        self._waiting: deque[ServerToken] = deque()
        self._taken = 0  # characters of the tokens handed out
        self._shown = 0  # characters of the text shown

    def add(self, tokens: Iterable[ServerToken], text: str) -> list[ServerToken]:
        """Take in what came; the tokens whose text is now complete."""
        self._waiting.extend(token for token in tokens if not token.get("special"))
        self._shown += len(text)
        taken = []
        while self._waiting and self._taken + len(self._waiting[0].get("text") or "") <= self._shown:
            taken.append(self._take())
        return taken

    def rest(self) -> list[ServerToken]:
        """After the end of the text: the tokens that a part of it shows."""
        taken = []
        while self._waiting and self._taken < self._shown:
            taken.append(self._take())
        return taken

    def _take(self) -> ServerToken:
        token = self._waiting.popleft()
        self._taken += len(token.get("text") or "")
        return token


def chat_logprobs(tokens: Sequence[ServerToken], top: int) -> dict[str, Any]:
    """The `logprobs` of a chat choice; `top` alternatives beside each token."""
    return {
        "content": [
            _chat_token(token)
            | {"top_logprobs": [_chat_token(other) for other in _alternatives(token)[:top]]}
            for token in tokens
        ],
        "refusal": None,
    }


def _chat_token(token: ServerToken) -> dict[str, Any]:
    text = str(token.get("text") or "")
    logprob = token.get("logprob")
    return {
        "token": text,
        # OpenAI's word for "not among the likeliest".
        "logprob": -9999.0 if logprob is None else logprob,
        "bytes": list(text.encode("utf-8", errors="replace")),
    }


def completion_logprobs(tokens: Sequence[ServerToken], top: int, offset: int) -> dict[str, Any]:
    """The `logprobs` of a text choice.

    Args:
        tokens: the server's, in the order of the text.
        top: alternatives beside each token; the token itself is listed with them.
        offset: characters of the choice's text before the first of the tokens.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.get("text") or "")
    return {
        "tokens": [str(token.get("text") or "") for token in tokens],
        "token_logprobs": [token.get("logprob") for token in tokens],
        "top_logprobs": [_top(token, top) for token in tokens] if top else None,
        "text_offset": offsets,
    }


def _top(token: ServerToken, top: int) -> dict[str, float] | None:
    if token.get("logprob") is None:  # a prompt's first token has no probability
        return None
    best = {str(other.get("text") or ""): other["logprob"] for other in _alternatives(token)[:top]}
    best.setdefault(str(token.get("text") or ""), token["logprob"])
    return best


def _alternatives(token: ServerToken) -> Sequence[ServerToken]:
    return token.get("alternative_tokens") or ()
