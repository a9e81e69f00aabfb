"""The blocking client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack, overload

from lorax_triton._base import DEFAULT_TIMEOUT_S
from lorax_triton._channel import Tls
from lorax_triton._grpc import GrpcTransport
from lorax_triton._options import AdapterOptions, Options, make_request
from lorax_triton._progress import ProgressCallback
from lorax_triton._session import Session
from lorax_triton._stream import TokenStream
from lorax_triton._tasks import TaskRequest, decode_classes, decode_embeddings
from lorax_triton._transport import Transport
from lorax_triton.adapters import Adapters
from lorax_triton.batch import BatchOptions, Prompt, make_items, run_batch
from lorax_triton.errors import LoraxError
from lorax_triton.metrics import fetch_metrics
from lorax_triton.types import ClassifyResponse, EmbedResponse, MergedAdapters, Response, ResponseFormat


class Client(Session):
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
        admin_key: str | None = None,
        metrics_url: str | None = None,
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
            admin_key: key for the commands of `adapters` that change something; None takes the environment variable
                LORAX_ADMIN_KEY.
            metrics_url: where `metrics` finds Triton's metrics; None is port 8002 of the same host.

        Raises:
            ValueError: the address or a time limit makes no sense.
        """
        super().__init__(base_url, headers, cookies, timeout, model_name, total_timeout)
        self._administer(admin_key, metrics_url)
        config = self._channel_config(tls, connect_timeout, max_session_retries)
        self._transport = GrpcTransport(config) if session is None else session
        self._cancelling = set()
        self.adapters = Adapters(self._control)

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
        **options: Unpack[Options],
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
            options: beyond LoRAX's, all by keyword:
                `messages` (chat, a list of `role` and `content`) or `input_ids` (token ids) instead of `prompt`;
                `request_id` (name of the request on the server, for `cancel`; a UUID unless given), `timeout` (longest
                wait for the answer in seconds; else the client's), `total_timeout` (longest time with retries);
                `adapter_revision` (branch, tag or commit), `frequency_penalty` and `presence_penalty` (-2 to 2),
                `min_new_tokens`, `priority`, `queue_timeout` (longest wait in the server's queue in seconds),
                `apply_chat_template`, `json_schema` (a schema instead of `response_format`) and `extra_parameters`
                (sent as they are), all as in `Parameters`.

        Raises:
            ValidationError: a field is wrong; UnsupportedError if the server cannot do what it asks.
            AdapterError: the adapter cannot be used; its subclasses say why.
            OverloadedError: the server takes no more requests now.
            RequestTimeoutError: no answer in time; the request was cancelled on the server.
            ServerConnectionError: the server cannot be reached.
            LoraxError: anything else.
        """
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
        with self._open_stream(request, call) as stream:
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
        **options: Unpack[Options],
    ) -> TokenStream:
        """Generate text and return its tokens as they come.

        Arguments are those of `generate`; `timeout` is the longest wait for the next token. The request is sent at
        once. The errors of `generate` are raised by the iteration, at any token; bad arguments already here.
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
    def embed(self, inputs: str, **options: Unpack[AdapterOptions]) -> EmbedResponse: ...  # type: ignore[overload-overlap]

    @overload
    def embed(self, inputs: Sequence[str], **options: Unpack[AdapterOptions]) -> list[EmbedResponse]: ...

    def embed(
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
        found = decode_embeddings(*self._task(request), request)
        return found[0] if isinstance(inputs, str) else found

    def classify(self, inputs: str, **options: Unpack[AdapterOptions]) -> ClassifyResponse:
        """The entities in a text. Arguments and errors are those of `embed`."""
        return (self.classify_batch([inputs], **options))[0]

    def classify_batch(
        self, inputs: Sequence[str], **options: Unpack[AdapterOptions]
    ) -> list[ClassifyResponse]:
        """The entities in each of several texts. Arguments and errors are those of `embed`."""
        request = TaskRequest("classify", list(inputs), **options)
        return decode_classes(*self._task(request), request)

    def generate_batch(
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
        return run_batch(self._open_stream, items, options)

    def cancel(self, request_id: str) -> bool:
        """End a request of any client's; its caller gets RequestCancelledError. False if the server has no such
        request (any more).

        Raises:
            LoraxError: the server could not be asked.
        """
        return bool(self._control("cancel", {"request_id": request_id}).get("cancelled", False))

    def info(self) -> dict[str, Any]:
        """Facts about the server that do not change: model, dtype, limits, kernels in use.

        Raises:
            LoraxError: the server could not be asked.
        """
        return self._control("info", {})

    def stats(self) -> dict[str, Any]:
        """What the engine is doing now: requests, KV blocks, adapters, token counts.

        Raises:
            LoraxError: the server could not be asked.
        """
        return self._control("stats", {})

    def tokenize(self, inputs: str, add_special_tokens: bool = True) -> list[dict[str, Any]]:
        """The tokens of a text: `id`, `text`, and its place in the text as `start` and `stop` in characters.

        Raises:
            LoraxError: the server could not be asked, or cannot tell.
        """
        arguments = {"inputs": inputs, "add_special_tokens": add_special_tokens}
        return list((self._control("tokenize", arguments)).get("tokens", ()))

    def metrics(self, format: str = "prometheus") -> str | dict[str, Any]:
        """The server's metrics, from Triton's metrics port.

        Args:
            format: "prometheus" for Prometheus' text, "json" for an object of metric families; see
                `lorax_triton.metrics.parse_prometheus`.

        Raises:
            ValidationError: there is no such format.
            ServerConnectionError: nothing answers at the client's `metrics_url`.
            LoraxError: the answer is an error, or no metrics.
        """
        return fetch_metrics(self.metrics_url, format, self.timeout)

    def is_ready(self, timeout: float | None = None) -> bool:
        """True if the server answers within `timeout` seconds (None: the client's) that it serves the model."""
        return self._is_ready(timeout)

    def close(self) -> None:
        """Close the connection; streams that are still open are cancelled."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
