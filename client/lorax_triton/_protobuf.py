"""Pure translation between the transport's messages and KServe v2 protobufs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from lorax_triton._transport import InferRequest, InferResponse
from lorax_triton.errors import LoraxError, ValidationError

# Little-endian, as the protocol demands, whatever the machine's order.
_NUMPY_TYPES = {
    "BOOL": "?",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}

_FINAL = "triton_final_response"
_ASK_FOR_EMPTY_FINAL = "triton_enable_empty_final_response"


def encode_infer_request(request: InferRequest) -> Any:
    """The `ModelInferRequest` of a request; tensors travel as raw bytes.

    Raises:
        ValidationError: a value does not fit its tensor's datatype.
    """
    message = service_pb2.ModelInferRequest(model_name=request.model_name, id=request.request_id)
    # An ensemble may mark the end in an empty response of its own.
    message.parameters[_ASK_FOR_EMPTY_FINAL].bool_param = True
    for name, tensor in request.inputs.items():
        message.inputs.add(name=name, datatype=tensor.datatype, shape=[len(tensor.values)])
        try:
            message.raw_input_contents.append(pack(tensor.datatype, tensor.values))
        except (OverflowError, TypeError, ValueError, AttributeError) as error:
            raise ValidationError(f"`{name}` cannot be sent as {tensor.datatype}: {error}") from error
    return message


def decode_stream_response(message: Any) -> InferResponse:
    """The transport's view of a `ModelStreamInferResponse`.

    Raises:
        LoraxError: the message breaks the protocol.
    """
    response = message.infer_response
    final = is_final(message)
    if message.error_message:
        return InferResponse(final=final, error=message.error_message)
    try:
        contents = zip(response.outputs, response.raw_output_contents, strict=True)
        outputs = {output.name: unpack(output.datatype, raw) for output, raw in contents}
    except ValueError as error:
        raise LoraxError(f"The server sent tensors that cannot be read: {error}") from error
    return InferResponse(outputs, final)


def is_final(message: Any) -> bool:
    """True if Triton marked a `ModelStreamInferResponse` as its request's last."""
    parameters = message.infer_response.parameters
    return bool(parameters[_FINAL].bool_param) if _FINAL in parameters else False


def pack(datatype: str, values: Sequence[Any]) -> bytes:
    """The raw bytes of a tensor. BYTES: each string's UTF-8 after its length as a little-endian uint32."""
    if datatype == "BYTES":
        texts = [value.encode() for value in values]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    dtype = np.dtype(_numpy_type(datatype))
    if dtype.kind in "iu":
        # Not every numpy version refuses an integer that is too large; some wrap it around.
        bounds = np.iinfo(dtype)
        for value in values:
            if not bounds.min <= value <= bounds.max:
                raise OverflowError(f"{value} is not within {bounds.min} and {bounds.max}")
    return np.array(values, dtype=dtype).tobytes()


def unpack(datatype: str, raw: bytes) -> list[Any]:
    """The values of a tensor's raw bytes; strings that are not UTF-8 get replacement characters."""
    if datatype != "BYTES":
        values: list[Any] = np.frombuffer(raw, dtype=_numpy_type(datatype)).tolist()
        return values
    texts = []
    start = 0
    while start < len(raw):
        if start + 4 > len(raw):
            raise ValueError("a BYTES tensor ends within a length")
        (length,) = struct.unpack_from("<I", raw, start)
        start += 4
        if start + length > len(raw):
            raise ValueError("a BYTES tensor ends within a string")
        texts.append(raw[start : start + length].decode(errors="replace"))
        start += length
    return texts


def _numpy_type(datatype: str) -> str:
    try:
        return _NUMPY_TYPES[datatype]
    except KeyError:
        raise ValueError(f"tensors of type {datatype} are not understood") from None
