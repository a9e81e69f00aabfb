"""The blocking client."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from lorax_triton._base import CANCEL_TIMEOUT_S, DEFAULT_TIMEOUT_S, ClientBase
from lorax_triton._channel import Tls
from lorax_triton._grpc import GrpcTransport
from lorax_triton._stream import TokenStream, finish
from lorax_triton._transport import Transport
from lorax_triton._wire import decode_control
from lorax_triton.errors import LoraxError
from lorax_triton.types import MergedAdapters, Parameters, Request, Response, ResponseFormat


class Client(ClientBase):
    """A connection to a server; any number of threads may use it at once.

        with Client("localhost:8001") as client:
            print(client.generate("Why is the sky blue?", adapter_id="some/adapter").generated_text)
            for response in client.generate_stream("Why is the sky blue?"):
                if not response.token.special:
                    print(response.token.text, end="", flush=True)

    Every request is a gRPC stream of its own on one shared channel. If the connection is lost before the first token
    of an answer, the request is sent again on a new channel, up to `max_session_retries` times; never after it.
    """

    def __init__(  # noqa: PLR0913 - the first six are LoRAX's
        self,
        base_url: str,
        headers: Mapping[str, str] | None = None,
        cookies: Mapping[str, str] | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        session: Transport | None = None,
        max_session_retries: int = 2,
        *,
        model_name: str = "lorax",
        total_timeout: float | None = None,
        connect_timeout: float = 10.0,
        tls: Tls | bool | None = None,
    ) -> None:
        """
        Args:
            base_url: Triton's gRPC address: "host:8001", "grpc://host:8001", or "grpcs://host:8001" for TLS.
            headers: sent as gRPC metadata; `Authorization: Bearer X` also stands in for `api_token`.
            cookies: sent as `cookie` metadata.
            timeout: longest wait for the next response in seconds: between two tokens of a stream, or for the whole
                answer of `generate`. None waits for ever.
            session: a transport to use instead of a gRPC channel of this client's own.
            max_session_retries: new channels to try when the connection is lost before the first token.
            model_name: Triton model to ask: "lorax", or "lorax_ensemble", whose tokenizer runs outside the engine.
            total_timeout: longest time for a whole answer in seconds; None sets no limit.
            connect_timeout: longest time for one connection attempt in seconds.
            tls: True or a `Tls` encrypts the connection.

        Raises:
            ValueError: the address or a time limit makes no sense.
        """
        super().__init__(base_url, headers, cookies, timeout, model_name, total_timeout)
        config = self._channel_config(tls, connect_timeout, max_session_retries)
        self._transport: Transport = GrpcTransport(config) if session is None else session
        self._cancelling: set[threading.Thread] = set()

    def generate(  # noqa: PLR0913 - LoRAX's signature
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
        """Generate text and return it whole.

        Args:
            prompt: input text; `messages` (a chat, rendered with the model's template) or `input_ids` (token ids) may
                stand in its place.
            adapter_id: adapter to use: hub id, "id@revision" or folder; None or "" is the base model.
            adapter_source: where the adapter is looked up: hub, local, s3 or pbase; None is the server's default.
            merged_adapters: several adapters merged for this request, instead of `adapter_id`.
            api_token: token for a private adapter; None takes that of an `Authorization: Bearer` header, if any.
            do_sample: draw tokens at random; temperature, top_k, top_p and typical_p switch it on too.
            max_new_tokens: most tokens to generate; None is as many as the model has room for.
            ignore_eos_token: go on after an end-of-sequence token.
            best_of: draw this many answers and return the likeliest.
            repetition_penalty: > 1 makes tokens of prompt and answer less likely.
            return_full_text: begin `generated_text` with the prompt.
            seed: seed of the random draws.
            stop_sequences: texts that end the answer; the one found stays part of it.
            temperature: divides the logits; 0 is greedy.
            top_k: draw among the k likeliest tokens.
            top_p: draw among the likeliest tokens whose probabilities add up to top_p.
            truncate: keep only this many tokens of the prompt, the last ones.
            typical_p: draw among the most typical tokens of this total probability.
            watermark: mark the text statistically.
            response_format: hold the text to JSON of a schema.
            decoder_input_details: also return the prompt's tokens and their log probabilities.
            return_k_alternatives: return this many of the likeliest tokens at each position.
            details: return the tokens and the facts about the answer in `Response.details`.
            messages: chat messages, each with `role` and `content`.
            input_ids: the prompt as token ids, used as they are.
            adapter_revision: branch, tag or commit of the adapter.
            frequency_penalty: -2 to 2; taken off a token's logit for each time the answer holds it.
            presence_penalty: -2 to 2; taken off the logit of every token the answer holds.
            min_new_tokens: tokens to generate before an end-of-sequence token counts.
            request_id: name of the request on the server, for `cancel`; None makes up a UUID.
            timeout: longest wait for the answer in seconds; None is the client's.
            total_timeout: longest time for the answer, with retries, in seconds; None is the client's.

        Raises:
            ValidationError: a field is wrong; UnsupportedError if the server cannot do what it asks.
            AdapterError: the adapter cannot be used; its subclasses say why.
            OverloadedError: the server takes no more requests now.
            RequestTimeoutError: no answer in time; the request was cancelled on the server.
            ServerConnectionError: the server cannot be reached.
            LoraxError: anything else.
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
        with self._open_stream(request, request_id, timeout, total_timeout) as stream:
            return stream.response()

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
    ) -> TokenStream:
        """Generate text and return its tokens as they come.

        Arguments are those of `generate`; `timeout` is the longest wait for the next token. The request is sent at
        once. The errors of `generate` are raised by the iteration, at any token; bad arguments already here.
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

    def cancel(self, request_id: str) -> bool:
        """End a request of any client's; its caller gets RequestCancelledError. False if the server has no such
        request (any more).

        Raises:
            LoraxError: the server could not be asked.
        """
        return bool(self._control("cancel", request_id=request_id).get("cancelled", False))

    def info(self) -> dict[str, Any]:
        """Facts about the server that do not change: model, dtype, limits, kernels in use.

        Raises:
            LoraxError: the server could not be asked.
        """
        return self._control("info")

    def stats(self) -> dict[str, Any]:
        """What the engine is doing now: requests, KV blocks, adapters, token counts.

        Raises:
            LoraxError: the server could not be asked.
        """
        return self._control("stats")

    def adapters(self) -> list[dict[str, Any]]:
        """The adapters the server knows: id, source, revision, status, rank, bytes and users of each.

        Raises:
            LoraxError: the server could not be asked.
        """
        return list(self._control("adapters").get("adapters", ()))

    def is_ready(self, timeout: float | None = None) -> bool:
        """True if the server answers within `timeout` seconds (None: the client's) that it serves the model."""
        return self._transport.is_ready(self.model_name, timeout or self.timeout or DEFAULT_TIMEOUT_S)

    def close(self) -> None:
        """Close the connection; streams that are still open are cancelled."""
        for thread in list(self._cancelling):
            thread.join()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_stream(
        self, request: Request, request_id: str | None, timeout: float | None, total_timeout: float | None
    ) -> TokenStream:
        encoded, decoder = self._encode(request, request_id)
        limits = self._limits(timeout, total_timeout)
        source = self._transport.open_stream(encoded, limits.total)
        on_abandon = (
            (lambda: self._cancel_in_background(encoded.request_id)) if self._cancels_by_control else None
        )
        return TokenStream(source, decoder, encoded.request_id, limits.next_response, on_abandon)

    def _control(self, command: str, **arguments: Any) -> dict[str, Any]:
        request = self._encode_control(command, arguments)
        source = self._transport.open_stream(request, self.total_timeout)
        try:
            return decode_control(source.receive(self.timeout), request.request_id)
        finally:
            finish(source)

    def _cancel_in_background(self, request_id: str) -> None:
        # Streams are given up in destructors too, which must not wait for a server.
        thread = threading.Thread(target=self._cancel_quietly, args=(request_id,), name="lorax-client-cancel")
        self._cancelling.add(thread)
        thread.start()

    def _cancel_quietly(self, request_id: str) -> None:
        request = self._encode_control("cancel", {"request_id": request_id})
        with contextlib.suppress(LoraxError, RuntimeError):
            source = self._transport.open_stream(request, CANCEL_TIMEOUT_S)
            try:
                source.receive(CANCEL_TIMEOUT_S)
            finally:
                finish(source)
        self._cancelling.discard(threading.current_thread())
