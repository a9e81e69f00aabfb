"""Each row of the inventory of LoRAX's Python client (K01 to K20), by a test of its number.

What is compared with is recorded from lorax-client 0.6.3 and from LoRAX's sources where they are newer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import requires
from typing import Any

import pytest
from fake_triton_server import Call, FakeTriton, Script, answer, response

import lorax_triton
from lorax_triton import (
    AsyncClient,
    BatchRequest,
    Client,
    IncompleteGenerationError,
    MergedAdapters,
    Parameters,
    Request,
    ResponseFormat,
    ResponseFormatType,
    ServerConnectionError,
    ValidationError,
    parse_error,
)

GENERATE = [
    "prompt",
    "adapter_id",
    "adapter_source",
    "merged_adapters",
    "api_token",
    "do_sample",
    "max_new_tokens",
    "ignore_eos_token",
    "best_of",
    "repetition_penalty",
    "return_full_text",
    "seed",
    "stop_sequences",
    "temperature",
    "top_k",
    "top_p",
    "truncate",
    "typical_p",
    "watermark",
    "response_format",
    "decoder_input_details",
    "return_k_alternatives",
    "details",
]
NOT_IN_STREAMS = {"best_of", "decoder_input_details", "return_k_alternatives"}
FIELDS: Mapping[str, str] = {
    "InputToken": "id text logprob",
    "AlternativeToken": "id text logprob",
    "Token": "id text logprob special alternative_tokens skipped",
    "BestOfSequence": "generated_text finish_reason generated_tokens seed prefill tokens",
    "Details": "finish_reason prompt_tokens generated_tokens seed prefill tokens best_of_sequences skipped_tokens",
    "Response": "generated_text details",
    "StreamDetails": "finish_reason prompt_tokens generated_tokens seed",
    "StreamResponse": "token generated_text details",
    "DeployedModel": "model_id sha",
    "EmbedResponse": "embeddings",
    "ClassifyResponse": "entities",
}
ERRORS = [
    "ValidationError",
    "GenerationError",
    "OverloadedError",
    "IncompleteGenerationError",
    "BadRequestError",
    "ShardNotReadyError",
    "ShardTimeoutError",
    "NotFoundError",
    "RateLimitExceededError",
    "NotSupportedError",
    "UnprocessableEntityError",
    "UnknownError",
]


@pytest.fixture
def serve() -> Iterator[Callable[[Script], FakeTriton]]:
    servers: list[FakeTriton] = []

    def start(script: Script) -> FakeTriton:
        servers.append(FakeTriton(script))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


Serve = Callable[[Script], FakeTriton]


def positional(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of the arguments that may be given by position, without self."""
    found = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {p.name: p.default for p in found if p.name != "self"}


def test_k01_the_clients_and_merged_adapters_are_exported() -> None:
    for name in ("Client", "AsyncClient", "MergedAdapters"):
        assert name in lorax_triton.__all__
        assert hasattr(lorax_triton, name)


def test_k02_a_client_takes_lorax_arguments_and_reconnects_as_often_as_told(serve: Serve) -> None:
    assert positional(Client.__init__) == {
        "base_url": inspect.Parameter.empty,
        "headers": None,
        "cookies": None,
        "timeout": 60,
        "session": None,
        "max_session_retries": 2,
    }
    fake = serve(lambda call: answer("x"))
    port = fake.port
    with Client(fake.url, max_session_retries=3) as client:
        client.generate("x")
        fake.stop()
        again = FakeTriton(lambda call: answer("y"), port)
        try:
            assert client.generate("x").generated_text == "y"
        finally:
            again.stop()
    with Client("localhost:1", max_session_retries=0) as client, pytest.raises(ServerConnectionError):
        client.generate("x")


def test_k03_generate_has_lorax_arguments_in_its_order_and_what_is_no_answer_is_an_error(
    serve: Serve,
) -> None:
    for client in (Client, AsyncClient):
        assert list(positional(client.generate)) == GENERATE
        defaults = positional(client.generate)
        off = {"do_sample", "ignore_eos_token", "return_full_text", "watermark", "decoder_input_details"}
        assert {name for name, default in defaults.items() if default is False} == off
        assert defaults["details"] is True
    fake = serve(lambda call: iter([response(True, details=["<html>"])]))
    with Client(fake.url) as client, pytest.raises(IncompleteGenerationError):
        client.generate("x")


