"""A server that says what a test wants, for the OpenAI protocol; and readers of what the protocol answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from lorax_triton.openai_api import Call, Piece, handle

BASE = "the/base"
Script = Callable[[Call], Iterable[Piece | Exception]]


def ending(text: str = "", reason: str = "eos_token", **details: Any) -> Piece:
    """The last piece of an answer."""
    counts = {"prompt_tokens": 5, "generated_tokens": 3, "cached_tokens": 2}
    return Piece(text, (), {"finish_reason": reason, **counts, **details})


def saying(*texts: str, reason: str = "eos_token") -> Script:
    """A script that answers with these pieces of text."""
    return lambda call: [*(Piece(text) for text in texts), ending(reason=reason)]


@dataclass
class ScriptedBackend:
    """Answers each call with its script's pieces; an exception among them is raised.

    Attributes:
        calls: every call so far.
        open: calls that have neither ended nor been given up.
    """

    script: Script = field(default_factory=lambda: saying("Hello", " there"))
    template_variables: Sequence[str] = ("messages", "tools")
    known_adapters: Sequence[Mapping[str, Any]] = ()
    known_aliases: Mapping[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    open: int = 0

    async def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        self.calls.append(call)
        self.open += 1
        try:
            for item in self.script(call):
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.open -= 1

    async def info(self) -> Mapping[str, Any]:
        return {"model_id": BASE, "chat_template_variables": list(self.template_variables)}

    async def adapters(self) -> Sequence[Mapping[str, Any]]:
        return self.known_adapters

    async def aliases(self) -> Mapping[str, Any]:
        return self.known_aliases

    @property
    def call(self) -> Call:
        """The only call."""
        (call,) = self.calls
        return call


@dataclass
class Told:
    """An answer, read to its end. `events` are those of a stream, without the end mark, which `done` tells of."""

    status: int
    headers: Mapping[str, str]
    json: Any = None
    events: list[Any] = field(default_factory=list)
    done: bool = False

    @property
    def error(self) -> Any:
        return self.json["error"]


def ask(backend: ScriptedBackend, path: str, headers: Mapping[str, str] = {}, **fields: Any) -> Told:
    """Send a request to the protocol and read its answer."""
    return ask_raw(backend, "POST", f"/v1/{path}", json.dumps({"model": "", **fields}).encode(), headers)


def ask_raw(
    backend: ScriptedBackend, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}
) -> Told:
    """`ask` with every byte in the caller's hands."""

    async def run() -> Told:
        answer = await handle(method, path, headers, body, backend)
        if isinstance(answer.body, bytes):
            return Told(answer.status, answer.headers, json.loads(answer.body))
        told = Told(answer.status, answer.headers)
        async with aclosing(answer.body) as events:  # type: ignore[type-var]
            async for event in events:
                text = event.decode()
                assert text.startswith("data: ")
                assert text.endswith("\n\n")
                if text == "data: [DONE]\n\n":
                    told.done = True
                else:
                    assert not told.done
                    told.events.append(json.loads(text[6:]))
        return told

    told = asyncio.run(run())
    assert backend.open == 0
    return told


USER = [{"role": "user", "content": "Hi"}]


def chat(backend: ScriptedBackend, **fields: Any) -> Told:
    """A chat request."""
    return ask(backend, "chat/completions", **{"messages": USER, **fields})


def complete(backend: ScriptedBackend, **fields: Any) -> Told:
    """A completion request."""
    return ask(backend, "completions", **{"prompt": "Once", **fields})
