"""The backend over a client's connection to tritonserver."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from lorax_triton._stream import finish_async
from lorax_triton._transport import InferRequest, InferResponse, Tensor
from lorax_triton._wire import INPUTS
from lorax_triton.aio import AsyncClient
from lorax_triton.errors import IncompleteGenerationError, error_from_grpc
from lorax_triton.openai_api.backend import Call, Piece

# The model's name and limits change only when the server is started anew.
INFO_TTL_S = 15.0


class ClientBackend:
    """Runs calls over an `AsyncClient`, whose time limits hold: `timeout` for each response, `total_timeout` for the
    whole answer. Belongs to the client's event loop; closing the client is its owner's business."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._info: Mapping[str, Any] | None = None
        self._info_at = 0.0

    async def generate(self, call: Call) -> AsyncGenerator[Piece, None]:
        """See `Backend.generate`."""
        client = self._client
        request = encode_call(call, client.model_name)
        source = client._transport.open_stream(request, client.total_timeout)
        complete = False
        try:
            while not complete:
                piece = decode_piece(await source.receive(client.timeout), call.request_id)
                complete = piece.details is not None
                if complete:
                    await finish_async(source)
                yield piece
        finally:
            source.cancel()
            if not complete and client._cancels_by_control:
                client._start_cancelling(call.request_id)

    async def info(self) -> Mapping[str, Any]:
        """See `Backend.info`; asked anew after a few seconds."""
        if self._info is None or time.monotonic() - self._info_at > INFO_TTL_S:
            self._info = await self._client.info()
            self._info_at = time.monotonic()
        return self._info

    async def adapters(self) -> Sequence[Mapping[str, Any]]:
        """See `Backend.adapters`."""
        return await self._client.adapters()

    async def aliases(self) -> Mapping[str, Any]:
        """See `Backend.aliases`."""
        return await self._client.adapters.aliases()


def encode_call(call: Call, model_name: str) -> InferRequest:
    """The tensors of a call."""
    values: dict[str, list[Any]] = {
        "stream": [call.stream],
        "exclude_input_in_output": [not call.echo],
        "return_tokens": [call.return_tokens],
        "return_details": [True],
        "sampling_parameters": [json.dumps(call.sampling, ensure_ascii=False)],
    }
    if call.prompt is not None:
        values["text_input"] = [call.prompt]
    elif call.messages is not None:
        values["messages"] = [json.dumps(list(call.messages), ensure_ascii=False)]
    elif call.input_ids is not None:
        values["input_ids"] = list(call.input_ids)
    for name in ("adapter_id", "adapter_source", "api_token"):
        if getattr(call, name):
            values[name] = [getattr(call, name)]
    return InferRequest(
        model_name,
        call.request_id,
        {name: Tensor(INPUTS[name], items) for name, items in values.items()},
    )


def decode_piece(response: InferResponse | None, request_id: str) -> Piece:
    """What one response brought.

    Raises:
        LoraxError: the server's error, or IncompleteGenerationError if the stream ended too early.
    """
    if response is not None and response.error is not None:
        raise error_from_grpc(None, response.error, request_id)
    details = None if response is None else response.outputs.get("details")
    if response is None or (response.final and not details):
        error = IncompleteGenerationError(f"The stream ended before the answer did (request {request_id})")
        error.request_id = request_id
        raise error
    try:
        return Piece(
            "".join(response.outputs.get("text_output", ())),
            [json.loads(item) for item in response.outputs.get("tokens", ())],
            json.loads(details[0]) if details else None,
        )
    except ValueError as error:
        raise IncompleteGenerationError(f"The server sent what is not JSON: {error}") from error