def test_k04_generate_stream_has_the_rest_and_alternatives(serve: Serve) -> None:
    expected = [name for name in GENERATE if name not in NOT_IN_STREAMS]
    for client in (Client, AsyncClient):
        assert list(positional(client.generate_stream)) == [*expected, "return_k_alternatives"]
    fake = serve(lambda call: iter([response(text_output=["a"], tokens=["no JSON"])]))
    with Client(fake.url) as client, pytest.raises(lorax_triton.LoraxError):
        list(client.generate_stream("x"))


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_k05_embed_takes_a_text_or_a_list_and_adapters(client: Any) -> None:
    assert next(iter(positional(client.embed))) == "inputs"
    options = lorax_triton._options.AdapterOptions.__annotations__
    assert list(options) == ["adapter_id", "adapter_source", "merged_adapters", "api_token"]


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_k06_classify_takes_a_text_and_classify_batch_a_list(client: Any, serve: Serve) -> None:
    assert list(positional(client.classify)) == list(positional(client.classify_batch)) == ["inputs"]
    details = json.dumps({"entities": [[{"word": "a"}], []]})
    fake = serve(lambda call: iter([response(True, details=[details])]))
    with Client(fake.url) as asked:
        assert [found.entities for found in asked.classify_batch(["a", "b"])] == [[{"word": "a"}], []]


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_k07_metrics_come_as_prometheus_text_or_json(client: Any) -> None:
    assert positional(client.metrics) == {"format": "prometheus"}
    assert lorax_triton.metrics.FORMATS == ("prometheus", "json")


def test_k08_the_asynchronous_clients_timeout_is_in_seconds(serve: Serve) -> None:
    assert positional(AsyncClient.__init__) == {
        "base_url": inspect.Parameter.empty,
        "headers": None,
        "cookies": None,
        "timeout": 60,
    }

    def hang(call: Call) -> Iterator[Any]:
        call.over.wait(10)
        return iter(())

    async def main() -> None:
        async with AsyncClient(serve(hang).url, timeout=0.05) as client:
            with pytest.raises(TimeoutError):
                await client.generate("x")

    asyncio.run(asyncio.wait_for(main(), 3))


def test_k09_the_asynchronous_client_can_do_all_that_the_other_can() -> None:
    public = {name for name in dir(Client) if not name.startswith("_")}
    assert public <= set(dir(AsyncClient))
    for name in ("generate", "embed", "classify", "classify_batch", "metrics"):
        assert inspect.iscoroutinefunction(getattr(AsyncClient, name))
        assert positional(getattr(AsyncClient, name)) == positional(getattr(Client, name))


def test_k10_penalties_and_seeds_reach_the_server_from_both_calls(serve: Serve) -> None:
    fake = serve(lambda call: answer("x"))
    with Client(fake.url) as client:
        client.generate("x", frequency_penalty=0.5, presence_penalty=-1, seed=3)
        list(client.generate_stream("x", frequency_penalty=0.5, presence_penalty=-1, seed=3))
    sent = [json.loads(call.inputs["sampling_parameters"][0]) for call in fake.calls]
    assert sent == [{"frequency_penalty": 0.5, "presence_penalty": -1, "seed": 3}] * 2


def test_k11_debug_mode_logs_what_goes_over_the_wire_but_no_text_and_no_secret(serve: Serve) -> None:
    program = (
        "import sys, lorax_triton\n"
        "client = lorax_triton.Client(sys.argv[1], headers={'Authorization': 'Bearer hidden'})\n"
        "client.generate('private prompt', api_token='hidden')\n"
    )
    fake = serve(lambda call: answer("x"))
    environment = os.environ | {"LORAX_DEBUG_MODE": "1"}
    command = [sys.executable, "-c", program, fake.url]
    log = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=20
    ).stderr
    assert fake.calls[0].request_id in log
    assert "hidden" not in log
    assert "private" not in log
    traced = parse_error(500, {"error": "why"}, {"x-b3-traceid": "abc"})
    assert "Trace ID: abc" in str(traced)


def test_k12_parameters_have_lorax_fields_and_defaults() -> None:
    of_generate = {"stop" if name == "stop_sequences" else name for name in GENERATE} - {"prompt"}
    ours = {field.name for field in dataclasses.fields(Parameters)}
    assert of_generate | {"frequency_penalty", "presence_penalty"} <= ours
    assert Parameters().stop == []
    assert Parameters().details is False


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter_id": "a", "merged_adapters": MergedAdapters(["b"], [1.0])},
        {"adapter_source": "moon"},
        {"best_of": 0},
        {"best_of": 2},
        {"best_of": 2, "do_sample": True, "seed": 1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"temperature": -0.1},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.0},
        {"truncate": 0},
        {"typical_p": 0},
        {"typical_p": 1.0},
        {"return_k_alternatives": 0},
    ],
)
def test_k13_parameters_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Parameters(**fields)


