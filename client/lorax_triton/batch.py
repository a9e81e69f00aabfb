"""Many prompts over parallel streams, with progress; see `Client.generate_batch`."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from lorax_triton._options import CallOptions, make_request
from lorax_triton._progress import ProgressCallback, open_progress
from lorax_triton._stream import AsyncTokenStream, TokenStream
from lorax_triton.errors import LoraxError, OverloadedError, RequestCancelledError, ValidationError
from lorax_triton.types import Request, Response

# A prompt: a text, chat messages, or token ids.
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One prompt of a batch, ready to be sent; `index` is its place in the input."""

    index: int
    request: Request
    call: CallOptions


def make_items(
    prompts: Sequence[Prompt], adapter_ids: str | Sequence[str | None] | None, arguments: Mapping[str, Any]
) -> list[BatchItem]:
    """The requests of a batch.

    Raises:
        ValidationError: a prompt or a parameter is wrong, or there are not as many adapters as prompts.
        TypeError: there is no such argument.
    """
    adapters = _spread(adapter_ids, len(prompts))
    items = []
    for index, (prompt, adapter_id) in enumerate(zip(prompts, adapters, strict=True)):
        text = prompt if isinstance(prompt, str) else None
        options = dict(arguments)
        options.setdefault("details", True)
        if text is None:
            kind = "input_ids" if all(isinstance(part, int) for part in prompt) else "messages"
            options[kind] = prompt
        if adapter_id is not None:
            options["adapter_id"] = adapter_id
        try:
            request, call = make_request(text, options, stream=False)
        except ValidationError as error:
            raise ValidationError(f"prompt {index}: {error.message}") from None
        items.append(BatchItem(index, request, call))
    return items


def _spread(adapter_ids: str | Sequence[str | None] | None, count: int) -> Sequence[str | None]:
    if adapter_ids is None or isinstance(adapter_ids, str):
        return [adapter_ids] * count
    if len(adapter_ids) != count:
        raise ValidationError(f"`adapter_ids` has {len(adapter_ids)} entries for {count} prompts")
    return adapter_ids


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How to run a batch.

    Attributes:
        concurrency: requests in flight at a time.
        progress: True for a progress bar, or a function to call with (done, total).
        return_exceptions: keep errors as items of the result; else the first one ends the batch.
        overload_retries: how often an item is sent again if the server is full.

    Raises:
        ValueError: `concurrency` is not positive, or `overload_retries` negative.
    """

    concurrency: int = 16
    progress: bool | ProgressCallback = False
    return_exceptions: bool = True
    overload_retries: int = 8

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {self.concurrency!r}")
        if self.overload_retries < 0:
            raise ValueError(f"overload_retries must not be negative, not {self.overload_retries!r}")

    def pauses(self) -> Iterator[float]:
        """Seconds to wait before each new try; random, so that the items spread out."""
        for attempt in range(self.overload_retries):
            yield random.uniform(0.5, 1.0) * min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)


class _Workers:
    """Threads that each send one item after another. Owns the streams that are open."""

    def __init__(
        self, open_stream: Callable[[Request, CallOptions], TokenStream], options: BatchOptions
    ) -> None:
        self._open_stream = open_stream
        self._options = options
        self._streams: set[TokenStream] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.first_error: LoraxError | None = None  # the one that ended the batch

    def answer(self, item: BatchItem) -> Response | LoraxError:
        """Send one item, again and again while the server is full; its answer or error."""
        pauses = self._options.pauses()
        while True:
            try:
                return self._send(item)
            except OverloadedError as error:
                pause = next(pauses, None)
                if pause is None or self._stopped.wait(max(pause, error.retry_after or 0.0)):
                    return self._keep(error)
            except LoraxError as error:
                return self._keep(error)

    def _keep(self, error: LoraxError) -> LoraxError:
        if not self._options.return_exceptions:
            with self._lock:
                self.first_error = self.first_error or error
            self.stop()
        return error

    def stop(self) -> None:
        """Cancel what is open and send no more."""
        with self._lock:
            self._stopped.set()
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()

    def _send(self, item: BatchItem) -> Response:
        with self._lock:
            if self._stopped.is_set():
                raise RequestCancelledError("The batch was stopped")
            stream = self._open_stream(item.request, item.call)
            self._streams.add(stream)
        try:
            with stream:
                return stream.response()
        finally:
            with self._lock:
                self._streams.discard(stream)


def run_batch(
    open_stream: Callable[[Request, CallOptions], TokenStream],
    items: Sequence[BatchItem],
    options: BatchOptions,
) -> list[Response | LoraxError]:
    """Send all items from a pool of threads.

    Raises:
        LoraxError: the first error, unless they are to be returned; the rest of the batch is cancelled.
    """
    workers = _Workers(open_stream, options)
    results = Results(len(items), options.progress)
    pool = ThreadPoolExecutor(min(options.concurrency, max(1, len(items))), "lorax-client-batch")
    try:
        futures = {pool.submit(workers.answer, item): item.index for item in items}
        for future in as_completed(futures):
            answer = future.result()
            if workers.first_error is not None:
                raise workers.first_error
            results.put(futures[future], answer)
        return results.take()
    except BaseException:
        # An interrupt too must leave no request running on the server.
        pool.shutdown(wait=False, cancel_futures=True)
        workers.stop()
        raise
    finally:
        pool.shutdown()
        results.close()


async def run_batch_async(
    open_stream: Callable[[Request, CallOptions], AsyncTokenStream],
    items: Sequence[BatchItem],
    options: BatchOptions,
) -> list[Response | LoraxError]:
    """`run_batch` with tasks of one event loop."""
    results = Results(len(items), options.progress)
    waiting = iter(items)

    async def work() -> None:
        for item in waiting:
            answer = await _answer_async(open_stream, item, options)
            if isinstance(answer, LoraxError) and not options.return_exceptions:
                raise answer
            results.put(item.index, answer)

    tasks = [asyncio.create_task(work()) for _ in range(min(options.concurrency, len(items)))]
    try:
        await asyncio.gather(*tasks)
        return results.take()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        results.close()


async def _answer_async(
    open_stream: Callable[[Request, CallOptions], AsyncTokenStream], item: BatchItem, options: BatchOptions
) -> Response | LoraxError:
    pauses = options.pauses()
    while True:
        try:
            async with open_stream(item.request, item.call) as stream:
                return await stream.response()
        except OverloadedError as error:
            pause = next(pauses, None)
            if pause is None:
                return error
            await asyncio.sleep(max(pause, error.retry_after or 0.0))
        except LoraxError as error:
            return error


class Results:
    """The answers of a batch as they come, in input order in the end; tells the progress. Not for several threads at
    once."""

    def __init__(self, count: int, progress: bool | ProgressCallback) -> None:
        self._answers: list[Response | LoraxError | None] = [None] * count
        self._done = 0
        self._progress = open_progress(progress, count)

    def put(self, index: int, answer: Response | LoraxError) -> None:
        """Note the answer of one item."""
        self._answers[index] = answer
        self._done += 1
        self._progress.update(self._done)

    def take(self) -> list[Response | LoraxError]:
        """All answers. Every item must have one."""
        answers = [answer for answer in self._answers if answer is not None]
        assert len(answers) == len(self._answers)
        return answers

    def close(self) -> None:
        """End the progress bar."""
        self._progress.close()
