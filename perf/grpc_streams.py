"""Streams of one model over Triton's gRPC, from several processes, so that the client is not what is measured."""

from __future__ import annotations

import json
import multiprocessing
import struct
import threading
import time
from array import array
from collections.abc import Sequence

from records import Record, Request


def run_streams(
    address: str, requests: Sequence[Request], processes: int = 8, timeout: float = 300.0
) -> list[Record]:
    """Start all requests at once, but for those with a delay, and wait for all; records in the order of `requests`.
    Those with a delay are a process of their own, beside `processes` for the others."""
    shares = _shares(requests, processes)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(shares))
    pipes, workers = [], []
    for share in shares:
        ours, theirs = context.Pipe()
        mine = [requests[index] for index in share]
        worker = context.Process(
            target=_serve_share, args=(address, mine, barrier, theirs, timeout), daemon=True
        )
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)
    records: list[Record] = [Record(error="no answer from the client process")] * len(requests)
    for share, pipe in zip(shares, pipes, strict=True):
        if pipe.poll(timeout + 60):
            for index, record in zip(share, pipe.recv(), strict=True):
                records[index] = record
    for worker in workers:
        worker.join(10)
    return records


def _shares(requests: Sequence[Request], processes: int) -> list[list[int]]:
    """Which requests each process sends. A newcomer beside a dozen busy streams would wait for their threads in its own
    client, which has one interpreter lock for all."""
    at_once = [index for index, request in enumerate(requests) if not request.delay_s]
    later = [index for index, request in enumerate(requests) if request.delay_s]
    shares = [at_once[part::processes] for part in range(processes)]
    return [share for share in (*shares, later) if share]


def _serve_share(
    address: str, requests: list[Request], barrier: object, pipe: object, timeout: float
) -> None:
    import grpc
    from tritonclient.grpc import service_pb2_grpc

    channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
    grpc.channel_ready_future(channel).result(30)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    _warm_up(stub, timeout)
    records = [Record() for _ in requests]
    threads = [
        threading.Thread(target=_run_one, args=(stub, request, record, timeout))
        for request, record in zip(requests, records, strict=True)
    ]
    barrier.wait(60)  # type: ignore[attr-defined]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send(records)  # type: ignore[attr-defined]


def _warm_up(stub: object, timeout: float) -> None:
    """Have the client's own code run once, which takes a fresh process a millisecond or two. The server refuses by
    itself what is for a model that it does not have, so its engine learns nothing of it."""
    message = _message(Request([1], "", 1))
    message.model_name = "none"  # type: ignore[attr-defined]
    for answer in stub.ModelStreamInfer(iter([message]), timeout=timeout):  # type: ignore[attr-defined]
        assert answer.error_message


def _run_one(stub: object, request: Request, record: Record, timeout: float) -> None:
    message = _message(request)
    if request.delay_s:
        time.sleep(request.delay_s)
    record.sent = time.monotonic()
    try:
        for answer in stub.ModelStreamInfer(iter([message]), timeout=timeout):  # type: ignore[attr-defined]
            now = time.monotonic()
            if answer.error_message:
                record.error = answer.error_message
                return
            response = answer.infer_response
            for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
                if tensor.name == "token_ids" and raw:
                    ids = array("i", raw)
                    record.token_ids.extend(ids)
                    record.arrivals.append((now, len(ids)))
    except Exception as error:
        record.error = f"{type(error).__name__}: {error}"[:300]


def _message(request: Request) -> object:
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name="lorax")
    options = json.dumps({"ignore_eos_token": True, "temperature": 0})
    text = lambda value: struct.pack("<I", len(value)) + value.encode()  # noqa: E731
    inputs = [
        ("input_ids", "INT32", len(request.prompt), array("i", request.prompt).tobytes()),
        ("max_tokens", "INT32", 1, array("i", [request.max_tokens]).tobytes()),
        ("stream", "BOOL", 1, b"\1"),
        ("return_token_ids", "BOOL", 1, b"\1"),
        ("sampling_parameters", "BYTES", 1, text(options)),
    ]
    if request.adapter:
        inputs += [
            ("adapter_id", "BYTES", 1, text(request.adapter)),
            ("adapter_source", "BYTES", 1, text("local")),
        ]
    for name, datatype, length, raw in inputs:
        tensor = message.inputs.add()
        tensor.name, tensor.datatype = name, datatype
        tensor.shape.append(length)
        message.raw_input_contents.append(raw)
    return message
