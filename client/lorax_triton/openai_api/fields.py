"""Reading the fields of a JSON body, with OpenAI's errors for those that cannot be used.

Fields nobody reads are ignored, as OpenAI's clients send new ones all the time; a field that is read must have the
right type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_triton.openai_api.errors import ApiError

_NOUNS = {
    bool: "a boolean",
    int: "an integer",
    float: "a decimal",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        ApiError: it is none.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"We could not parse the JSON body of your request: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(f"The body of your request must be a JSON object, not {noun(value)}.")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def noun(value: Any) -> str:
    """What a JSON value is, in words."""
    return _NOUNS.get(type(value), type(value).__name__)


def wrong_type(param: str, wanted: str, value: Any) -> ApiError:
    """The error for a value of the wrong type."""
    message = f"Invalid type for '{param}': expected {wanted}, but got {noun(value)} instead."
    return ApiError(message, param, "invalid_type")


def missing(param: str) -> ApiError:
    """The error for a field that must be there."""
    return ApiError(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")


class Fields:
    """The fields of a JSON object. Null counts as not given. `where` goes before names in errors."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values = values
        self._where = where

    def param(self, name: str) -> str:
        """The field's name as errors show it."""
        return self._where + name

    def has(self, name: str) -> bool:
        """True if the field is given."""
        return self.values.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise wrong_type(self.param(name), "a string", value)
        return value

    def required_text(self, name: str) -> str:
        value = self.text(name)
        if value is None:
            raise missing(self.param(name))
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_type(self.param(name), "a boolean", value)
        return value

    def integer(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(self.param(name), "an integer", value)
        self._check_range(name, value, low, high, "integer")
        return value

    def number(self, name: str, low: float | None = None, high: float | None = None) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise wrong_type(self.param(name), "a decimal", value)
        self._check_range(name, value, low, high, "decimal")
        return value

    def items(self, name: str) -> list[Any] | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise wrong_type(self.param(name), "an array", value)
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise wrong_type(self.param(name), "an object", value)
        return value

    def texts(self, name: str) -> list[str]:
        """A string or a list of strings, as a list."""
        value = self.values.get(name)
        if value is None:
            return []
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list):
            raise wrong_type(self.param(name), "a string or an array of strings", value)
        for index, item in enumerate(values):
            if not isinstance(item, str):
                raise wrong_type(f"{self.param(name)}[{index}]", "a string", item)
        return values

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """Raise if one of the fields asks for something."""
        for name in names:
            if self.values.get(name) not in (None, False, [], {}, ""):
                raise ApiError(
                    f"Unsupported parameter: '{self.param(name)}' {reason}.",
                    self.param(name),
                    "unsupported_parameter",
                )

    def _check_range(self, name: str, value: float, low: float | None, high: float | None, kind: str) -> None:
        param = self.param(name)
        if low is not None and value < low:
            message = (
                f"Invalid '{param}': {kind} below minimum value. Expected a value >= {low}, but got {value}."
            )
            raise ApiError(message, param, f"{kind}_below_min_value")
        if high is not None and value > high:
            message = (
                f"Invalid '{param}': {kind} above maximum value. Expected a value <= {high}, but got {value}."
            )
            raise ApiError(message, param, f"{kind}_above_max_value")
