"""Pure translation between the public types and the tensors of the `lorax` model. No I/O.

`INPUTS` and `OUTPUTS` name every tensor this client sends and reads, with its Triton datatype; a contract test holds
them against the model's `config.pbtxt`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lorax_triton._transport import InferRequest, InferResponse, Tensor
from lorax_triton.errors import IncompleteGenerationError, LoraxError, ValidationError, error_from_grpc
from lorax_triton.types import (
    AlternativeToken,
    BestOfSequence,
    Details,
    FinishReason,
    InputToken,
    Parameters,
    Request,
    Response,
    ResponseFormat,
    StreamDetails,
    StreamResponse,
    Token,
)

INPUTS = {
    "text_input": "BYTES",
    "messages": "BYTES",
    "input_ids": "INT32",
    "stream": "BOOL",
    "exclude_input_in_output": "BOOL",
    "sampling_parameters": "BYTES",
    "adapter_id": "BYTES",
    "adapter_source": "BYTES",
    "api_token": "BYTES",
    "return_tokens": "BOOL",
    "return_details": "BOOL",
    "embedding_request": "BYTES",
    "control": "BYTES",
}
OUTPUTS = {"text_output": "BYTES", "tokens": "BYTES", "details": "BYTES", "embedding": "FP32"}

# These travel as tensors of their own, or only matter here.
_NOT_IN_JSON = {
    "adapter_id",
    "adapter_source",
    "adapter_revision",
    "api_token",
    "details",
    "return_full_text",
    "extra_parameters",
}
# Where the server's word for a parameter is another one.
_SERVER_NAMES = {"queue_timeout": "queue_timeout_s"}


def encode_request(request: Request, model_name: str, request_id: str) -> InferRequest:
    """The tensors of a generation request."""
    parameters = request.parameters or Parameters()
    values: dict[str, list[Any]] = {
        "stream": [request.stream],
        "exclude_input_in_output": [not parameters.return_full_text],
        "return_tokens": [request.stream or parameters.details],
        # They end the answer and hold its whole text, so they are asked for even if the caller is not shown them.
        "return_details": [True],
    }
    if request.inputs is not None:
        values["text_input"] = [request.inputs]
    elif request.messages is not None:
        values["messages"] = [json.dumps(list(request.messages), ensure_ascii=False)]
    elif request.input_ids is not None:
        values["input_ids"] = [int(token_id) for token_id in request.input_ids]
    return encode_values(values, parameters, model_name, request_id)


def encode_values(
    values: dict[str, list[Any]], parameters: Parameters, model_name: str, request_id: str
) -> InferRequest:
    """The tensors of a request: `values` by tensor name, and what `parameters` add to them."""
    if parameters.adapter_id:
        revision = f"@{parameters.adapter_revision}" if parameters.adapter_revision else ""
        values["adapter_id"] = [parameters.adapter_id + revision]
    for name in ("adapter_source", "api_token"):
        if getattr(parameters, name):
            values[name] = [getattr(parameters, name)]
    sampling = encode_sampling(parameters)
    if sampling:
        values["sampling_parameters"] = [_dump(sampling)]
    return _infer_request(values, model_name, request_id)


def encode_sampling(parameters: Parameters) -> dict[str, Any]:
    """The JSON object of `sampling_parameters`: only what differs from the default, so that a server is not asked
    for a feature that the caller does not use."""
    default = Parameters()
    sampling: dict[str, Any] = {}
    for name in vars(parameters):
        value = getattr(parameters, name)
        if name in _NOT_IN_JSON or value == getattr(default, name):
            continue
        if isinstance(value, ResponseFormat):
            value = {"type": value.type.value} | (
                {} if value.schema is None else {"schema": dict(value.schema)}
            )
        elif name == "merged_adapters":
            value = {key: item for key, item in asdict(value).items() if item is not None}
        elif name == "stop":
            value = list(value)
        sampling[_SERVER_NAMES.get(name, name)] = value
    return {**sampling, **(parameters.extra_parameters or {})}


def _dump(sampling: Mapping[str, Any]) -> str:
    try:
        return json.dumps(sampling, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValidationError(f"a parameter cannot be written as JSON: {error}") from None


def encode_control(
    command: str, arguments: Mapping[str, Any], model_name: str, request_id: str
) -> InferRequest:
    """The tensors of a control request."""
    text = json.dumps({"command": command, **arguments}, ensure_ascii=False)
    return _infer_request({"control": [text]}, model_name, request_id)


def _infer_request(values: Mapping[str, list[Any]], model_name: str, request_id: str) -> InferRequest:
    inputs = {name: Tensor(INPUTS[name], items) for name, items in values.items()}
    return InferRequest(model_name, request_id, inputs)


class ResponseDecoder:
    """Turns the responses to one request into tokens, one at a time fed in order.

    The answer is complete with the response that holds `details`. Triton's final mark may come with it or, through an
    ensemble, in an empty response after it.
    """

    def __init__(self, request: Request, request_id: str) -> None:
        self._wants_details = (request.parameters or Parameters()).details
        self._request_id = request_id
        self._text = ""
        self._shown = 0  # characters of the text that came with tokens
        self._tokens: list[Token] = []
        self._details: dict[str, Any] | None = None
        self.final = False  # True once the response came that Triton marked as the last

    @property
    def complete(self) -> bool:
        """True once the whole answer was fed."""
        return self._details is not None

    def feed(self, response: InferResponse | None) -> list[StreamResponse]:
        """Take one response, or None for the end of the stream; the tokens it brought.

        Raises:
            LoraxError: the server's error, or IncompleteGenerationError if the stream ended too early.
        """
        if response is None:
            raise self._incomplete("The stream ended before the answer did")
        self.final = response.final
        if response.error is not None:
            raise error_from_grpc(None, response.error, self._request_id)
        text = "".join(response.outputs.get("text_output", ()))
        self._text += text
        tokens = [decode_token(parse_object(item)) for item in response.outputs.get("tokens", ())]
        details = response.outputs.get("details")
        if details:
            self._details = parse_object(details[0])
        elif response.final:
            raise self._incomplete("The server ended the answer without its details")
        self._shown += sum(len(token.text) for token in tokens if not token.special)
        if not tokens and (details or len(self._text) > self._shown):
            tokens = [Token(-1, self._text[self._shown :])]
            self._shown = len(self._text)
        self._tokens += tokens
        items = [StreamResponse(token) for token in tokens]
        if self._details is not None:
            items[-1].generated_text = self.generated_text
            if self._wants_details:
                items[-1].details = decode_stream_details(self._details)
        return items

    @property
    def generated_text(self) -> str:
        """The whole text so far; once complete, the server's own account of it."""
        text = (self._details or {}).get("generated_text")
        return self._text if text is None else str(text)

    def response(self) -> Response:
        """The whole answer, for callers who did not stream."""
        if self._details is None:
            raise self._incomplete("The answer is not complete")
        tokens = [token for token in self._tokens if token.id >= 0]
        return Response(
            self.generated_text, decode_details(self._details, tokens) if self._wants_details else None
        )

    def _incomplete(self, message: str) -> LoraxError:
        error = IncompleteGenerationError(f"{message} (request {self._request_id})")
        error.request_id = self._request_id
        return error


