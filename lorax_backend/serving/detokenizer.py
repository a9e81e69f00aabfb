"""Text of a sequence that grows token by token. Standard library only.

One token's text cannot be taken alone: a character may span tokens, and sentencepiece vocabularies write a word's
leading space into its token but drop it at the start of a text. So a short window of ids is decoded again each time,
beginning with ids whose text has already been given out, and what is new at its end is returned once it is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
_CONTEXT = 6
_MAX_CONTEXT = 24
_MAX_PENDING = 64


class IncrementalDetokenizer:
    """Decodes the continuation of a prompt. Never returns part of a character; pieces joined are the whole text.

    Args:
        decode: ids to text without special tokens, with U+FFFD for bytes that are not UTF-8.
        prompt_ids: the prompt; its last ids give the first new token its context.
    """

    __slots__ = ("_decode", "_emitted", "_fresh", "_window")

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window, text = _context(decode, prompt_ids)
        self._emitted = len(text)  # characters of the window's text already returned
        self._fresh = 0  # ids at the window's end that came since text was last returned

    def append(self, ids: Sequence[int]) -> str:
        """Take in new ids; the text that is certain now, which may be empty."""
        self._window.extend(ids)
        self._fresh += len(ids)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and self._fresh <= _MAX_PENDING:
            return ""
        # After that many ids an open character is no longer the reason: the bytes are not UTF-8. Only the last
        # replacement character can still turn into something else.
        end = len(text) - text.endswith(REPLACEMENT)
        piece = text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        self._trim(text)
        return piece

    def peek(self, token_id: int) -> str:
        """The text that one more id would add, were it the next; takes nothing in."""
        text = self._decode([*self._window, token_id])
        return text[self._emitted : len(text) - text.endswith(REPLACEMENT)]

    def flush(self) -> str:
        """The rest, at the end of the sequence: an unfinished character becomes U+FFFD."""
        text = self._decode(self._window)
        piece = text[self._emitted :]
        self._emitted = len(text)
        self._fresh = 0
        return piece

    def _trim(self, text: str) -> None:
        """Forget ids that are no longer needed to decode what follows."""
        keep = min(max(self._fresh, _CONTEXT), len(self._window))
        self._fresh = 0
        if keep == len(self._window):
            return
        window = self._window[-keep:]
        kept = self._decode(window)
        # Ids that decode to nothing or to blanks are no context: the next token would lose its leading space.
        useful = kept.strip() and not kept.startswith(REPLACEMENT)
        if useful or len(self._window) > 4 * _MAX_PENDING:
            self._emitted = max(0, len(kept) - (len(text) - self._emitted))
            self._window = window


def _context(decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]) -> tuple[list[int], str]:
    """The prompt's last ids and their text, long enough not to begin inside a character."""
    size = min(_CONTEXT, len(prompt_ids))
    window = list(prompt_ids[len(prompt_ids) - size :])
    text = decode(window) if window else ""
    while text.startswith(REPLACEMENT) and size < min(_MAX_CONTEXT, len(prompt_ids)):
        size += 1
        window = list(prompt_ids[-size:])
        text = decode(window)
    return window, text