def test_k14_a_request_needs_inputs_and_no_best_of_in_streams() -> None:
    several = Parameters(best_of=2, do_sample=True)
    assert list(positional(Request.__init__))[:3] == ["inputs", "parameters", "stream"]
    assert list(positional(BatchRequest.__init__)) == ["inputs", "parameters", "stream"]
    assert Request("x", several).stream is False
    for wrong in (
        lambda: Request(""),
        lambda: Request("x", several, stream=True),
        lambda: BatchRequest([]),
        lambda: BatchRequest(["x", ""]),
        lambda: BatchRequest(["x"], several, True),
    ):
        with pytest.raises(ValidationError):
            wrong()


def test_k15_merged_adapters_keep_lorax_rules_without_a_density_for_linear() -> None:
    assert MergedAdapters(["a"], [1.0]).density is None
    alias = MergedAdapters(
        adapters=[{"adapter_id": "a"}, {"adapter_id": "b", "alpha": 0.5}], strategy="linear"
    )
    assert (alias.ids, alias.weights, alias.merge_strategy) == (["a", "b"], [1.0, 0.5], "linear")
    for fields in (
        {"ids": [], "weights": []},
        {"ids": ["a"], "weights": [1.0, 2.0]},
        {"ids": ["a"], "weights": [1.0], "merge_strategy": "average"},
        {"ids": ["a"], "weights": [1.0], "merge_strategy": "ties"},
        {"ids": ["a"], "weights": [1.0], "density": 1.5},
        {"ids": ["a"], "weights": [1.0], "majority_sign_method": "coin"},
    ):
        with pytest.raises(ValidationError):
            MergedAdapters(**fields)


def test_k16_response_formats_know_json_schema_and_text_too() -> None:
    assert {kind.value for kind in ResponseFormatType} == {"text", "json_object", "json_schema"}
    assert (
        ResponseFormat(type="json_object", schema={"type": "object"}).type is ResponseFormatType.json_object
    )


@pytest.mark.parametrize("name", FIELDS)
def test_k17_types_have_lorax_fields(name: str) -> None:
    ours = {field.name for field in dataclasses.fields(getattr(lorax_triton, name))}
    assert set(FIELDS[name].split()) <= ours
    reasons = {reason.name: reason.value for reason in lorax_triton.FinishReason}
    assert reasons == {"Length": "length", "EndOfSequenceToken": "eos_token", "StopSequence": "stop_sequence"}


@pytest.mark.parametrize("name", ERRORS)
def test_k18_exceptions_have_lorax_names_and_one_root(name: str) -> None:
    assert issubclass(getattr(lorax_triton, name), lorax_triton.LoraxError)
    assert "m" in str(lorax_triton.NotSupportedError("m"))
    assert "500" in str(lorax_triton.UnknownError("why", 500))


@pytest.mark.parametrize(
    ("status", "error_type", "kind"),
    [
        (500, "generation", "GenerationError"),
        (500, "incomplete_generation", "IncompleteGenerationError"),
        (500, "overloaded", "OverloadedError"),
        (500, "validation", "ValidationError"),
        (400, None, "BadRequestError"),
        (403, None, "ShardNotReadyError"),
        (424, None, "ShardNotReadyError"),
        (504, None, "ShardTimeoutError"),
        (404, None, "NotFoundError"),
        (429, None, "RateLimitExceededError"),
        (422, None, "UnprocessableEntityError"),
        (418, None, "UnknownError"),
        (404, "adapter_not_found", "AdapterNotFoundError"),
    ],
)
def test_k19_errors_are_told_by_their_type_and_then_by_their_status(
    status: int, error_type: str | None, kind: str
) -> None:
    error = parse_error(status, {"error": "why", "error_type": error_type})
    assert type(error).__name__ == kind
    if error_type is not None and error_type.startswith("adapter"):
        assert isinstance(error, lorax_triton.GenerationError)


def test_k20_the_client_needs_no_more_than_tritonclient_and_numpy() -> None:
    needed = [line for line in requires("lorax-triton") or () if "extra ==" not in line]
    assert {line.split("[")[0].split(">")[0] for line in needed} == {"numpy", "tritonclient"}
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, lorax_triton; print(*sorted(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    ).stdout.split()
    assert not {"torch", "transformers", "pydantic", "requests", "aiohttp", "lorax_backend"} & set(loaded)
    assert logging.getLogger("lorax_triton").handlers
