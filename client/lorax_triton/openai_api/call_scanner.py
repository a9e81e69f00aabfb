"""A JSON object that is one tool call, read while it is being written.

    {"name": "get_weather", "arguments": {"city": "Paris"}}

`parameters` is another word for `arguments`. The arguments are handed out as they come, in the model's own spelling.
"""

from __future__ import annotations

import json

_NAME_KEYS = ("name",)
_ARGUMENT_KEYS = ("arguments", "parameters")
_BLANKS = " \t\r\n"


class CallScanner:
    """Reads one object character by character.

    Attributes:
        name: the function's, once it is known.
        done: True after the object's closing brace.
        failed: True if it is no JSON object; the text so far is then no call.
        arguments_done: True once the arguments are complete.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = False
        self.failed = False
        self.arguments_done = False
        self._phase = "open"
        self._key = ""
        self._value: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._fresh: list[str] = []

    @classmethod
    def after_name(cls, name: str) -> CallScanner:
        """A scanner for arguments whose function's name came before them."""
        scanner = cls()
        scanner.feed('{"arguments":')
        scanner.name = name
        return scanner

    def feed(self, text: str) -> int:
        """Read on; the number of characters used, which is less than all once `done` or `failed`, or once the
        arguments that `after_name` waits for are complete."""
        for position, character in enumerate(text):
            getattr(self, f"_in_{self._phase}")(character)
            if self.done or self.failed:
                return position + (not self.failed)
        return len(text)

    def take_arguments(self) -> str:
        """The part of the arguments that came since the last call."""
        text = "".join(self._fresh)
        self._fresh.clear()
        return text

    def _in_open(self, character: str) -> None:
        if character == "{":
            self._phase = "key"
        elif character not in _BLANKS:
            self.failed = True

    def _in_key(self, character: str) -> None:
        if character == '"':
            self._start_value("name_of_key")
            self._value.append(character)
        elif character == "}":
            self.done = True
        elif character not in _BLANKS + ",":
            self.failed = True

    def _in_name_of_key(self, character: str) -> None:
        self._value.append(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._key = str(self._parsed())
            self._phase = "colon"

    def _in_colon(self, character: str) -> None:
        if character == ":":
            self._start_value("value")
        elif character not in _BLANKS:
            self.failed = True

    def _in_value(self, character: str) -> None:
        if not self._in_string and self._depth == 0:
            if character in _BLANKS:
                return
            if character in ",}":
                self._end_value()
                self._phase = "key"
                self.done = character == "}" and not self.failed
                return
        self._value.append(character)
        if self._streams_arguments():
            self._fresh.append(character)
        self._track(character)
        closed = self._depth == 0 and not self._in_string and self._value[0] in "{["
        if closed and self._key in _ARGUMENT_KEYS:
            self.arguments_done = True

    def _track(self, character: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1

    def _streams_arguments(self) -> bool:
        # Arguments written as a string of JSON are handed out when it can be decoded, at its end.
        return self._key in _ARGUMENT_KEYS and self._value[0] != '"'

    def _start_value(self, phase: str) -> None:
        self._phase = phase
        self._value = []
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def _end_value(self) -> None:
        if self._key in _NAME_KEYS:
            value = self._parsed()
            if isinstance(value, str) and value:
                self.name = value
            else:
                self.failed = True
        elif self._key in _ARGUMENT_KEYS:
            value = self._parsed()
            if isinstance(value, str):
                self._fresh.append(value)
            self.arguments_done = True

    def _parsed(self) -> object:
        try:
            return json.loads("".join(self._value))
        except (ValueError, RecursionError):
            self.failed = True
            return None
