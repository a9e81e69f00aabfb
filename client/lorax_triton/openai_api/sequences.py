"""Running the sequences of one request beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from lorax_triton.openai_api.backend import Backend, Call, Piece

# Sequences of one request that run at once; more would take the server away from everybody else.
MAX_PARALLEL = 64


@dataclass(slots=True)
class Finished:
    """A whole sequence: its text, its tokens (the server's JSON objects, if asked for) and the server's details."""

    text: str = ""
    tokens: list[Any] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, piece: Piece) -> None:
        """Take in the next piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        if piece.details is not None:
            self.details = dict(piece.details)

    @property
    def mean_logprob(self) -> float:
        """Mean log probability of its tokens; what `best_of` compares."""
        total = self.details.get("cumulative_logprob")
        if total is None:
            total = sum(token.get("logprob") or 0.0 for token in self.tokens)
        return float(total) / max(1, int(self.details.get("generated_tokens") or len(self.tokens)))


async def run_all(backend: Backend, calls: Sequence[Call]) -> list[Finished]:
    """Run every call to its end. The first failure ends them all and is raised."""
    results = [Finished() for _ in calls]
    async with aclosing(run_merged(backend, calls)) as pieces:
        async for index, piece in pieces:
            results[index].add(piece)
    return results


async def run_merged(backend: Backend, calls: Sequence[Call]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all calls as they come, each with its call's index. The first failure ends them all and is
    raised; closing the generator cancels them all."""
    if len(calls) == 1:
        async with aclosing(backend.generate(calls[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()
    room = asyncio.Semaphore(MAX_PARALLEL)
    tasks = [
        asyncio.ensure_future(_forward(index, call, backend, queue, room)) for index, call in enumerate(calls)
    ]
    try:
        left = len(tasks)
        while left:
            index, item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    index: int,
    call: Call,
    backend: Backend,
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]],
    room: asyncio.Semaphore,
) -> None:
    try:
        async with room, aclosing(backend.generate(call)) as pieces:
            async for piece in pieces:
                queue.put_nowait((index, piece))
    except Exception as error:
        queue.put_nowait((index, error))
    else:
        queue.put_nowait((index, None))
