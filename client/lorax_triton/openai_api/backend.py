"""The server behind the protocol, as this package needs it: a few calls, implemented over `AsyncClient`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(slots=True)
class Call:
    """One sequence to generate: exactly one of `prompt`, `messages` and `input_ids`.

    `sampling` is the JSON object of the server's `sampling_parameters`. `return_tokens` asks for tokens beside the
    text, which costs; `echo` has the prompt put before the `generated_text` of the details.
    """

    request_id: str
    sampling: dict[str, Any]
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    input_ids: Sequence[int] | None = None
    adapter_id: str | None = None
    adapter_source: str | None = None
    api_token: str | None = field(default=None, repr=False)
    stream: bool = False
    return_tokens: bool = False
    echo: bool = False


@dataclass(slots=True)
class Piece:
    """A part of an answer: text and tokens (the server's JSON objects) since the last one. `details`, the server's
    JSON object about the whole answer, marks the last."""

    text: str = ""
    tokens: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, Any] | None = None


class Backend(Protocol):
    """A lorax-triton server. Every method raises `LoraxError`."""

    def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        """The pieces of one answer; closing the generator cancels the request on the server."""
        ...

    async def info(self) -> Mapping[str, Any]:
        """Facts about the server: at least `model_id`; `chat_template_variables` if it tells."""
        ...

    async def adapters(self) -> Sequence[Mapping[str, Any]]:
        """The adapters the server knows."""
        ...

    async def aliases(self) -> Mapping[str, Any]:
        """What each alias stands for: a list of targets, objects with `adapter_id`."""
        ...
