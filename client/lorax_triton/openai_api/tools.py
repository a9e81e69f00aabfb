"""Tools: what a request says about them, how the model is told, and how it is made to call one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorax_triton.openai_api.errors import ApiError
from lorax_triton.openai_api.fields import Fields, missing, wrong_type

TOOL_PROMPT = (
    "The functions above may be called to answer. To call one, answer with nothing but a block like this, one block "
    "for each call:\n"
    '<tool_call>\n{"name": <name of the function>, "arguments": <object of its arguments>}\n</tool_call>\n'
    "If no function helps, answer in plain words."
)


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request.

    `choice` is "none", "auto", "required" or "named"; `names` are those that may be called, one with "named".
    """

    definitions: list[dict[str, Any]] = field(default_factory=list)
    choice: str = "none"
    names: tuple[str, ...] = ()
    parallel: bool = True
    prompt: str = TOOL_PROMPT

    @property
    def callable(self) -> bool:
        """True if the answer may hold calls."""
        return bool(self.definitions) and self.choice != "none"

    @property
    def forced(self) -> bool:
        """True if the answer must be a call."""
        return self.choice in ("required", "named")

    def schema(self) -> dict[str, Any]:
        """The JSON Schema that holds a forced answer to calls: one object, or a list of them where several calls
        are allowed."""
        calls = [self._call_schema(tool["function"]) for tool in self.definitions]
        calls = [schema for schema in calls if schema["properties"]["name"]["const"] in self.names]
        one = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if self.choice == "named" or not self.parallel:
            return one
        return {"type": "array", "minItems": 1, "items": one}

    @staticmethod
    def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        return {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }


def read_tools(fields: Fields) -> Tools:
    """The tools of a chat request.

    Raises:
        ApiError: naming the field at fault.
    """
    fields.refuse(
        ("functions", "function_call"), "is deprecated and not supported; use 'tools' and 'tool_choice'"
    )
    definitions = [_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(fields.items("tools") or [])]
    names = tuple(tool["function"]["name"] for tool in definitions)
    if not definitions:
        if fields.values.get("tool_choice") not in (None, "none", "auto"):
            raise ApiError(
                "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified.",
                "tool_choice",
            )
        return Tools()
    value = fields.values.get("tool_choice")
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        choice, names = _read_allowed(value, names)
        definitions = [tool for tool in definitions if tool["function"]["name"] in names]
    else:
        choice, names = _read_choice(value, names)
    prompt = fields.text("tool_prompt")
    return Tools(
        definitions,
        choice,
        names,
        fields.flag("parallel_tool_calls", True),
        TOOL_PROMPT if prompt is None else prompt,
    )


def _read_tool(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(param, "an object", value)
    tool = Fields(value, f"{param}.")
    kind = tool.text("type", "function")
    if kind != "function":
        raise ApiError(
            f"Invalid value: '{kind}'. Supported values are: 'function'.", f"{param}.type", "invalid_value"
        )
    function = tool.object("function")
    if function is None:
        raise missing(f"{param}.function")
    parts = Fields(function, f"{param}.function.")
    name = parts.required_text("name")
    if not name:
        raise ApiError(
            f"Invalid '{param}.function.name': empty string.", f"{param}.function.name", "empty_string"
        )
    parts.text("description")
    parts.object("parameters")
    return {"type": "function", "function": function}


def _read_choice(value: Any, names: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """OpenAI's forms of `tool_choice`, and LoRAX's, where a text may be a tool's name."""
    if value is None:
        return "auto", names
    name = value
    if isinstance(value, dict):
        choice = Fields(value, "tool_choice.")
        kind = choice.text("type", "function")
        if kind != "function":
            raise ApiError(
                f"Invalid value: '{kind}'. Supported values are: 'function' and 'allowed_tools'.",
                "tool_choice.type",
                "invalid_value",
            )
        function = choice.object("function")
        name = Fields(function or {}, "tool_choice.function.").required_text("name")
    elif not isinstance(value, str):
        raise wrong_type("tool_choice", "a string or an object", value)
    elif value in ("none", "auto", "required"):
        return value, names
    if name not in names:
        raise ApiError(
            f"Invalid value for 'tool_choice': '{name}' is not one of 'tools'.",
            "tool_choice",
            "invalid_value",
        )
    return "named", (name,)


def _read_allowed(value: dict[str, Any], names: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The mode and the names of `allowed_tools`. The model is told of these tools alone."""
    param = "tool_choice.allowed_tools"
    allowed = Fields(value, "tool_choice.").object("allowed_tools")
    if allowed is None:
        raise missing(param)
    parts = Fields(allowed, f"{param}.")
    mode = parts.required_text("mode")
    if mode not in ("auto", "required"):
        raise ApiError(
            f"Invalid value: '{mode}'. Supported values are: 'auto' and 'required'.",
            f"{param}.mode",
            "invalid_value",
        )
    chosen = [_allowed_name(tool, f"{param}.tools[{i}]") for i, tool in enumerate(parts.items("tools") or [])]
    if not chosen:
        raise ApiError(
            f"Invalid '{param}.tools': name at least one of 'tools'.", f"{param}.tools", "invalid_value"
        )
    for i, name in enumerate(chosen):
        if name not in names:
            raise ApiError(
                f"Invalid value for '{param}.tools[{i}]': '{name}' is not one of 'tools'.",
                f"{param}.tools[{i}]",
                "invalid_value",
            )
    return mode, tuple(name for name in names if name in chosen)


def _allowed_name(value: Any, param: str) -> str:
    """The name in `{"type": "function", "function": {"name": ...}}`, or without the inner object, as in OpenAI's
    other API."""
    if not isinstance(value, dict):
        raise wrong_type(param, "an object", value)
    function = Fields(value, f"{param}.").object("function")
    if function is None:
        return Fields(value, f"{param}.").required_text("name")
    return Fields(function, f"{param}.function.").required_text("name")


def new_call_id() -> str:
    """A tool call's id, unique over all answers."""
    return f"call_{uuid.uuid4().hex[:24]}"


def tools_as_text(tools: Tools) -> str:
    """The tools and how to call them, for a model whose chat template knows nothing of tools."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools.definitions]
    prompt = f"\n{tools.prompt}" if tools.prompt and tools.choice != "none" else ""
    return "\n\n<tools>\n" + "\n".join(lines) + "\n</tools>" + prompt
