"""OpenAI's messages as chat templates want them: plain text contents, and tools where the template knows none."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from lorax_triton.openai_api.errors import ApiError
from lorax_triton.openai_api.fields import Fields, missing, noun, wrong_type
from lorax_triton.openai_api.tools import Tools, tools_as_text

_ROLES = ("developer", "system", "user", "assistant", "tool", "function")


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages, with contents as text, null where there is none but tool calls, and their arguments as objects,
    which templates write out themselves.

    Raises:
        ApiError: naming the message and the part at fault.
    """
    given = fields.items("messages")
    if given is None:
        raise missing("messages")
    if not given:
        raise ApiError(
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array "
            "instead.",
            "messages",
            "empty_array",
        )
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(given)]


def _read_message(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(param, "an object", value)
    fields = Fields(value, f"{param}.")
    role = fields.required_text("role")
    if role not in _ROLES:
        known = ", ".join(f"'{name}'" for name in _ROLES)
        raise ApiError(
            f"Invalid value: '{role}'. Supported values are: {known}.", f"{param}.role", "invalid_value"
        )
    # A developer message is the newer name of a system message; templates know the older one.
    message: dict[str, Any] = {"role": {"developer": "system", "function": "tool"}.get(role, role)}
    calls = fields.items("tool_calls")
    if calls:
        message["tool_calls"] = [
            _read_call(call, f"{param}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
    message["content"] = _read_content(fields, role, bool(calls))
    for name in ("name", "tool_call_id"):
        text = fields.text(name)
        if text is not None:
            message[name] = text
    return message


def _read_content(fields: Fields, role: str, has_calls: bool) -> str | None:
    param = fields.param("content")
    content = fields.values.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        # An assistant's message may consist of calls or a refusal alone.
        if role == "assistant":
            return None if has_calls else fields.text("refusal", "")
        raise ApiError(
            f"Invalid value for '{param}': expected a string or an array, got null.", param, "invalid_type"
        )
    if not isinstance(content, list):
        raise ApiError(
            f"Invalid type for '{param}': expected one of a string or array of objects, but got "
            f"{noun(content)} instead.",
            param,
            "invalid_type",
        )
    return "".join(_read_part(part, f"{param}[{index}]") for index, part in enumerate(content))


def _read_part(value: Any, param: str) -> str:
    if not isinstance(value, dict):
        raise wrong_type(param, "an object", value)
    part = Fields(value, f"{param}.")
    kind = part.required_text("type")
    if kind in ("text", "refusal"):
        return part.required_text(kind)
    if kind == "image_url":
        # As LoRAX does: a model without eyes is shown where the image is.
        image = value.get("image_url")
        url = (
            image
            if isinstance(image, str)
            else Fields(part.object("image_url") or {}, f"{param}.").text("url")
        )
        if url is None:
            raise missing(f"{param}.image_url.url")
        return f"![]({url})"
    raise ApiError(
        f"Invalid value: '{kind}'. This model reads parts of type 'text' and 'image_url'.",
        f"{param}.type",
        "invalid_value",
    )


def _read_call(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(param, "an object", value)
    call = Fields(value, f"{param}.")
    function = call.object("function")
    if function is None:
        raise missing(f"{param}.function")
    parts = Fields(function, f"{param}.function.")
    arguments: Any = parts.text("arguments", "{}")
    with contextlib.suppress(ValueError):  # a model's faulty JSON is shown to it as it wrote it
        arguments = json.loads(arguments or "{}")
    return {
        "id": call.text("id", ""),
        "type": "function",
        "function": {"name": parts.required_text("name"), "arguments": arguments},
    }


def with_tools_as_text(messages: list[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    """The messages for a template that knows nothing of tools: calls and their results written out, and the tools
    themselves appended to the last message."""
    plain: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        written = _without_calls(message)
        if is_result and after_result:  # templates want users and assistants to take turns
            plain[-1]["content"] += "\n" + written["content"]
        else:
            plain.append(written)
        after_result = is_result
    if tools.definitions:
        plain[-1] = plain[-1] | {"content": plain[-1]["content"] + tools_as_text(tools)}
    return plain


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"] or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    blocks = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    return plain | {"content": "\n".join([content, *blocks] if content else blocks)}
