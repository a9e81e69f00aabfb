"""A real gRPC server that speaks Triton's streaming protocol and answers as a test scripts it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

WAIT_S = 10.0


@dataclass
class Call:
    """One request as the server saw it. `over` is set when the call has ended, `cancelled` if its client gave it up."""

    model_name: str
    request_id: str
    inputs: dict[str, list[Any]]
    datatypes: dict[str, str]
    metadata: dict[str, str]
    context: Any
    over: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False
    finished: bool = False


Script = Callable[[Call], Iterator[Any]]


class FakeTriton:
    """Answers every ModelStreamInfer with `script(call)`. Owns the server and the record of its calls."""

    def __init__(self, script: Script, port: int = 0, credentials: Any = None) -> None:
        self.script = script
        self.calls: list[Call] = []
        self.ready = True
        self.release = threading.Event()
        self._new_call = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=80))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(self), self._server)
        address = f"localhost:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        self._server.start()

    @property
    def url(self) -> str:
        return f"localhost:{self.port}"

    def stop(self) -> None:
        """Break every connection at once."""
        self.release.set()
        self._server.stop(grace=None).wait(WAIT_S)

    def wait_for_call(self, index: int = 0) -> Call:
        """The call number `index`, once it has come."""
        with self._new_call:
            assert self._new_call.wait_for(lambda: len(self.calls) > index, WAIT_S), f"no call number {index}"
            return self.calls[index]

    def record(self, call: Call) -> None:
        with self._new_call:
            self.calls.append(call)
            self._new_call.notify_all()


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, fake: FakeTriton) -> None:
        self._fake = fake

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self._fake.ready)

    def ModelStreamInfer(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:
        request = next(request_iterator)
        call = _decode(request, context)

        def over() -> None:
            call.cancelled = not call.finished
            call.over.set()

        context.add_callback(over)
        self._fake.record(call)
        yield from self._fake.script(call)
        assert next(request_iterator, None) is None, "the client must half-close after its one request"
        call.finished = True


def _decode(request: Any, context: Any) -> Call:
    inputs: dict[str, list[Any]] = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            values = [item.decode() for item in deserialize_bytes_tensor(raw)]
        else:
            values = np.frombuffer(raw, dtype=triton_to_np_dtype(tensor.datatype)).tolist()
        assert list(tensor.shape) == [len(values)], tensor
        inputs[tensor.name] = values
    datatypes = {tensor.name: tensor.datatype for tensor in request.inputs}
    metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
    return Call(request.model_name, request.id, inputs, datatypes, metadata, context)


def response(final: bool = False, **outputs: list[str]) -> Any:
    """A response whose outputs are lists of strings, as Triton would put it on the wire."""
    message = service_pb2.ModelInferResponse(model_name="lorax")
    message.parameters["triton_final_response"].bool_param = final
    for name, values in outputs.items():
        message.outputs.add(name=name, datatype="BYTES", shape=[len(values)])
        message.raw_output_contents.append(serialize_byte_tensor(np.array(values, dtype=object)).item())
    return service_pb2.ModelStreamInferResponse(infer_response=message)


def token(token_id: int, text: str, **more: Any) -> str:
    """The JSON object of one token."""
    return json.dumps(
        {"id": token_id, "text": text, "logprob": -0.5, "special": False, "skipped": False} | more
    )


def details(text: str, count: int, **more: Any) -> str:
    """The JSON object that ends an answer."""
    facts = {"finish_reason": "length", "prompt_tokens": 3, "generated_tokens": count, "generated_text": text}
    return json.dumps(facts | more)


def answer(*texts: str, **more: Any) -> Iterator[Any]:
    """A whole streamed answer, one token a response."""
    for index, text in enumerate(texts):
        outputs = {"text_output": [text], "tokens": [token(index, text)]}
        if index == len(texts) - 1:
            yield response(True, **outputs, details=[details("".join(texts), len(texts), **more)])
        else:
            yield response(**outputs)


def error_response(message: str) -> Any:
    """An error inside the stream, as Triton sends it to clients that do not ask for status codes."""
    failed = service_pb2.ModelInferResponse(model_name="lorax")
    failed.parameters["triton_final_response"].bool_param = True
    return service_pb2.ModelStreamInferResponse(error_message=message, infer_response=failed)


def error_json(message: str, error_type: str, http_status: int) -> str:
    """What the server puts into an error message."""
    return json.dumps({"error": message, "error_type": error_type, "http_status": http_status})
