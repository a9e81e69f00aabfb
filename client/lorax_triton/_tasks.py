"""Requests for embeddings and classes instead of text, and their answers. Pure translation, no I/O."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorax_triton._requests import MergedAdapters, Parameters
from lorax_triton._transport import InferRequest, InferResponse
from lorax_triton._wire import encode_values, parse_object
from lorax_triton.errors import IncompleteGenerationError, ValidationError, error_from_grpc
from lorax_triton.types import ClassifyResponse, EmbedResponse


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Texts for one task, "embed" or "classify", and the adapter to use.

    Raises:
        ValidationError: there is no text, or one is empty.
    """

    task: str
    inputs: Sequence[str]
    adapter_id: str | None = None
    adapter_source: str | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.inputs or not all(isinstance(text, str) and text for text in self.inputs):
            raise ValidationError("`inputs` must be a non-empty text, or a list of non-empty texts")


def encode_task(request: TaskRequest, bearer: str | None, model_name: str, request_id: str) -> InferRequest:
    """The tensors of a request; `bearer` stands in for a missing `api_token`."""
    parameters = Parameters(
        adapter_id=request.adapter_id,
        adapter_source=request.adapter_source,
        merged_adapters=request.merged_adapters,
        api_token=request.api_token or bearer,
    )
    body = json.dumps({"task": request.task, "input": list(request.inputs)}, ensure_ascii=False)
    values: dict[str, list[Any]] = {"embedding_request": [body], "return_details": [True]}
    return encode_values(values, parameters, model_name, request_id)


def decode_embeddings(
    response: InferResponse | None, request_id: str, request: TaskRequest
) -> list[EmbedResponse]:
    """One embedding for each text: the rows of the `embedding` tensor, which come one after another.

    Raises:
        LoraxError: the server's error, or IncompleteGenerationError if it sent no embedding.
    """
    outputs = _outputs(response, request_id)
    values, count = outputs.get("embedding"), len(request.inputs)
    if not values or len(values) % count:
        raise IncompleteGenerationError(f"No embeddings for {count} texts in answer to request {request_id}")
    width = len(values) // count
    return [EmbedResponse(values[start : start + width]) for start in range(0, len(values), width)]


def decode_classes(
    response: InferResponse | None, request_id: str, request: TaskRequest
) -> list[ClassifyResponse]:
    """The entities of each text: the lists in `entities` of the details.

    Raises:
        LoraxError: the server's error, or IncompleteGenerationError if it sent no entities.
    """
    details = _outputs(response, request_id).get("details")
    entities = parse_object(details[0]).get("entities") if details else None
    if not isinstance(entities, list) or len(entities) != len(request.inputs):
        raise IncompleteGenerationError(
            f"No entities for {len(request.inputs)} texts in answer to request {request_id}"
        )
    return [ClassifyResponse([dict(item) for item in found]) for found in entities]


def _outputs(response: InferResponse | None, request_id: str) -> Any:
    if response is None:
        raise IncompleteGenerationError(f"No answer to request {request_id}")
    if response.error is not None:
        raise error_from_grpc(None, response.error, request_id)
    return response.outputs
