"""Finds tool calls in the text a model writes, whichever of the usual formats it was trained on.

| models | format |
|---|---|
| Qwen, Hermes | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one block a call |
| Mistral, older | `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` |
| Mistral, newer | `[TOOL_CALLS]name[ARGS]{...}`, with or without `[ARGS]`, one mark a call |
| Llama 3 | the object alone, or after `<|python_tag|>`, with `parameters`; several with `;` between |
| Llama 3.2, 4 | Python, `[get_weather(city="Paris"), ...]`, alone or after `<|python_tag|>` or `<|python_start|>` |

A mark tells the format; only a bare object and Python have to name a known tool to count. What turns out to be no call
is text.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from lorax_triton.openai_api.call_scanner import CallScanner
from lorax_triton.openai_api.python_calls import ArgumentScanner, match_head, may_become_head

HERMES, MISTRAL, PYTHON_TAG, PYTHON_START = (
    "<tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "<|python_start|>",
)
_HERMES_END, _PYTHON_END = "</tool_call>", "<|python_end|>"
_MARKS = (HERMES, MISTRAL, PYTHON_TAG, PYTHON_START)
# Marks that some tokenizers hold as special tokens, whose texts are no part of an answer's text.
MARK_TOKENS = frozenset({*_MARKS, _HERMES_END, _PYTHON_END, "[ARGS]", "[CALL_ID]"})
_BARE, _PYTHON = "", "python"
_MISTRAL_NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*(?=\{)")
_MISTRAL_NAME_BEGUN = re.compile(r"\s*[\w.-]*(?:\[[A-Z_]*(?:\][\w-]*)?)*\s*")
_LONGEST_NAME = 256


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of `name` begins; `index` counts calls."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A part of the JSON text of a call's arguments."""

    index: int
    text: str


Delta = Content | CallStart | Arguments


