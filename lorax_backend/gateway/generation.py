"""Between LoRAX's generate bodies and the tensors of the `lorax` model. Pure translation, no I/O."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorax_backend.gateway.errors import HttpError
from lorax_backend.serving.schema import BY_NAME
from lorax_triton._transport import InferRequest, InferResponse, Tensor
from lorax_triton.errors import IncompleteGenerationError

_MODEL = "lorax"
# These travel as tensors of their own, or are decided by the route.
_NOT_IN_JSON = frozenset(
    {"adapter_id", "adapter_source", "api_token", "details", "stream", "inputs", "text_input", "prompt", "messages",
     "input_ids", "prompt_token_ids", "return_tokens", "return_details", "streaming"}
)  # fmt: skip
# Several answers to one request have no place in LoRAX's bodies.
_NOT_HERE = frozenset({"n", "num_return_sequences", "beam_width"})
_DETAILS = ("finish_reason", "prompt_tokens", "generated_tokens", "skipped_tokens", "seed")
# Proxies take 4 to 8 KiB for all headers of an answer.
_MAX_HEADER_CHARACTERS = 500
_STREAM_DETAILS = ("finish_reason", "prompt_tokens", "generated_tokens", "seed")


@dataclass(frozen=True, slots=True)
class Generation:
    """One request to generate. `parameters` are the body's, of which nulls ask for nothing."""

    inputs: str
    parameters: Mapping[str, Any]
    stream: bool
    request_id: str
    api_token: str | None = field(default=None, repr=False)

    @property
    def wants_details(self) -> bool:
        return bool(self.parameters.get("details") or self.parameters.get("decoder_input_details"))

    @property
    def adapter_id(self) -> str | None:
        return self.parameters.get("adapter_id") or None

    @property
    def adapter_key(self) -> str | None:
        """What decides the server: the adapter, or the set that is merged; None for the base model."""
        if self.adapter_id:
            return f"{self.parameters.get('adapter_source') or ''}:{self.adapter_id}"
        merged = self.parameters.get("merged_adapters")
        return json.dumps(merged, sort_keys=True) if merged else None

    @property
    def ignored(self) -> list[str]:
        """Parameters that no version of the engine knows; LoRAX ignores such, and so do we, but say so."""
        return sorted(
            name
            for name in self.parameters
            if name in _NOT_HERE or (name not in BY_NAME and name not in _NOT_IN_JSON)
        )

    def check(self) -> None:
        """Refuse what this gateway can see is wrong.

        Raises:
            HttpError: 422.
        """
        if not self.inputs:
            raise HttpError(422, "validation", "inputs: must not be empty")
        if self.stream and self.parameters.get("decoder_input_details"):
            raise HttpError(
                422, "validation", "decoder_input_details: not available in streams; use /generate"
            )
        best_of = self.parameters.get("best_of")
        if self.stream and isinstance(best_of, int) and best_of > 1:
            raise HttpError(
                422, "validation", f"best_of: {best_of} is not available in streams; use /generate"
            )

    def encode(self) -> InferRequest:
        """The tensors of the request."""
        values: dict[str, Tensor] = {
            "text_input": _text(self.inputs),
            "stream": Tensor("BOOL", [self.stream]),
            "return_tokens": Tensor("BOOL", [self.stream or self.wants_details]),
            "return_details": Tensor("BOOL", [True]),
        }
        for name in ("adapter_id", "adapter_source"):
            value = self.parameters.get(name)
            if value:
                values[name] = _text(value)
        token = self.parameters.get("api_token") or self.api_token
        if token:
            values["api_token"] = _text(token)
        sampling = {
            name: value
            for name, value in self.parameters.items()
            if value is not None and name in BY_NAME and name not in _NOT_IN_JSON | _NOT_HERE
        }
        if sampling:
            values["sampling_parameters"] = _text(json.dumps(sampling))
        return InferRequest(_MODEL, self.request_id, values)


def _text(value: str) -> Tensor:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise HttpError(
            422, "validation", "the body holds a lone surrogate, which is no Unicode text"
        ) from None
    return Tensor("BYTES", [value])


