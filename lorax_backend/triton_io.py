"""Between Triton's tensors and this project's types: requests in, events out, errors with the right code.

Written for tritonserver 24.10 and newer: what the caller gets is in tensors, because responses have had
parameters only since 25.02.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from lorax_backend.errors import LoraxError, ValidationError, error_from_dict
from lorax_backend.serving.given import RawRequest
from lorax_backend.tensors import BY_INPUT_NAME, OUTPUT_FLAGS, OUTPUTS, TensorSpec
from lorax_backend.types import GenerateRequest, GenerationEvent, Token

_log = logging.getLogger(__name__)

_LARGE = 32 << 10  # characters; small responses always find room in the megabyte a model starts with
_BYTES_OF_A_TOKEN = 128  # about what a token takes when everything about it is asked for
_FINAL: int = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_ALL_OUTPUTS = {spec.name for spec in OUTPUTS}
# Parameters that Triton itself puts beside a caller's own.
_SERVER_PARAMETERS = {"id", "sequence_id", "sequence_start", "sequence_end", "headers", "binary_data_output"}


def decode_request(request: Any) -> RawRequest:
    """Copy everything out of a Triton request.

    Raises:
        ValidationError: a tensor cannot be read; the message names it.
    """
    fields: dict[str, Any] = {}
    for tensor in request.inputs():
        spec = BY_INPUT_NAME.get(tensor.name())
        if spec is None:
            raise ValidationError(f"{tensor.name()}: not an input of this model; see its configuration")
        fields[spec.name] = _value(spec, tensor.as_numpy())
    for output in _outputs_asked_by_name(request):
        fields.setdefault(OUTPUT_FLAGS[output], True)
    return RawRequest(request.request_id(), fields, _parameters(request))


def _outputs_asked_by_name(request: Any) -> list[str]:
    """Outputs the caller listed. A list of all of them, which is also what no list at all becomes, asks for
    none: it would make every caller pay for log probabilities."""
    names = set(request.requested_output_names())
    return [] if names >= _ALL_OUTPUTS else [name for name in OUTPUT_FLAGS if name in names]


def _parameters(request: Any) -> dict[str, Any]:
    text = request.parameters()
    parameters: Mapping[str, Any] = json.loads(text) if isinstance(text, str) and text else {}
    own = {
        name: value
        for name, value in parameters.items()
        if name not in _SERVER_PARAMETERS and not name.startswith("triton_")
    }
    timeout_us = request.timeout() if hasattr(request, "timeout") else 0
    if timeout_us:  # Triton's own field: how long the caller lets the request wait in a queue
        own.setdefault("queue_timeout_s", timeout_us / 1e6)
    return own


def _value(spec: TensorSpec, array: np.ndarray[Any, Any]) -> Any:
    values = array.reshape(-1).tolist()
    if spec.datatype == "BYTES":
        values = [_text(spec.name, value) for value in values]
    if spec.is_list:
        return values
    if len(values) != 1:
        raise ValidationError(f"{spec.name}: expected one value in a tensor of shape [1], got {len(values)}")
    return values[0]


def _text(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise ValidationError(f"{name}: expected a BYTES tensor, got {type(value).__name__} values")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValidationError(
            f"{name}: not valid UTF-8 at byte {error.start}; encode the text as UTF-8"
        ) from None


def triton_error(error: LoraxError) -> Any:
    """The error as Triton carries it: our JSON as the message, and the nearest of Triton's codes."""
    code = getattr(pb_utils.TritonError, error.triton_code, pb_utils.TritonError.INTERNAL)
    return pb_utils.TritonError(error.to_json(), code)


def error_response(error: LoraxError) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=triton_error(error))


def encode_event(event: GenerationEvent, request: GenerateRequest | None) -> Any:
    """The response for one event: text_output, and of the other outputs those the caller asked for."""
    if event.error is not None:
        return error_response(error_from_dict(event.error))
    tensors = [_strings("text_output", [event.text])]
    if request is not None:
        tensors.extend(_optional_outputs(event, request))
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _optional_outputs(event: GenerationEvent, request: GenerateRequest) -> list[Any]:
    asked, tokens = request.outputs, event.tokens
    tensors = []
    if asked.token_ids:
        tensors.append(pb_utils.Tensor("token_ids", np.array([token.id for token in tokens], np.int32)))
    if asked.tokens:
        tensors.append(_strings("tokens", [json.dumps(_token_json(token)) for token in tokens]))
    if asked.logprobs:
        tensors.append(_strings("logprobs", [json.dumps([_logprob_json(token) for token in tokens])]))
    if asked.cumulative_logprob and event.cumulative_logprob is not None:
        tensors.append(
            pb_utils.Tensor("cumulative_logprob", np.array([event.cumulative_logprob], np.float32))
        )
    if asked.num_input_tokens and event.prompt_tokens:
        tensors.append(pb_utils.Tensor("num_input_tokens", np.array([event.prompt_tokens], np.uint32)))
    if asked.num_output_tokens:
        tensors.append(pb_utils.Tensor("num_output_tokens", np.array([len(tokens)], np.uint32)))
    if event.finish_reason is not None:
        if asked.finish_reason:
            tensors.append(_strings("finish_reason", [event.finish_reason.value]))
        if asked.details:
            tensors.append(_strings("details", [json.dumps(_details_json(event, request))]))
    if request.n > 1:
        tensors.append(pb_utils.Tensor("sequence_index", np.array([event.index], np.int32)))
    return tensors