class ToolCallParser:
    """Turns text, fed in pieces of any size, into content and tool calls.

    Args:
        names: the tools that a bare object, or Python, may call.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._rest = ""
        self._deltas: list[Delta] = []
        self._state = self._at_start
        self._format = _BARE
        self._listed = False
        self._scanner = CallScanner()
        self._python = ArgumentScanner()
        self._python_name = ""
        self._raw = ""  # what has been read of a call that may still turn out to be none
        self._started = False
        self.calls = 0

    def feed(self, text: str) -> list[Delta]:
        """What the next piece of text brings."""
        self._rest += text
        while self._state():
            pass
        return self._take()

    def finish(self) -> list[Delta]:
        """What is left at the end of the text."""
        if not self._started:
            self._show(self._raw + self._rest)
        elif self._state == self._between_calls and not self._end_mark.startswith(self._rest):
            self._show(self._rest)
        self._rest = self._raw = ""
        return self._take()

    # Each state reads from `_rest`; it returns True if the next state can go on with what is left.

    def _at_start(self) -> bool:
        text = self._rest.lstrip()
        if not text:
            return False
        if text.startswith("{"):
            return self._begin(_BARE, len(self._rest) - len(text), listed=False)
        if text != MISTRAL and MISTRAL.startswith(text):
            return False
        if text.startswith("[") and not text.startswith(MISTRAL):
            inner = text[1:].lstrip()
            if not inner:
                return False
            if inner.startswith("{"):
                return self._begin(_BARE, len(self._rest) - len(inner), listed=True)
            begun = self._begin_python(inner, listed=True)
            if begun is not None:
                return begun
        self._state = self._in_text
        return True

    def _begin_python(self, text: str, listed: bool) -> bool | None:
        """Begin a call where `text`, the end of what is left, begins with one, or wait for more; None if neither."""
        head = match_head(text, self._names)
        if head is None:
            return False if may_become_head(text, self._names) else None
        self._python_name, length = head
        self._python = ArgumentScanner()
        self._begin(_PYTHON, len(self._rest) - len(text) + length, listed)
        self._state = self._in_python_call
        return True

    def _in_python_call(self) -> bool:
        used = self._python.feed(self._rest)
        self._raw += self._rest[:used]
        self._rest = self._rest[used:]
        if not self._python.done:
            return False
        arguments = self._python.arguments()
        if arguments is None:
            return self._no_call()
        self._started = True
        self._raw = ""
        self._deltas += [CallStart(self.calls, self._python_name), Arguments(self.calls, arguments)]
        self.calls += 1
        self._state = self._between_calls
        return True

    @property
    def _end_mark(self) -> str:
        return _PYTHON_END if self._format == _PYTHON else _HERMES_END

    def _in_text(self) -> bool:
        found = min(
            ((self._rest.find(mark), mark) for mark in _MARKS if mark in self._rest),
            default=None,
        )
        if found is None:
            keep = _held_back(self._rest)
            self._show(self._rest[: len(self._rest) - keep])
            self._rest = self._rest[len(self._rest) - keep :]
            return False
        position, mark = found
        self._show(self._rest[:position].rstrip())
        self._rest = self._rest[position:]
        self._format = mark
        self._raw = mark
        self._started = False
        self._rest = self._rest[len(mark) :]
        self._state = self._after_mark
        return True

    def _after_mark(self) -> bool:
        text = self._rest.lstrip()
        if not text:
            return False
        blanks = len(self._rest) - len(text)
        if text.startswith("{"):
            return self._begin(self._format, blanks, listed=False)
        if self._format == MISTRAL:
            if text.startswith("["):
                inner = text[1:].lstrip()
                if not inner:
                    return False
                return self._begin(self._format, len(self._rest) - len(inner), listed=True)
            named = _MISTRAL_NAME.match(self._rest)
            if named:
                return self._begin(self._format, named.end(), listed=False, name=named[1])
            if len(self._rest) <= _LONGEST_NAME and _MISTRAL_NAME_BEGUN.fullmatch(self._rest):
                return False
        if self._format in (PYTHON_TAG, PYTHON_START):
            listed = text.startswith("[")
            inner = text[1:].lstrip() if listed else text
            begun = self._begin_python(inner, listed)
            if begun is not None:
                return begun
        return self._no_call()

    def _begin(self, kind: str, skip: int, listed: bool, name: str | None = None) -> bool:
        self._format = kind
        self._listed = listed
        self._raw += self._rest[:skip]
        self._rest = self._rest[skip:]
        self._scanner = CallScanner() if name is None else CallScanner.after_name(name)
        self._started = False
        self._state = self._in_named_call if name is not None else self._in_call
        return True

    def _in_named_call(self) -> bool:
        for position, character in enumerate(self._rest):
            self._scanner.feed(character)
            if self._scanner.arguments_done or self._scanner.failed:
                self._emit_call()
                self._rest = self._rest[position + 1 :]
                return self._end_call()
        self._rest = ""
        self._emit_call()
        return False

    def _in_call(self) -> bool:
        scanner = self._scanner
        used = scanner.feed(self._rest)
        if not self._started:
            self._raw += self._rest[:used]
        self._rest = self._rest[used:]
        known = scanner.name is not None and (self._format != _BARE or scanner.name in self._names)
        if scanner.name is not None and not known:
            return self._no_call()
        if known and not scanner.failed:
            self._emit_call()
        if scanner.failed or (scanner.done and not self._started):
            return self._end_call() if self._started else self._no_call()
        return self._end_call() if scanner.done else False

    def _emit_call(self) -> None:
        if not self._started:
            self._started = True
            self._raw = ""
            self._deltas.append(CallStart(self.calls, self._scanner.name or ""))
            self.calls += 1
        fresh = self._scanner.take_arguments()
        if fresh:
            self._deltas.append(Arguments(self.calls - 1, fresh))

    def _end_call(self) -> bool:
        if not self._scanner.arguments_done and not self._scanner.failed:
            self._deltas.append(Arguments(self.calls - 1, "{}"))
        self._state = self._between_calls
        return True

    def _between_calls(self) -> bool:
        self._rest = self._rest.lstrip(" \t\r\n,;" if self._format != HERMES else " \t\r\n")
        text = self._rest
        if not text:
            return False
        if self._listed and text.startswith("]"):
            self._rest = text[1:]
            self._listed = False
            return True
        if self._format in (HERMES, _PYTHON):
            if text.startswith(self._end_mark):
                self._rest = text[len(self._end_mark) :]
                return True
            if self._end_mark.startswith(text):
                return False
            begun = self._begin_python(text, self._listed) if self._format == _PYTHON else None
            if begun is not None:
                return begun
        elif text.startswith("{"):
            return self._begin(self._format, 0, self._listed)
        if any(mark.startswith(text) and mark != text for mark in _MARKS):
            return False
        self._raw = ""
        self._started = False
        self._state = self._in_text
        return True

    def _no_call(self) -> bool:
        """What has been read is text after all, and so is what follows, up to the next mark."""
        self._show(self._raw)
        self._raw = ""
        self._started = False
        self._state = self._in_text
        return True

    def _show(self, text: str) -> None:
        if text:
            self._deltas.append(Content(text))

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas


def _held_back(text: str) -> int:
    """Characters at the end that may be the beginning of a mark, or blanks before one."""
    longest = max(map(len, _MARKS)) - 1
    kept = 0
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in _MARKS):
            kept = size
            break
    return len(text) - len(text[: len(text) - kept].rstrip())
