"""The client for an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from lorax_triton._base import CANCEL_TIMEOUT_S, DEFAULT_TIMEOUT_S, ClientBase
from lorax_triton._channel import Tls
from lorax_triton._grpc_aio import AsyncGrpcTransport, running_loop
from lorax_triton._stream import AsyncTokenStream, finish_async
from lorax_triton._transport import AsyncTransport
from lorax_triton._wire import decode_control
from lorax_triton.errors import LoraxError
from lorax_triton.types import MergedAdapters, Parameters, Request, Response, ResponseFormat


class AsyncClient(ClientBase):
    """A connection to a server for one event loop; any number of tasks may use it at once.

        async with AsyncClient("localhost:8001") as client:
            answer = await client.generate("Why is the sky blue?", adapter_id="some/adapter")
            async for response in client.generate_stream("Why is the sky blue?"):
                if not response.token.special:
                    print(response.token.text, end="", flush=True)

    Same as `Client` in all else.
    """

    def __init__(  # noqa: PLR0913 - the first four are LoRAX's
        self,
        base_url: str,
        headers: Mapping[str, str] | None = None,
        cookies: Mapping[str, str] | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        *,
        session: AsyncTransport | None = None,
        max_session_retries: int = 2,
        model_name: str = "lorax",
        total_timeout: float | None = None,
        connect_timeout: float = 10.0,
        tls: Tls | bool | None = None,
    ) -> None:
        """Arguments and errors are those of `Client`; all time limits are in seconds."""
        super().__init__(base_url, headers, cookies, timeout, model_name, total_timeout)
        config = self._channel_config(tls, connect_timeout, max_session_retries)
        self._transport: AsyncTransport = AsyncGrpcTransport(config) if session is None else session
        self._cancelling: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def generate(  # noqa: PLR0913 - LoRAX's signature
        self,
        prompt: str | None = None,
        adapter_id: str | None = None,
        adapter_source: str | None = None,
        merged_adapters: MergedAdapters | None = None,
        api_token: str | None = None,
        do_sample: bool = False,
        max_new_tokens: int | None = None,
        ignore_eos_token: bool = False,
        best_of: int | None = None,
        repetition_penalty: float | None = None,
        return_full_text: bool = False,
        seed: int | None = None,
        stop_sequences: Sequence[str] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        truncate: int | None = None,
        typical_p: float | None = None,
        watermark: bool = False,
        response_format: ResponseFormat | Mapping[str, Any] | None = None,
        decoder_input_details: bool = False,
        return_k_alternatives: int | None = None,
        details: bool = True,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | None = None,
        adapter_revision: str | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        min_new_tokens: int | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        total_timeout: float | None = None,
    ) -> Response:
        """Generate text and return it whole. Arguments and errors are those of `Client.generate`."""
        parameters = Parameters(
            adapter_id=adapter_id,
            adapter_source=adapter_source,
            adapter_revision=adapter_revision,
            merged_adapters=merged_adapters,
            api_token=api_token,
            do_sample=do_sample,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            ignore_eos_token=ignore_eos_token,
            best_of=best_of,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            return_full_text=return_full_text,
            seed=seed,
            stop=[] if stop_sequences is None else stop_sequences,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            truncate=truncate,
            typical_p=typical_p,
            watermark=watermark,
            response_format=response_format,
            decoder_input_details=decoder_input_details,
            return_k_alternatives=return_k_alternatives,
            details=details,
        )
        request = Request(prompt, parameters, False, messages, input_ids)
        async with self._open_stream(request, request_id, timeout, total_timeout) as stream:
            return await stream.response()

    def generate_stream(  # noqa: PLR0913 - LoRAX's signature
        self,
        prompt: str | None = None,
        adapter_id: str | None = None,
        adapter_source: str | None = None,
        merged_adapters: MergedAdapters | None = None,
        api_token: str | None = None,
        do_sample: bool = False,
        max_new_tokens: int | None = None,
        ignore_eos_token: bool = False,
        repetition_penalty: float | None = None,
        return_full_text: bool = False,
        seed: int | None = None,
        stop_sequences: Sequence[str] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        truncate: int | None = None,
        typical_p: float | None = None,
        watermark: bool = False,
        response_format: ResponseFormat | Mapping[str, Any] | None = None,
        details: bool = True,
        return_k_alternatives: int | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | None = None,
        adapter_revision: str | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        min_new_tokens: int | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        total_timeout: float | None = None,
    ) -> AsyncTokenStream:
        """Generate text and return its tokens as they come. Arguments are those of `Client.generate`.

        The request is sent with the first step of the iteration, which raises the errors of `generate`; bad arguments
        raise here.
        """
        parameters = Parameters(
            adapter_id=adapter_id,
            adapter_source=adapter_source,
            adapter_revision=adapter_revision,
            merged_adapters=merged_adapters,
            api_token=api_token,
            do_sample=do_sample,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            ignore_eos_token=ignore_eos_token,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            return_full_text=return_full_text,
            seed=seed,
            stop=[] if stop_sequences is None else stop_sequences,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            truncate=truncate,
            typical_p=typical_p,
            watermark=watermark,
            response_format=response_format,
            return_k_alternatives=return_k_alternatives,
            details=details,
        )
        request = Request(prompt, parameters, True, messages, input_ids)
        return self._open_stream(request, request_id, timeout, total_timeout)

    async def cancel(self, request_id: str) -> bool:
        """End a request of any client's; its caller gets RequestCancelledError. False if the server has no such
        request (any more).

        Raises:
            LoraxError: the server could not be asked.
        """
        return bool((await self._control("cancel", request_id=request_id)).get("cancelled", False))

    async def info(self) -> dict[str, Any]:
        """Facts about the server that do not change: model, dtype, limits, kernels in use.

        Raises:
            LoraxError: the server could not be asked.
        """
        return await self._control("info")

    async def stats(self) -> dict[str, Any]:
        """What the engine is doing now: requests, KV blocks, adapters, token counts.

        Raises:
            LoraxError: the server could not be asked.
        """
        return await self._control("stats")

    async def adapters(self) -> list[dict[str, Any]]:
        """The adapters the server knows: id, source, revision, status, rank, bytes and users of each.

        Raises:
            LoraxError: the server could not be asked.
        """
        return list((await self._control("adapters")).get("adapters", ()))

    async def is_ready(self, timeout: float | None = None) -> bool:
        """True if the server answers within `timeout` seconds (None: the client's) that it serves the model."""
        return await self._transport.is_ready(self.model_name, timeout or self.timeout or DEFAULT_TIMEOUT_S)

    async def close(self) -> None:
        """Close the connection; streams that are still open are cancelled."""
        if self._cancelling:
            await asyncio.gather(*self._cancelling)
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _open_stream(
        self, request: Request, request_id: str | None, timeout: float | None, total_timeout: float | None
    ) -> AsyncTokenStream:
        encoded, decoder = self._encode(request, request_id)
        limits = self._limits(timeout, total_timeout)
        source = self._transport.open_stream(encoded, limits.total)
        on_abandon = None
        if self._cancels_by_control:
            self._loop = asyncio.get_running_loop()
            on_abandon = functools.partial(self._cancel_in_background, encoded.request_id)
        return AsyncTokenStream(source, decoder, encoded.request_id, limits.next_response, on_abandon)

    async def _control(self, command: str, **arguments: Any) -> dict[str, Any]:
        request = self._encode_control(command, arguments)
        source = self._transport.open_stream(request, self.total_timeout)
        try:
            return decode_control(await source.receive(self.timeout), request.request_id)
        finally:
            await finish_async(source)

    def _cancel_in_background(self, request_id: str) -> None:
        # Streams are given up in destructors and by other threads too.
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        if loop is running_loop():
            self._start_cancelling(request_id)
        else:
            loop.call_soon_threadsafe(self._start_cancelling, request_id)

    def _start_cancelling(self, request_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._cancel_quietly(request_id))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancel_quietly(self, request_id: str) -> None:
        request = self._encode_control("cancel", {"request_id": request_id})
        with contextlib.suppress(LoraxError, RuntimeError):
            source = self._transport.open_stream(request, CANCEL_TIMEOUT_S)
            try:
                await source.receive(CANCEL_TIMEOUT_S)
            finally:
                await finish_async(source)
