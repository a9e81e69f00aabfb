"""The client against what it has to agree with: the model's tensors, and the published LoRAX client."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import lorax_triton
from lorax_triton import AsyncClient, Client, MergedAdapters, Parameters
from lorax_triton._base import ENGINE_MODEL
from lorax_triton._tasks import TaskRequest, encode_task
from lorax_triton._wire import INPUTS, OUTPUTS, encode_control, encode_request
from lorax_triton.types import Request

REPOSITORY = Path(__file__).parents[2] / "model_repository"

# lorax-client 0.6.3: name -> default; a dict keeps the order, which callers rely on too.
REQUIRED = inspect.Parameter.empty
_BEFORE_BEST_OF = {
    "prompt": REQUIRED,
    "adapter_id": None,
    "adapter_source": None,
    "merged_adapters": None,
    "api_token": None,
    "do_sample": False,
    "max_new_tokens": None,
    "ignore_eos_token": False,
}
_AFTER_BEST_OF = {
    "repetition_penalty": None,
    "return_full_text": False,
    "seed": None,
    "stop_sequences": None,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "truncate": None,
    "typical_p": None,
    "watermark": False,
    "response_format": None,
}
_GENERATE = {
    **_BEFORE_BEST_OF,
    "best_of": None,
    **_AFTER_BEST_OF,
    "decoder_input_details": False,
    "return_k_alternatives": None,
    "details": True,
}
_GENERATE_STREAM = {**_BEFORE_BEST_OF, **_AFTER_BEST_OF, "details": True}
_SIGNATURES: dict[tuple[type, str], dict[str, Any]] = {
    (Client, "__init__"): {
        "base_url": REQUIRED,
        "headers": None,
        "cookies": None,
        "timeout": 60,
        "session": None,
        "max_session_retries": 2,
    },
    (AsyncClient, "__init__"): {"base_url": REQUIRED, "headers": None, "cookies": None, "timeout": 60},
    (Client, "generate"): _GENERATE,
    (AsyncClient, "generate"): _GENERATE,
    (Client, "generate_stream"): _GENERATE_STREAM,
    (AsyncClient, "generate_stream"): {**_GENERATE_STREAM, "return_k_alternatives": None},
}
_FIELDS: dict[str, dict[str, Any]] = {
    "InputToken": {"id": REQUIRED, "text": REQUIRED, "logprob": None},
    "AlternativeToken": {"id": REQUIRED, "text": REQUIRED, "logprob": REQUIRED},
    "Token": {
        "id": REQUIRED,
        "text": REQUIRED,
        "logprob": REQUIRED,
        "special": REQUIRED,
        "alternative_tokens": None,
    },
    "BestOfSequence": {
        "generated_text": REQUIRED,
        "finish_reason": REQUIRED,
        "generated_tokens": REQUIRED,
        "seed": None,
        "prefill": REQUIRED,
        "tokens": REQUIRED,
    },
    "Details": {
        "finish_reason": REQUIRED,
        "prompt_tokens": REQUIRED,
        "generated_tokens": REQUIRED,
        "seed": None,
        "prefill": REQUIRED,
        "tokens": REQUIRED,
        "best_of_sequences": None,
    },
    "Response": {"generated_text": REQUIRED, "details": None},
    "StreamDetails": {
        "finish_reason": REQUIRED,
        "prompt_tokens": REQUIRED,
        "generated_tokens": REQUIRED,
        "seed": None,
    },
    "StreamResponse": {"token": REQUIRED, "generated_text": None, "details": None},
    "DeployedModel": {"model_id": REQUIRED, "sha": REQUIRED},
    "ResponseFormat": {"type": REQUIRED, "schema": REQUIRED},
    "MergedAdapters": {
        "ids": REQUIRED,
        "weights": REQUIRED,
        "merge_strategy": None,
        "density": REQUIRED,
        "majority_sign_method": None,
    },
    "Parameters": {
        "adapter_id": None,
        "adapter_source": None,
        "merged_adapters": None,
        "api_token": None,
        "do_sample": False,
        "max_new_tokens": None,
        "ignore_eos_token": False,
        "repetition_penalty": None,
        "return_full_text": False,
        "stop": [],
        "seed": None,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "truncate": None,
        "typical_p": None,
        "best_of": None,
        "watermark": False,
        "details": False,
        "decoder_input_details": False,
        "return_k_alternatives": None,
        "response_format": None,
    },
    "Request": {"inputs": REQUIRED, "parameters": None, "stream": False},
    "BatchRequest": {"inputs": REQUIRED, "parameters": None, "stream": False},
}
_ERRORS = [
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
_FINISH_REASONS = {"Length": "length", "EndOfSequenceToken": "eos_token", "StopSequence": "stop_sequence"}

_DATATYPES = {"TYPE_STRING": "BYTES", "TYPE_BOOL": "BOOL", "TYPE_INT32": "INT32", "TYPE_FP32": "FP32"}


def _tensors(model: str, side: str) -> dict[str, str]:
    config = text_format.Parse(
        (REPOSITORY / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    kinds = model_config_pb2.DataType
    return {
        t.name: _DATATYPES.get(kinds.Name(t.data_type), kinds.Name(t.data_type))
        for t in getattr(config, side)
    }


@pytest.mark.parametrize("model", [ENGINE_MODEL, "lorax_ensemble"])
def test_the_model_has_every_tensor_the_client_sends_and_reads_with_its_datatype(model: str) -> None:
    inputs = dict(INPUTS)
    if model != ENGINE_MODEL:
        del inputs["control"]  # the client sends these to the engine itself
    assert inputs.items() <= _tensors(model, "input").items()
    assert OUTPUTS.items() <= _tensors(model, "output").items()


def test_every_input_the_client_sends_is_optional_to_the_model() -> None:
    text = (REPOSITORY / ENGINE_MODEL / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.model_transaction_policy.decoupled
    assert config.max_batch_size == 0
    assert all(tensor.optional for tensor in config.input if tensor.name in INPUTS)


def test_the_table_of_tensors_holds_what_the_encoder_sends() -> None:
    everything = Parameters(
        adapter_id="a",
        adapter_source="hub",
        api_token="t",
        details=True,
        temperature=1.0,
        return_full_text=True,
    )
    sent: dict[str, str] = {}
    for request in (
        Request("x", everything),
        Request(messages=[{"role": "user", "content": "x"}]),
        Request(input_ids=[1]),
    ):
        sent |= {
            name: tensor.datatype for name, tensor in encode_request(request, "lorax", "r").inputs.items()
        }
    sent |= {
        name: tensor.datatype for name, tensor in encode_control("info", {}, "lorax", "r").inputs.items()
    }
    sent |= {
        name: tensor.datatype
        for name, tensor in encode_task(TaskRequest("embed", ["x"]), None, "lorax", "r").inputs.items()
    }
    assert sent == INPUTS


@pytest.mark.parametrize(
    ("owner", "method"), _SIGNATURES, ids=[f"{owner.__name__}.{method}" for owner, method in _SIGNATURES]
)
def test_positional_arguments_are_those_of_the_published_client(owner: type, method: str) -> None:
    published = _SIGNATURES[owner, method]
    ours = list(inspect.signature(getattr(owner, method)).parameters.values())[1:]
    positional = {p.name: p.default for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional)[: len(published)] == list(published)
    for name, default in published.items():
        # What they demand we may leave to the caller; what they default to we must too.
        assert default is REQUIRED or positional[name] == default, name
    extra = [p for p in ours if p.name not in published]
    assert all(p.default is not REQUIRED for p in extra if p.kind is not p.VAR_KEYWORD)


@pytest.mark.parametrize("name", _FIELDS)
def test_types_have_the_fields_of_the_published_client(name: str) -> None:
    ours = {field.name: field for field in dataclasses.fields(getattr(lorax_triton, name))}
    for field, default in _FIELDS[name].items():
        assert field in ours, field
        if default is not REQUIRED:
            factory = ours[field].default_factory
            value = ours[field].default if factory is dataclasses.MISSING else factory()
            assert value == default, field


def test_exceptions_and_finish_reasons_have_the_published_names() -> None:
    for name in _ERRORS:
        assert issubclass(getattr(lorax_triton, name), Exception)
    assert {reason.name: reason.value for reason in lorax_triton.FinishReason} == _FINISH_REASONS
    assert str(lorax_triton.UnknownError("why", 500)) == "Error status 500: why"
    assert lorax_triton.NotSupportedError("m").message
    assert inspect.signature(lorax_triton.parse_error).parameters["headers"].default is None


def test_a_merge_written_for_the_published_client_is_accepted() -> None:
    merged = MergedAdapters(ids=["a"], weights=[0.5], merge_strategy="dare_ties", density=0.5)
    assert Parameters(merged_adapters=merged).merged_adapters is merged


def test_the_package_is_typed_and_exports_what_it_says() -> None:
    assert (Path(lorax_triton.__file__).parent / "py.typed").exists()
    for name in lorax_triton.__all__:
        assert hasattr(lorax_triton, name), name
