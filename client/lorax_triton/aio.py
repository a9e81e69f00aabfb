"""The client for an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack, overload

from lorax_triton._base import DEFAULT_TIMEOUT_S
from lorax_triton._channel import Tls
from lorax_triton._grpc_aio import AsyncGrpcTransport
from lorax_triton._options import AdapterOptions, Options, make_request
from lorax_triton._progress import ProgressCallback
from lorax_triton._session import AsyncSession
from lorax_triton._stream import AsyncTokenStream
from lorax_triton._tasks import TaskRequest, decode_classes, decode_embeddings
from lorax_triton._transport import AsyncTransport
from lorax_triton.adapters import AsyncAdapters
from lorax_triton.batch import BatchOptions, Prompt, make_items, run_batch_async
from lorax_triton.errors import LoraxError
from lorax_triton.metrics import fetch_metrics
from lorax_triton.types import ClassifyResponse, EmbedResponse, MergedAdapters, Response, ResponseFormat


class AsyncClient(AsyncSession):
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
        admin_key: str | None = None,
        metrics_url: str | None = None,
    ) -> None:
        """Arguments and errors are those of `Client`; all time limits are in seconds."""
        super().__init__(base_url, headers, cookies, timeout, model_name, total_timeout)
        self._administer(admin_key, metrics_url)
        config = self._channel_config(tls, connect_timeout, max_session_retries)
        self._transport = AsyncGrpcTransport(config) if session is None else session
        self._cancelling = set()
        self.adapters = AsyncAdapters(self._control)
        self._loop = None

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
        **options: Unpack[Options],
    ) -> Response:
        """Generate text and return it whole. Arguments and errors are those of `Client.generate`."""
        arguments = {
            "adapter_id": adapter_id,
            "adapter_source": adapter_source,
            "merged_adapters": merged_adapters,
            "api_token": api_token,
            "do_sample": do_sample,
            "max_new_tokens": max_new_tokens,
            "ignore_eos_token": ignore_eos_token,
            "best_of": best_of,
            "repetition_penalty": repetition_penalty,
            "return_full_text": return_full_text,
            "seed": seed,
            "stop_sequences": stop_sequences,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "truncate": truncate,
            "typical_p": typical_p,
            "watermark": watermark,
            "response_format": response_format,
            "decoder_input_details": decoder_input_details,
            "return_k_alternatives": return_k_alternatives,
            "details": details,
            **options,
        }
        request, call = make_request(prompt, arguments, stream=False)
        async with self._open_stream(request, call) as stream:
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
        **options: Unpack[Options],
    ) -> AsyncTokenStream:
        """Generate text and return its tokens as they come. Arguments are those of `Client.generate`.

        The request is sent with the first step of the iteration, which raises the errors of `generate`; bad arguments
        raise here.
        """
        arguments = {
            "adapter_id": adapter_id,
            "adapter_source": adapter_source,
            "merged_adapters": merged_adapters,
            "api_token": api_token,
            "do_sample": do_sample,
            "max_new_tokens": max_new_tokens,
            "ignore_eos_token": ignore_eos_token,
            "repetition_penalty": repetition_penalty,
            "return_full_text": return_full_text,
            "seed": seed,
            "stop_sequences": stop_sequences,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "truncate": truncate,
            "typical_p": typical_p,
            "watermark": watermark,
            "response_format": response_format,
            "return_k_alternatives": return_k_alternatives,
            "details": details,
            **options,
        }
        request, call = make_request(prompt, arguments, stream=True)
        return self._open_stream(request, call)

    @overload
    async def embed(self, inputs: str, **options: Unpack[AdapterOptions]) -> EmbedResponse: ...  # type: ignore[overload-overlap]

    @overload
    async def embed(
        self, inputs: Sequence[str], **options: Unpack[AdapterOptions]
    ) -> list[EmbedResponse]: ...

    async def embed(
        self, inputs: str | Sequence[str], **options: Unpack[AdapterOptions]
    ) -> EmbedResponse | list[EmbedResponse]:
        """The embedding of a text, or of each text of a list.

        Args:
            inputs: text, or list of texts.
            options: `adapter_id`, `adapter_source`, `merged_adapters` and `api_token`, as in `generate`.

        Raises:
            UnsupportedError: the server's model makes no embeddings.
            LoraxError: anything else, as in `generate`.
        """
        request = TaskRequest("embed", [inputs] if isinstance(inputs, str) else list(inputs), **options)
        found = decode_embeddings(*await self._task(request), request)
        return found[0] if isinstance(inputs, str) else found

    async def classify(self, inputs: str, **options: Unpack[AdapterOptions]) -> ClassifyResponse:
        """The entities in a text. Arguments and errors are those of `embed`."""
        return (await self.classify_batch([inputs], **options))[0]

    async def classify_batch(
        self, inputs: Sequence[str], **options: Unpack[AdapterOptions]
    ) -> list[ClassifyResponse]:
        """The entities in each of several texts. Arguments and errors are those of `embed`."""
        request = TaskRequest("classify", list(inputs), **options)
        return decode_classes(*await self._task(request), request)

    async def generate_batch(
        self,
        prompts: Sequence[Prompt],
        adapter_ids: str | Sequence[str | None] | None = None,
        *,
        concurrency: int = 16,
        progress: bool | ProgressCallback = False,
        return_exceptions: bool = True,
        overload_retries: int = 8,
        **arguments: Any,
    ) -> list[Response | LoraxError]:
        """Generate a text for each of many prompts over parallel streams.

        Args:
            prompts: texts; chats (lists of messages) and lists of token ids are understood too.
            adapter_ids: one adapter for all prompts, or one for each.
            concurrency: requests in flight at a time.
            progress: True draws a progress bar on standard error (with tqdm or rich if installed, else lines, and
                only on a terminal); a function is called with the number of prompts done and of all.
            return_exceptions: keep the error of a failed prompt as its item of the result; False raises the first
                one and cancels the rest.
            overload_retries: how often a prompt is sent again, after growing pauses, if the server is full.
            arguments: those of `generate`, for every prompt.

        Returns:
            A Response or a LoraxError for each prompt, in the order of the prompts.

        Raises:
            ValidationError: a prompt or an argument is wrong; nothing was sent.
        """
        options = BatchOptions(concurrency, progress, return_exceptions, overload_retries)
        items = make_items(prompts, adapter_ids, arguments)
        return await run_batch_async(self._open_stream, items, options)

    async def cancel(self, request_id: str) -> bool:
        """End a request of any client's; its caller gets RequestCancelledError. False if the server has no such
        request (any more).

        Raises:
            LoraxError: the server could not be asked.
        """
        return bool((await self._control("cancel", {"request_id": request_id})).get("cancelled", False))

    async def info(self) -> dict[str, Any]:
        """Facts about the server that do not change: model, dtype, limits, kernels in use.

        Raises:
            LoraxError: the server could not be asked.
        """
        return await self._control("info", {})

    async def stats(self) -> dict[str, Any]:
        """What the engine is doing now: requests, KV blocks, adapters, token counts.

        Raises:
            LoraxError: the server could not be asked.
        """
        return await self._control("stats", {})

    async def tokenize(self, inputs: str, add_special_tokens: bool = True) -> list[dict[str, Any]]:
        """The tokens of a text: `id`, `text`, and its place in the text as `start` and `stop` in characters.

        Raises:
            LoraxError: the server could not be asked, or cannot tell.
        """
        arguments = {"inputs": inputs, "add_special_tokens": add_special_tokens}
        return list((await self._control("tokenize", arguments)).get("tokens", ()))

    async def metrics(self, format: str = "prometheus") -> str | dict[str, Any]:
        """The server's metrics, from Triton's metrics port.

        Args:
            format: "prometheus" for Prometheus' text, "json" for an object of metric families; see
                `lorax_triton.metrics.parse_prometheus`.

        Raises:
            ValidationError: there is no such format.
            ServerConnectionError: nothing answers at the client's `metrics_url`.
            LoraxError: the answer is an error, or no metrics.
        """
        return await asyncio.to_thread(fetch_metrics, self.metrics_url, format, self.timeout)

    async def is_ready(self, timeout: float | None = None) -> bool:
        """True if the server answers within `timeout` seconds (None: the client's) that it serves the model."""
        return await self._is_ready(timeout)

    async def close(self) -> None:
        """Close the connection; streams that are still open are cancelled."""
        await self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