class Collector:
    """Puts the responses to one request together."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._texts: list[str] = []
        self.details: dict[str, Any] | None = None
        self._tokens: list[str] = []

    def feed(self, response: InferResponse) -> list[str]:
        """Take one response; the JSON texts of the tokens it brought."""
        outputs = response.outputs
        tokens = outputs.get("tokens") or []
        self._texts += outputs.get("text_output") or []
        if not self._generation.stream:
            self._tokens += tokens
        details = outputs.get("details")
        if details:
            self.details = json.loads(details[0])
        return list(tokens)

    def finished(self) -> dict[str, Any]:
        """The server's details.

        Raises:
            IncompleteGenerationError: they never came.
        """
        if self.details is None:
            raise IncompleteGenerationError("the stream ended before the answer did")
        return self.details

    @property
    def generated_text(self) -> str:
        text = (self.details or {}).get("generated_text")
        return "".join(self._texts) if text is None else str(text)

    def response(self) -> dict[str, Any]:
        """GenerateResponse."""
        details = self.finished()
        answer: dict[str, Any] = {"generated_text": self.generated_text}
        if self._generation.wants_details:
            answer["details"] = {name: details.get(name) for name in _DETAILS} | {
                "skipped_tokens": details.get("skipped_tokens") or 0,
                "prefill": details.get("prefill") or [],
                "tokens": [json.loads(token) for token in self._tokens],
            }
            if details.get("best_of_sequences"):
                answer["details"]["best_of_sequences"] = details["best_of_sequences"]
        return answer

    def stream_events(self, tokens: list[str]) -> bytes:
        """Events for tokens; the last also ends the answer once its details are here."""
        if self.details is None:
            return b"".join(
                f'data:{{"token":{token},"generated_text":null,"details":null}}\n\n'.encode()
                for token in tokens
            )
        last = tokens[-1] if tokens else '{"id":-1,"text":"","logprob":null,"special":true,"skipped":false}'
        events = [
            f'data:{{"token":{token},"generated_text":null,"details":null}}\n\n'.encode()
            for token in tokens[:-1]
        ]
        shown = (
            {name: self.details.get(name) for name in _STREAM_DETAILS}
            if self._generation.wants_details
            else None
        )
        text, details = json.dumps(self.generated_text), json.dumps(shown)
        events.append(f'data:{{"token":{last},"generated_text":{text},"details":{details}}}\n\n'.encode())
        return b"".join(events)


def model_headers(generation: Generation, info: Mapping[str, Any]) -> dict[str, str]:
    """Headers known before the first token: who answers, and with which adapter."""
    device = str(info.get("device", ""))
    headers = {
        "x-compute-type": "gpu+optimized" if device.startswith("cuda") else device or "unknown",
        "x-compute-characters": str(len(generation.inputs)),
        "x-model-id": _header_value(str(info.get("model_id", ""))),
    }
    merged = generation.parameters.get("merged_adapters")
    adapters = generation.adapter_id or ",".join((merged or {}).get("ids") or [])
    if adapters:
        headers["x-adapter-id"] = _header_value(adapters)
        source = generation.parameters.get("adapter_source") or info.get("default_adapter_source") or "hub"
        headers["x-adapter-source"] = _header_value(str(source))
    ignored = generation.ignored
    if ignored:
        headers["x-ignored-parameters"] = _header_value(", ".join(ignored))
    return headers


def timing_headers(details: Mapping[str, Any], total_s: float) -> dict[str, str]:
    """LoRAX's timing headers of a whole answer, in milliseconds; `total_s` is what the gateway measured."""
    timings: Mapping[str, float] = details.get("timings") or {}
    prompt, generated = int(details.get("prompt_tokens") or 0), int(details.get("generated_tokens") or 0)
    inference, first = timings.get("inference", 0.0), timings.get("first_token", 0.0)
    decode = max(0.0, timings.get("total", 0.0) - first)
    seconds = {
        "x-compute-time": total_s,
        "x-total-time": total_s,
        "x-validation-time": timings.get("validation", 0.0),
        "x-queue-time": timings.get("queue", 0.0),
        "x-inference-time": inference,
        "x-time-per-token": inference / max(1, generated),
        "x-time-to-first-token": first,
        "x-time-per-output-token": decode / max(1, generated - 1),
    }
    return {
        "x-prompt-tokens": str(prompt),
        "x-generated-tokens": str(generated),
        "x-skipped-tokens": str(int(details.get("skipped_tokens") or 0)),
        "x-total-tokens": str(prompt + generated),
        **{name: str(math.floor(1000 * value)) for name, value in seconds.items()},
    }


def _header_value(text: str) -> str:
    """A text that a header can hold, cut to a length that clients and proxies read."""
    return "".join(char if " " <= char <= "~" else "?" for char in text[:_MAX_HEADER_CHARACTERS])
