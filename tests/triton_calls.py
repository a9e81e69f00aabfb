"""Calls to a real tritonserver over gRPC's own stubs and over HTTP, with every option in the test's hands."""

from __future__ import annotations

import json
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from lorax_backend.tensors import BY_INPUT_NAME, OUTPUTS

TIMEOUT_S = 60.0
_DTYPES = {"BOOL": np.bool_, "INT32": np.int32, "UINT32": np.uint32, "UINT64": np.uint64, "FP32": np.float32}
_OUTPUT_TYPES = {spec.name: spec.datatype for spec in OUTPUTS}


@dataclass
class Response:
    """One message of a stream."""

    outputs: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    final: bool = False
    request_id: str = ""


@dataclass
class Answer:
    """All messages of a request, put together."""

    responses: list[Response]

    @property
    def text(self) -> str:
        return "".join(text for part in self.responses for text in part.outputs.get("text_output", []))

    @property
    def token_ids(self) -> list[int]:
        return [token for part in self.responses for token in part.outputs.get("token_ids", [])]

    @property
    def error(self) -> dict[str, Any] | None:
        """The error as this project writes it, wherever in Triton's own words it stands."""
        for part in self.responses:
            if part.error is not None:
                start, end = part.error.find("{"), part.error.rfind("}")
                return json.loads(part.error[start : end + 1]) if start >= 0 else {"error": part.error}
        return None

    @property
    def details(self) -> dict[str, Any]:
        return json.loads(self.last("details")[0])

    def last(self, output: str) -> list[Any]:
        return next(part.outputs[output] for part in reversed(self.responses) if output in part.outputs)


class Stream:
    """A running request."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[Response]:
        for message in self._call:
            yield _decode(message)

    def first_text(self) -> Response:
        """Wait for the first response."""
        return next(iter(self))

    def rest(self) -> Answer:
        return Answer(list(self))

    def cancel(self) -> None:
        self._call.cancel()


class TritonCaller:
    """Starts any number of requests on one channel."""

    def __init__(self, address: str) -> None:
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(address, options=unlimited)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def stream(
        self,
        inputs: Mapping[str, Any],
        parameters: Mapping[str, Any] | None = None,
        model: str = "lorax",
        request_id: str = "",
        outputs: tuple[str, ...] = (),
        timeout: float = TIMEOUT_S,
    ) -> Stream:
        """Start a request. `inputs` are plain values by tensor name; bytes are sent as they are."""
        message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
        for name, value in inputs.items():
            _add_input(message, name, value)
        for name, value in (parameters or {}).items():
            _set_parameter(message.parameters[name], value)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        for name in outputs:
            message.outputs.add().name = name
        return Stream(self._stub.ModelStreamInfer(iter([message]), timeout=timeout))

    def generate(self, inputs: Mapping[str, Any], **options: Any) -> Answer:
        """Run a request to its end."""
        return self.stream(inputs, **options).rest()

    def control(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Run a control command and return its answer."""
        answer = self.generate({"control": json.dumps({"command": command, **arguments})})
        assert answer.error is None, answer.error
        return answer.details


def _add_input(message: Any, name: str, value: Any) -> None:
    spec = BY_INPUT_NAME[name]
    values = value if isinstance(value, list) else [value]
    tensor = message.inputs.add()
    tensor.name, tensor.datatype = name, spec.datatype
    tensor.shape.append(len(values))
    if spec.datatype == "BYTES":
        encoded = [item if isinstance(item, bytes) else str(item).encode() for item in values]
        message.raw_input_contents.append(b"".join(struct.pack("<I", len(item)) + item for item in encoded))
    else:
        message.raw_input_contents.append(np.array(values, _DTYPES[spec.datatype]).tobytes())


def _set_parameter(parameter: Any, value: Any) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def _decode(message: Any) -> Response:
    response = message.infer_response
    outputs: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        assert tensor.datatype == _OUTPUT_TYPES[tensor.name]
        outputs[tensor.name] = _values(tensor.datatype, raw)
    final = response.parameters["triton_final_response"].bool_param
    return Response(outputs, message.error_message or None, final, response.id)


def _values(datatype: str, raw: bytes) -> list[Any]:
    if datatype != "BYTES":
        return np.frombuffer(raw, _DTYPES[datatype]).tolist()
    values, position = [], 0
    while position < len(raw):
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4 + length
        values.append(raw[position - length : position].decode())
    return values


def http_post(address: str, path: str, body: Any, timeout: float = TIMEOUT_S) -> tuple[int, str]:
    """POST JSON; the status and the body's text, whatever the status is."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}{path}", data=data, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def http_get(address: str, path: str, timeout: float = TIMEOUT_S) -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=timeout) as response:
        return response.read().decode()