def _strings(name: str, texts: list[str]) -> Any:
    array = np.empty(len(texts), dtype=np.object_)
    array[:] = [text.encode("utf-8", errors="replace") for text in texts]
    return pb_utils.Tensor(name, array)


def _token_json(token: Token) -> dict[str, Any]:
    """A token as LoRAX's API shows it."""
    shown: dict[str, Any] = {
        "id": token.id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special,
        "skipped": False,
    }
    if token.top_logprobs:
        shown["alternative_tokens"] = [
            {"id": token_id, "text": text, "logprob": logprob}
            for token_id, text, logprob in token.top_logprobs
        ]
    return shown


def _logprob_json(token: Token) -> dict[str, dict[str, Any]]:
    """A token and its alternatives as NVIDIA's vLLM backend shows them: id -> logprob, rank,
    decoded_token."""
    best = token.top_logprobs or ()
    ranks = {token_id: rank for rank, (token_id, _, _) in enumerate(best, start=1)}
    chosen = {"logprob": token.logprob, "rank": ranks.get(token.id), "decoded_token": token.text}
    shown: dict[str, dict[str, Any]] = {str(token.id): chosen}
    for token_id, text, logprob in best:
        entry = {"logprob": logprob, "rank": ranks[token_id], "decoded_token": text}
        shown.setdefault(str(token_id), entry)
    return shown


def _details_json(event: GenerationEvent, request: GenerateRequest) -> dict[str, Any]:
    assert event.finish_reason is not None
    details: dict[str, Any] = {
        "finish_reason": event.finish_reason.value,
        "prompt_tokens": event.prompt_tokens,
        "cached_tokens": event.cached_tokens,
        "generated_tokens": event.generated_tokens,
        "skipped_tokens": 0,
        "seed": event.seed,
        "generated_text": event.generated_text,
        "cumulative_logprob": event.cumulative_logprob,
        "timings": event.timings,
    }
    if request.adapter is not None:
        ref = request.adapter
        details |= {"adapter_id": ref.id, "adapter_source": ref.source, "adapter_revision": ref.revision}
    if request.n > 1:
        details["index"] = event.index
    if event.prefill is not None:
        details["prefill"] = _prefill_json(event)
    if event.best_of_sequences is not None:
        details["best_of_sequences"] = [_sequence_json(other, request) for other in event.best_of_sequences]
    return details


def _prefill_json(event: GenerationEvent) -> list[dict[str, Any]]:
    return [{"id": token.id, "text": token.text, "logprob": token.logprob} for token in event.prefill or ()]


def _sequence_json(event: GenerationEvent, request: GenerateRequest) -> dict[str, Any]:
    """An answer of best_of that was not picked, as LoRAX's API shows it."""
    assert event.finish_reason is not None
    return {
        "generated_text": event.generated_text,
        "finish_reason": event.finish_reason.value,
        "generated_tokens": event.generated_tokens,
        "seed": event.seed,
        "cumulative_logprob": event.cumulative_logprob,
        "prefill": _prefill_json(event),
        "tokens": [_token_json(token) for token in event.tokens] if request.outputs.tokens else [],
    }


def _size(event: GenerationEvent) -> int:
    """About how many bytes an event takes."""
    tokens = len(event.tokens) + len(event.prefill or ())
    others = sum(_size(other) for other in event.best_of_sequences or ())
    return len(event.text) + _BYTES_OF_A_TOKEN * tokens + others


class TritonChannel:
    """The way back to one caller; implements the service's ResponseChannel.

    Sends the final flag exactly once, with the last response. Keeps the response sender only, so that the request's
    tensors are freed while it runs. A response that cannot be sent (shared memory is full) raises; the service then
    ends the request, and the error it sends is small enough to find room.
    """

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self._lock = threading.Lock()
        self._closed = False

    def send(self, event: GenerationEvent, request: GenerateRequest | None) -> None:
        """Send one event; the one that ends the request closes the channel, and what comes after it is dropped.

        Raises:
            TritonModelException: the response could not be handed to the server.
        """
        large = _size(event) > _LARGE
        self._send(lambda: encode_event(event, request), event.final, large)

    def send_error(self, error: LoraxError) -> None:
        """End the request with an error. Never raises."""
        self._end(lambda: error_response(error))

    def send_details(self, answer: Mapping[str, Any]) -> None:
        """End the request with the answer to a control command. Never raises."""
        text = json.dumps(answer)
        self._end(lambda: pb_utils.InferenceResponse([_strings("details", [text])]), len(text) > _LARGE)

    def is_cancelled(self) -> bool:
        """True if nobody waits for further responses. A round trip to the server."""
        # Never beside or after the final flag: the server has freed what the question is about by then, and asking
        # would bring down the whole server.
        with self._lock:
            return not self._closed and bool(self._sender.is_cancelled())

    def _end(self, make: Callable[[], Any], large: bool = False) -> None:
        try:
            self._send(make, True, large)
        except Exception:
            _log.exception("a caller could not be answered")

    def _send(self, make: Callable[[], Any], final: bool, large: bool) -> None:
        with self._lock:
            if self._closed:
                return
            response = make()
            # A sender counts as closed from the moment it is asked to send the final flag, even if there is no room
            # for the response that goes with it, and could then never tell its caller. So a large one goes alone.
            if large or not final:
                self._sender.send(response)
                response = None
            if final:
                self._closed = True
                self._sender.send(response, flags=_FINAL)
