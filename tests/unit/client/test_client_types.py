"""What the client's types accept and refuse; LoRAX's own client refuses the same."""

from __future__ import annotations

from typing import Any

import pytest

from lorax_triton import (
    BatchRequest,
    MergedAdapters,
    Parameters,
    Request,
    ResponseFormat,
    ResponseFormatType,
    ValidationError,
)

GOOD: list[dict[str, Any]] = [
    {"best_of": 1},
    {"best_of": 2, "do_sample": True},
    {"best_of": 2, "temperature": 0.7},
    {"repetition_penalty": 1},
    {"seed": 1},
    {"seed": 0},
    {"temperature": 1},
    {"temperature": 0},
    {"top_k": 1},
    {"top_p": 0.5},
    {"truncate": 1},
    {"typical_p": 0.5},
    {"return_k_alternatives": 1},
    {"frequency_penalty": -2.0, "presence_penalty": 2},
    {"max_new_tokens": 1, "min_new_tokens": 0},
    {"adapter_id": "a", "adapter_source": "hub", "adapter_revision": "main"},
    {"adapter_id": "", "adapter_source": None},
    {"stop": ["\n", "."]},
    {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
]

BAD: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 0}, "best_of"),
    ({"best_of": -1}, "best_of"),
    ({"best_of": 2}, "sampling"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": -1}, "repetition_penalty"),
    ({"seed": -1}, "seed"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": True}, "top_k"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": -1}, "top_p"),
    ({"top_p": 1}, "top_p"),
    ({"truncate": 0}, "truncate"),
    ({"truncate": -1}, "truncate"),
    ({"typical_p": 0}, "typical_p"),
    ({"typical_p": -1}, "typical_p"),
    ({"typical_p": 1}, "typical_p"),
    ({"return_k_alternatives": 0}, "return_k_alternatives"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"adapter_source": "ftp"}, "adapter_source"),
    ({"adapter_id": "a", "merged_adapters": MergedAdapters(["b"])}, "merged_adapters"),
    ({"adapter_revision": "main"}, "adapter_id"),
    ({"adapter_id": "a@v1", "adapter_revision": "v2"}, "revision"),
    ({"adapter_id": "/a", "adapter_source": "local", "adapter_revision": "v2"}, "folder"),
    ({"stop": "."}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "schema"),
]


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_z02_parameters_in_range_are_accepted(fields: dict[str, Any]) -> None:
    Parameters(**fields)


@pytest.mark.parametrize(("fields", "named"), BAD, ids=str)
def test_z02_parameters_out_of_range_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Parameters(**fields)


def test_z02_a_request_has_exactly_one_kind_of_input() -> None:
    Request("Hi")
    Request(messages=[{"role": "user", "content": "Hi"}])
    Request(input_ids=[1])
    for fields in (
        {},
        {"inputs": ""},
        {"messages": []},
        {"input_ids": []},
        {"inputs": "x", "input_ids": [1]},
    ):
        with pytest.raises(ValidationError):
            Request(**fields)


def test_z02_best_of_is_refused_in_streams() -> None:
    several = Parameters(best_of=2, do_sample=True)
    Request("x", several)
    Request("x", Parameters(best_of=1), stream=True)
    with pytest.raises(ValidationError, match="best_of"):
        Request("x", several, stream=True)
    with pytest.raises(ValidationError, match="best_of"):
        BatchRequest(["x"], several, stream=True)
    for inputs in ([], ["x", ""]):
        with pytest.raises(ValidationError, match="inputs"):
            BatchRequest(inputs)


def test_merged_adapters_have_two_spellings_and_weights_of_one() -> None:
    merged = MergedAdapters(
        adapters=[{"adapter_id": "a"}, {"adapter_id": "b", "alpha": 0.5}], strategy="linear"
    )
    assert (merged.ids, merged.weights, merged.merge_strategy) == (["a", "b"], [1.0, 0.5], "linear")
    assert MergedAdapters(["a", "b"]).weights == [1.0, 1.0]
    assert MergedAdapters(["a"], [0.5], "ties", 0.2, "total").density == 0.2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "ids"),
        ({"ids": ["a"], "weights": [1.0, 2.0]}, "length"),
        ({"ids": ["a"], "merge_strategy": "magic"}, "merge_strategy"),
        ({"ids": ["a"], "merge_strategy": "ties"}, "density"),
        ({"ids": ["a"], "density": 1.1}, "density"),
        ({"ids": ["a"], "majority_sign_method": "loud"}, "majority_sign_method"),
        ({"ids": ["a"], "adapters": [{"adapter_id": "a"}]}, "not both"),
        ({"adapters": [{"id": "a"}]}, "adapter_id"),
        ({"ids": ["a"], "merge_strategy": "linear", "strategy": "ties"}, "not both"),
    ],
)
def test_merged_adapters_that_make_no_sense_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        MergedAdapters(**fields)


def test_a_response_format_names_its_type_by_word_or_enum() -> None:
    assert ResponseFormat(type=ResponseFormatType.text).type is ResponseFormatType.text
    parameters = Parameters(response_format={"type": "json_object"})
    assert parameters.response_format == ResponseFormat(ResponseFormatType.json_object)


def test_an_api_token_is_not_shown() -> None:
    assert "secret" not in repr(Parameters(api_token="secret"))
