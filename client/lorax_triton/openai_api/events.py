"""Server-sent events out of chunks: usage where it was asked for, errors inside the stream, the end mark."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Self

from lorax_triton.errors import LoraxError
from lorax_triton.openai_api.answer import DONE, Answer, event, stream_answer
from lorax_triton.openai_api.errors import ApiError, from_lorax, internal_error

_logger = logging.getLogger("lorax_triton")

Chunk = dict[str, Any]


async def stream_events(chunks: AsyncGenerator[Chunk, None], include_usage: bool | None) -> Answer:
    """A stream's answer. Waits for the first chunk, so that a request that is refused gets a status of its own.

    Args:
        chunks: the last one has the usage and no choices.
        include_usage: True: that one is sent, and all others have a usage of null. False: it is not. None, where the
            request does not say: the usage goes with the last chunk that has choices, as in LoRAX.

    Raises:
        ApiError, LoraxError: the first chunk failed.
    """
    try:
        first = await anext(chunks)
    except BaseException:
        await chunks.aclose()
        raise
    return stream_answer(EventStream(first, chunks, include_usage))


class EventStream(AsyncIterator[bytes]):
    """The events of one stream. `aclose` gives the request up, whether or not the iteration has begun."""

    def __init__(self, first: Chunk, chunks: AsyncGenerator[Chunk, None], include_usage: bool | None) -> None:
        self._chunks = chunks
        self._held: Chunk | None = None
        self._events = self._run(first, include_usage)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._events)

    async def aclose(self) -> None:
        """End the request here and on the server; nothing happens to one that is complete."""
        await self._events.aclose()
        await self._chunks.aclose()

    async def _run(self, first: Chunk, include_usage: bool | None) -> AsyncGenerator[bytes, None]:
        try:
            for data in self._with_usage(first, include_usage):
                yield event(data)
            async for chunk in self._chunks:
                for data in self._with_usage(chunk, include_usage):
                    yield event(data)
        except ApiError as error:
            yield event(error.payload())
        except LoraxError as error:
            yield event(from_lorax(error).payload())
        except Exception as error:
            _logger.exception("a stream failed")
            yield event(internal_error(error).payload())
        finally:
            await self._chunks.aclose()
        yield DONE

    def _with_usage(self, chunk: Chunk, include_usage: bool | None) -> list[Chunk]:
        """What to send now that `chunk` has come."""
        held, self._held = self._held, None
        before = [] if held is None else [held]
        if not chunk["choices"]:
            if include_usage:
                return [chunk]
            return [held | {"usage": chunk["usage"]}] if held is not None else []
        if include_usage:
            return [chunk | {"usage": None}]
        if include_usage is None and chunk["choices"][0]["finish_reason"]:
            self._held = chunk  # the usage may come next
            return before
        return [*before, chunk]
