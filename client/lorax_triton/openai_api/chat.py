"""`/v1/chat/completions`."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from lorax_triton.errors import LoraxError
from lorax_triton.openai_api.answer import Answer, json_answer
from lorax_triton.openai_api.backend import Backend, Call
from lorax_triton.openai_api.chat_choice import ChatChoice
from lorax_triton.openai_api.errors import ApiError, from_lorax
from lorax_triton.openai_api.events import stream_events
from lorax_triton.openai_api.fields import Fields
from lorax_triton.openai_api.generation import (
    MAX_TOP_LOGPROBS,
    Generation,
    Identity,
    read_generation,
    read_response_format,
    usage,
)
from lorax_triton.openai_api.messages import read_messages, with_tools_as_text
from lorax_triton.openai_api.models import adapter_of_model, base_model
from lorax_triton.openai_api.sequences import run_merged
from lorax_triton.openai_api.tools import Tools, read_tools

COMPLETION, CHUNK = "chat.completion", "chat.completion.chunk"


@dataclass(slots=True)
class ChatRequest:
    """A chat request, read and checked."""

    generation: Generation
    messages: list[dict[str, Any]]
    tools: Tools

    def choices(self) -> list[ChatChoice]:
        """A fresh choice for each sequence."""
        return [ChatChoice(index, self.tools, self.generation.logprobs) for index in range(self.generation.n)]


def read_chat_request(fields: Fields, headers: Mapping[str, str]) -> ChatRequest:
    """Read the fields of a chat request.

    Raises:
        ApiError: naming the field at fault.
    """
    generation = read_generation(fields, headers)
    if "text" not in fields.texts("modalities") and fields.has("modalities"):
        raise ApiError("This server answers in text only.", "modalities", "unsupported_value")
    generation.logprobs = _read_logprobs(fields)
    sampling = generation.sampling
    tools = read_tools(fields)
    response_format = read_response_format(fields)
    if response_format is not None and tools.callable:
        raise ApiError(
            "'tools' and 'response_format' exclude each other: the answer is either a call or the JSON asked for; "
            "leave one out or set 'tool_choice' to 'none'.",
            "response_format",
            "invalid_value",
        )
    if tools.forced:
        response_format = {"type": "json_schema", "schema": tools.schema()}
    if response_format is not None:
        sampling["response_format"] = response_format
    limit = _read_max_tokens(fields)
    if limit is not None:
        sampling["max_tokens"] = limit
    if generation.logprobs is not None:
        sampling["logprobs"] = generation.logprobs
    guideline = fields.text("guideline")
    if guideline is not None:
        sampling["guideline"] = guideline
    kwargs = fields.object("chat_template_kwargs")
    if kwargs:
        sampling["chat_template_kwargs"] = kwargs
    return ChatRequest(generation, read_messages(fields), tools)


def _read_max_tokens(fields: Fields) -> int | None:
    old, new = fields.integer("max_tokens", 1), fields.integer("max_completion_tokens", 1)
    if old is not None and new is not None and old != new:
        raise ApiError(
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
            "max_tokens",
        )
    return new if old is None else old


def _read_logprobs(fields: Fields) -> int | None:
    """Alternatives to show; None: no log probabilities."""
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    alternatives = fields.integer("return_k_alternatives", 0, MAX_TOP_LOGPROBS)
    if alternatives:  # LoRAX's word for it
        return max(alternatives, top or 0)
    if not fields.flag("logprobs"):
        if top:
            raise ApiError(
                "'top_logprobs' is only allowed when 'logprobs' is enabled.", "top_logprobs", "invalid_value"
            )
        return None
    return top or 0


async def answer_chat(
    fields: Fields, headers: Mapping[str, str], backend: Backend, fingerprint: str
) -> Answer:
    """Answer a chat request.

    Raises:
        ApiError, LoraxError: the request is at fault, or failed before its first token.
    """
    request = read_chat_request(fields, headers)
    name = request.generation.model or await base_model(backend)
    identity = Identity.new("chatcmpl", name, fingerprint)
    calls = await _calls(request, identity, backend)
    try:
        if request.generation.stream:
            events = _chunks(request, identity, calls, backend)
            return await stream_events(events, request.generation.include_usage)
        return json_answer(await _completion(request, identity, calls, backend))
    except LoraxError as error:
        raise _in_words_of_chats(error, request.tools.forced) from error


async def _calls(request: ChatRequest, identity: Identity, backend: Backend) -> list[Call]:
    generation, tools = request.generation, request.tools
    adapter_id = await adapter_of_model(generation.model, backend)
    messages, tools_for_template = await _tell_of_tools(request, backend)
    calls = []
    for choice in range(generation.n):
        sampling = generation.sampling_of(choice)
        if tools_for_template:
            sampling["tools"] = tools_for_template
        calls.append(
            Call(
                request_id=f"{identity.id}-{choice}",
                sampling=sampling,
                messages=messages,
                adapter_id=adapter_id,
                adapter_source=generation.adapter_source,
                api_token=generation.api_token,
                stream=generation.stream,
                return_tokens=generation.logprobs is not None or tools.callable,
            )
        )
    return calls


async def _tell_of_tools(
    request: ChatRequest, backend: Backend
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages to send, and the tools to give the chat template, if it knows what to do with them."""
    tools, messages = request.tools, request.messages
    speaks_of_tools = bool(tools.definitions) or any(
        message["role"] == "tool" or message.get("tool_calls") for message in messages
    )
    if not speaks_of_tools:
        return messages, []
    if "tools" in ((await backend.info()).get("chat_template_variables") or ()):
        return messages, tools.definitions
    return with_tools_as_text(messages, tools), []


async def _completion(
    request: ChatRequest, identity: Identity, calls: list[Call], backend: Backend
) -> dict[str, Any]:
    choices = request.choices()
    async with aclosing(run_merged(backend, calls)) as pieces:
        async for index, piece in pieces:
            choices[index].feed(piece)
    envelope = identity.envelope(COMPLETION, [choice.whole() for choice in choices])
    return envelope | {"usage": usage([[choice.details for choice in choices]])}


async def _chunks(
    request: ChatRequest, identity: Identity, calls: list[Call], backend: Backend
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a stream, the last one with the usage and no choices."""
    choices = request.choices()
    begun: set[int] = set()
    async with aclosing(run_merged(backend, calls)) as pieces:
        async for index, piece in pieces:
            if index not in begun:
                begun.add(index)
                yield identity.envelope(CHUNK, [choices[index].first_chunk()])
            for chunk in choices[index].feed(piece):
                yield identity.envelope(CHUNK, [chunk])
    yield identity.envelope(CHUNK, []) | {"usage": usage([[choice.details for choice in choices]])}


def _in_words_of_chats(error: LoraxError, forced: bool) -> ApiError:
    """The server's error with what the caller sent for what became of it: a chat travels as a prompt, a forced call as
    a response format."""
    result = from_lorax(error)
    if result.param == "prompt":
        result.param = "messages"
        result.message = re.sub("^prompt:", "messages:", result.message)
    if forced and result.param == "response_format":
        result.param = "tool_choice"
        result.message = f"tool_choice: forcing a call needs constrained output. {result.message}"
    return result
