"""Arguments of `generate` and `generate_stream` beyond LoRAX's, in one place for both clients. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from lorax_triton._requests import MergedAdapters, Parameters, Request


class PromptOptions(TypedDict, total=False):
    """What may stand in the prompt's place.

    messages: chat messages, each with `role` and `content`; rendered with the model's chat template.
    input_ids: the prompt as token ids, used as they are.
    """

    messages: Sequence[Mapping[str, Any]] | None
    input_ids: Sequence[int] | None


class CallOptions(TypedDict, total=False):
    """How long to wait, and under which name.

    request_id: name of the request on the server, for `cancel`; None makes up a UUID.
    timeout: longest wait for the next response in seconds; None is the client's.
    total_timeout: longest time for the whole answer, with retries, in seconds; None is the client's.
    """

    request_id: str | None
    timeout: float | None
    total_timeout: float | None


class ParameterOptions(TypedDict, total=False):
    """Parameters that LoRAX's client does not have; see `Parameters`."""

    adapter_revision: str | None
    frequency_penalty: float | None
    presence_penalty: float | None
    min_new_tokens: int | None
    priority: int | None
    queue_timeout: float | None
    apply_chat_template: bool
    json_schema: Any
    extra_parameters: Mapping[str, Any] | None


class AdapterOptions(TypedDict, total=False):
    """Which adapter to use, where there is no text to generate; as in `generate`."""

    adapter_id: str | None
    adapter_source: str | None
    merged_adapters: MergedAdapters | None
    api_token: str | None


class Options(PromptOptions, CallOptions, ParameterOptions, total=False):
    """All keyword arguments beyond LoRAX's."""


def make_request(
    prompt: str | None, arguments: Mapping[str, Any], stream: bool
) -> tuple[Request, CallOptions]:
    """The request behind one call of `generate` or `generate_stream`.

    Args:
        prompt: its first argument.
        arguments: its other arguments by name.
        stream: whether tokens are wanted as they come.

    Raises:
        ValidationError: a value is out of range, or fields exclude each other.
        TypeError: there is no such argument.
    """
    rest = dict(arguments)
    call: CallOptions = {
        "request_id": rest.pop("request_id", None),
        "timeout": rest.pop("timeout", None),
        "total_timeout": rest.pop("total_timeout", None),
    }
    messages, input_ids = rest.pop("messages", None), rest.pop("input_ids", None)
    stop = rest.pop("stop_sequences", None)
    parameters = Parameters(stop=[] if stop is None else stop, **rest)
    return Request(prompt, parameters, stream, messages, input_ids), call
