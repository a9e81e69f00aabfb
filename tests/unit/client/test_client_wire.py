"""Translation without a network: tensors, protobufs, addresses, credentials, and the in-memory transport."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton_server import FakeTriton, answer, details, token
from tls_files import TlsFiles, write_tls_files
from tritonclient.grpc import InferInput, service_pb2

from lorax_triton import (
    AsyncClient,
    Client,
    GenerationError,
    LoraxError,
    MergedAdapters,
    Parameters,
    Request,
    Tls,
)
from lorax_triton._channel import make_metadata, parse_base_url
from lorax_triton._protobuf import decode_stream_response, encode_infer_request, pack, unpack
from lorax_triton._transport import InferRequest, InferResponse
from lorax_triton._watchdog import Watchdog
from lorax_triton._wire import ResponseDecoder, encode_request, encode_sampling
from lorax_triton.testing import AsyncInMemoryTransport, InMemoryTransport

WAIT_S = 10.0


def test_sampling_json_holds_only_what_the_caller_chose() -> None:
    assert encode_sampling(Parameters()) == {}
    parameters = Parameters(
        best_of=2,
        do_sample=True,
        watermark=True,
        frequency_penalty=0.5,
        merged_adapters=MergedAdapters(["a", "b"], [1.0, 2.0], "ties", 0.5),
        response_format={"type": "json_object", "schema": {"type": "object"}},
        api_token="secret",
        details=True,
    )
    assert encode_sampling(parameters) == {
        "best_of": 2,
        "do_sample": True,
        "watermark": True,
        "frequency_penalty": 0.5,
        "merged_adapters": {
            "ids": ["a", "b"],
            "weights": [1.0, 2.0],
            "merge_strategy": "ties",
            "density": 0.5,
        },
        "response_format": {"type": "json_object", "schema": {"type": "object"}},
    }


def test_a_choice_that_equals_a_number_of_its_own_is_still_sent() -> None:
    assert encode_sampling(Parameters(temperature=0.0, seed=0)) == {"temperature": 0.0, "seed": 0}


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("BYTES", ["", "Grüße", "a\nb", "\x00"]),
        ("BOOL", [True, False]),
        ("INT32", [-(2**31), 2**31 - 1]),
        ("UINT64", [0, 2**64 - 1]),
        ("FP32", [0.5, -1.0]),
        ("INT32", []),
    ],
)
def test_tensors_have_the_bytes_that_tritonclient_gives_them(datatype: str, values: list[Any]) -> None:
    dtypes = {"BYTES": object, "BOOL": bool, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}
    theirs = InferInput("x", [len(values)], datatype)
    theirs.set_data_from_numpy(np.array(values, dtype=dtypes[datatype]))
    raw = pack(datatype, values)
    assert raw == theirs._get_content()
    assert unpack(datatype, raw) == values


@pytest.mark.parametrize("raw", [b"\x01", b"\x05\x00\x00\x00ab"])
def test_a_broken_tensor_from_the_server_is_an_error_and_not_a_crash(raw: bytes) -> None:
    message = service_pb2.ModelStreamInferResponse()
    message.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
    with pytest.raises(LoraxError, match="tensors"):
        decode_stream_response(message)
    message.infer_response.raw_output_contents.append(raw)
    with pytest.raises(LoraxError, match="tensors"):
        decode_stream_response(message)


def test_bytes_that_are_not_utf8_come_out_with_replacement_characters() -> None:
    assert unpack("BYTES", b"\x02\x00\x00\x00a\xff") == ["a\ufffd"]


def test_a_request_asks_for_the_final_mark_of_ensembles() -> None:
    message = encode_infer_request(InferRequest("lorax", "r", {}))
    assert message.parameters["triton_enable_empty_final_response"].bool_param is True


def test_text_without_tokens_of_its_own_is_not_lost_and_not_doubled() -> None:
    decoder = ResponseDecoder(Request("x", Parameters(details=True)), "r")
    first = decoder.feed(InferResponse({"text_output": ["a"], "tokens": [token(1, "ab")]}))
    assert [item.token.text for item in first] == ["ab"]
    assert decoder.feed(InferResponse({"text_output": ["b"]})) == []
    last = decoder.feed(InferResponse({"text_output": ["c"], "details": [details("abc", 1)]}, final=True))
    assert [(item.token.id, item.token.text, item.generated_text) for item in last] == [(-1, "c", "abc")]
    assert decoder.response().details is not None
    assert [item.id for item in decoder.response().details.tokens] == [1]  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["not json", "[1]"])
def test_details_that_are_no_json_object_are_an_error(text: str) -> None:
    decoder = ResponseDecoder(Request("x"), "r")
    with pytest.raises(LoraxError, match="JSON"):
        decoder.feed(InferResponse({"details": [text]}))


@pytest.mark.parametrize(
    ("base_url", "target", "tls"),
    [
        ("host", "host:8001", False),
        ("host:9", "host:9", False),
        ("grpc://host", "host:8001", False),
        ("grpc://host:9/", "host:9", False),
        ("grpcs://host:9", "host:9", True),
        ("[::1]", "[::1]:8001", False),
        ("[::1]:9", "[::1]:9", False),
        ("unix:/run/t.sock", "unix:/run/t.sock", False),
    ],
)
def test_addresses(base_url: str, target: str, tls: bool) -> None:
    assert parse_base_url(base_url) == (target, tls)


@pytest.mark.parametrize("base_url", ["http://host:8080", "https://host", "", "grpc://", "host/path"])
def test_an_address_of_another_kind_is_refused_with_the_remedy(base_url: str) -> None:
    with pytest.raises(ValueError, match="8001"):
        Client(base_url)


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": -1}, {"total_timeout": 0}, {"connect_timeout": 0}]
)
def test_time_limits_that_cannot_be_kept_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Client("host", **options)


def test_metadata_keys_are_lower_case_and_cookies_are_one_of_them() -> None:
    assert dict(make_metadata({"X-A": "1"}, {"a": "1", "b": "2"})) == {
        "x-a": "1",
        "cookie": "a=1; b=2",
    }


def test_a_client_runs_on_a_transport_without_a_network() -> None:
    def handler(request: InferRequest) -> Iterator[InferResponse]:
        assert request.inputs["text_input"].values == ["x"]
        yield InferResponse({"text_output": ["a"], "tokens": [token(1, "a")]})
        yield InferResponse(
            {"text_output": ["b"], "tokens": [token(2, "b")], "details": [details("ab", 2)]}, True
        )

    transport = InMemoryTransport(handler)
    with Client("host", session=transport) as client:
        assert client.generate("x").generated_text == "ab"
        with client.generate_stream("x") as stream:
            next(stream)
        assert client.is_ready()
    assert transport.closed
    assert transport.cancelled == {stream.request_id}

    async def main() -> None:
        transport = AsyncInMemoryTransport(handler)
        async with AsyncClient("host", session=transport) as client:
            assert (await client.generate("x")).generated_text == "ab"
            async with client.generate_stream("x") as stream:
                await anext(stream)
            assert await client.is_ready()
        assert transport.cancelled == {stream.request_id}
        assert len(transport.requests) == 2

    asyncio.run(main())


def test_an_error_of_a_transport_reaches_the_caller_and_ends_the_stream() -> None:
    def handler(request: InferRequest) -> Iterator[InferResponse]:
        yield InferResponse({"text_output": ["a"], "tokens": [token(1, "a")]})
        raise GenerationError("broken")

    with Client("host", session=InMemoryTransport(handler)) as client:
        stream = client.generate_stream("x")
        next(stream)
        with pytest.raises(GenerationError, match="broken"):
            next(stream)
        assert list(stream) == []


def test_the_watchdog_expires_the_late_and_leaves_the_others() -> None:
    watchdog = Watchdog()
    late, early = threading.Event(), threading.Event()
    in_time = watchdog.arm(60.0, lambda: pytest.fail("it was disarmed"))
    first = watchdog.arm(0.05, late.set)
    assert late.wait(WAIT_S)
    assert watchdog.disarm(first) is False
    assert watchdog.disarm(in_time) is True
    second = watchdog.arm(0.01, early.set)
    assert early.wait(WAIT_S)
    assert watchdog.disarm(second) is False


def test_a_request_through_the_pure_encoder_is_what_the_client_sends() -> None:
    encoded = encode_request(Request(input_ids=[1, 2], stream=True), "m", "r")
    assert (encoded.model_name, encoded.request_id) == ("m", "r")
    assert encoded.inputs["input_ids"].values == [1, 2]
    assert "sampling_parameters" not in encoded.inputs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return write_tls_files(tmp_path_factory.mktemp("tls"))


def test_tls_with_the_servers_authority_works_and_without_it_fails(files: TlsFiles) -> None:
    pair = (files.server_key.read_bytes(), files.server_cert.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], files.ca.read_bytes(), require_client_auth=True)
    server = FakeTriton(lambda call: answer("a"), credentials=credentials)
    tls = Tls(files.ca, files.client_key, files.client_cert)
    try:
        with Client(f"grpcs://{server.url}", tls=tls) as client:
            assert client.generate("x").generated_text == "a"

        async def main() -> None:
            async with AsyncClient(server.url, tls=tls) as client:
                assert (await client.generate("x")).generated_text == "a"

        asyncio.run(main())
        for stranger in (True, Tls(files.other_ca, files.client_key, files.client_cert), Tls(files.ca)):
            with (
                Client(server.url, tls=stranger, max_session_retries=0) as client,
                pytest.raises(ConnectionError),
            ):
                client.generate("x", timeout=30)
    finally:
        server.stop()
    with pytest.raises(ValueError, match="need each other"):
        Tls(private_key="key.pem")


def test_unsupported_features_are_named_in_the_json_for_the_server_to_refuse() -> None:
    encoded = encode_request(Request("x", Parameters(watermark=True, typical_p=0.5)), "lorax", "r")
    assert json.loads(encoded.inputs["sampling_parameters"].values[0]) == {
        "typical_p": 0.5,
        "watermark": True,
    }