def decode_control(response: InferResponse | None, request_id: str) -> dict[str, Any]:
    """The answer to a control request.

    Raises:
        LoraxError: the server's error, or IncompleteGenerationError if there was no answer.
    """
    if response is not None and response.error is not None:
        raise error_from_grpc(None, response.error, request_id)
    details = None if response is None else response.outputs.get("details")
    if not details:
        raise IncompleteGenerationError(f"No answer to control request {request_id}")
    return parse_object(details[0])


def decode_token(fields: Mapping[str, Any]) -> Token:
    """A token out of its JSON object."""
    alternatives = fields.get("alternative_tokens")
    return Token(
        id=int(fields["id"]),
        text=str(fields.get("text", "")),
        logprob=fields.get("logprob"),
        special=bool(fields.get("special", False)),
        alternative_tokens=None
        if alternatives is None
        else [
            AlternativeToken(int(item["id"]), str(item["text"]), item.get("logprob")) for item in alternatives
        ],
        skipped=bool(fields.get("skipped", False)),
    )


def decode_stream_details(fields: Mapping[str, Any]) -> StreamDetails:
    """The facts about a finished stream out of the server's JSON object."""
    return StreamDetails(**_common_details(fields))


def decode_details(fields: Mapping[str, Any], tokens: list[Token]) -> Details:
    """The facts about a finished answer; `tokens` came beside the JSON object."""
    others = fields.get("best_of_sequences")
    return Details(
        **_common_details(fields),
        prefill=_input_tokens(fields),
        tokens=tokens,
        best_of_sequences=None if others is None else [_best_of_sequence(item) for item in others],
        skipped_tokens=int(fields.get("skipped_tokens") or 0),
    )


def _common_details(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "finish_reason": FinishReason(fields["finish_reason"]),
        "prompt_tokens": int(fields.get("prompt_tokens") or 0),
        "generated_tokens": int(fields.get("generated_tokens") or 0),
        "seed": fields.get("seed"),
        "cached_tokens": int(fields.get("cached_tokens") or 0),
        "timings": dict(fields.get("timings") or {}),
    }


def _input_tokens(fields: Mapping[str, Any]) -> list[InputToken]:
    return [
        InputToken(int(item["id"]), str(item["text"]), item.get("logprob"))
        for item in fields.get("prefill") or ()
    ]


def _best_of_sequence(fields: Mapping[str, Any]) -> BestOfSequence:
    return BestOfSequence(
        generated_text=str(fields["generated_text"]),
        finish_reason=FinishReason(fields["finish_reason"]),
        generated_tokens=int(fields["generated_tokens"]),
        seed=fields.get("seed"),
        prefill=_input_tokens(fields),
        tokens=[decode_token(item) for item in fields.get("tokens") or ()],
    )


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that the server sent as text.

    Raises:
        IncompleteGenerationError: it is something else.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise IncompleteGenerationError(f"The server sent what is not JSON: {text[:200]!r}") from error
    if not isinstance(value, dict):
        raise IncompleteGenerationError(f"The server sent {text[:200]!r} where a JSON object belongs")
    return value
