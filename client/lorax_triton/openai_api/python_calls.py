"""Tool calls written as Python: `get_weather(city="Paris", days=[1, 2])`. Only literals; nothing is ever evaluated.

Python has no arguments that could be handed out half written, so a call is told when it is complete.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection

_CALL_HEAD = re.compile(r"([\w.-]+)\s*\(")
_NAME_BEGUN = re.compile(r"[\w.-]*\s*")
_METHOD = ".call"  # Llama 3.1 calls its own tools so
# JSON's words, which models mix in.
_JSON_WORDS = {"true": True, "false": False, "null": None}
_KNOWN_ESCAPES = frozenset("\\'\"abfnrtvxuUN0")
_LONGEST = 1 << 20


def match_head(text: str, names: Collection[str]) -> tuple[str, int] | None:
    """The known tool whose call `text` begins with, and the number of characters up to and with its parenthesis."""
    head = _CALL_HEAD.match(text)
    if head is None:
        return None
    name = head[1] if head[1] in names else head[1].removesuffix(_METHOD)
    return (name, head.end()) if name in names else None


def may_become_head(text: str, names: Collection[str]) -> bool:
    """True if more text may make it the beginning of a known tool's call."""
    if _NAME_BEGUN.fullmatch(text) is None:
        return False
    begun = text.rstrip()
    return any(f"{name}{_METHOD}".startswith(begun) for name in names)


class ArgumentScanner:
    """Reads what stands between the parentheses, character by character.

    Attributes:
        done: True after the closing parenthesis.
    """

    def __init__(self) -> None:
        self.done = False
        self._source: list[str] = []
        self._depth = 0
        self._quote = ""
        self._escaped = False

    def feed(self, text: str) -> int:
        """Read on; the number of characters used, which is less than all once `done`."""
        for position, character in enumerate(text):
            self._read(character)
            if self.done:
                return position + 1
        return len(text)

    def arguments(self) -> str | None:
        """The arguments as the text of a JSON object; None if they are no keywords with literals."""
        source = "".join(self._source)
        if len(source) > _LONGEST:
            return None
        try:
            call = ast.parse(f"f({source})", mode="eval").body
            if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
                return None
            values: dict[str, object] = {}
            for keyword in call.keywords:
                if keyword.arg is None or keyword.arg in values:
                    return None
                values[keyword.arg] = _literal(keyword.value)
            return json.dumps(values, ensure_ascii=False, allow_nan=False)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    def _read(self, character: str) -> None:
        if self._quote:
            self._read_in_string(character)
            return
        if character in "'\"":
            self._quote = character
        elif character in "([{":
            self._depth += 1
        elif character in ")]}":
            if self._depth == 0:
                self.done = True
                return
            self._depth -= 1
        self._source.append(character)

    def _read_in_string(self, character: str) -> None:
        # Models write line ends into strings as they are, and backslashes that escape nothing; Python minds both.
        if self._escaped:
            self._escaped = False
            if character not in _KNOWN_ESCAPES:
                self._source.append("\\")
        elif character == "\\":
            self._escaped = True
        elif character == self._quote:
            self._quote = ""
        self._source.append({"\n": "\\n", "\r": "\\r"}.get(character, character))


def _literal(node: ast.expr) -> object:
    """The value of a literal.

    Raises:
        ValueError: it is something else, or JSON has no such value.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in _JSON_WORDS:
        return _JSON_WORDS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _literal(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return _object(node)
    raise ValueError("not a literal that JSON can hold")


def _object(node: ast.Dict) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
            raise ValueError("a key that is no text")
        result[key.value] = _literal(value)
    return result
