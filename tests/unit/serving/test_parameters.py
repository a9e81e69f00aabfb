"""Every parameter by every name, its range, its precedence, and the errors it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_backend.config import ServerConfig
from lorax_backend.errors import UnsupportedError, ValidationError
from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.parameter_reference import with_tables
from lorax_backend.serving.parameters import parse_prompt, parse_request
from lorax_backend.serving.schema import BY_NAME, PARAMETERS
from lorax_backend.types import AdapterRef, GenerateRequest

CONFIG = ServerConfig()


def parse(
    fields: dict[str, Any] | None = None, parameters: dict[str, Any] | None = None, **config: Any
) -> GenerateRequest:
    raw = RawRequest("id", {"text_input": "hi"} | (fields or {}), parameters or {})
    return parse_request(raw, ServerConfig(**config) if config else CONFIG)


def sampling_json(**values: Any) -> dict[str, Any]:
    return {"sampling_parameters": json.dumps(values)}


def refused(fields: dict[str, Any] | None = None, parameters: dict[str, Any] | None = None) -> str:
    with pytest.raises(ValidationError) as caught:
        parse(fields, parameters)
    return caught.value.message


def test_defaults_are_greedy_and_open_ended() -> None:
    request = parse()
    assert request.prompt == "hi"
    assert not request.sampling.do_sample
    assert request.sampling.max_new_tokens == 0
    assert request.sampling.top_logprobs is None
    assert request.adapter is None
    assert request.stop == ()
    assert not request.stream
    assert request.include_stop_str_in_output


def test_a_tensor_wins_over_json_and_json_over_a_request_parameter() -> None:
    fields = {"max_tokens": 1} | sampling_json(max_tokens=2, top_k=2, seed=2)
    request = parse(fields, {"max_tokens": 3, "top_k": 3, "seed": 3, "presence_penalty": 1.5})
    assert request.sampling.max_new_tokens == 1
    assert request.sampling.top_k == 2
    assert request.sampling.seed == 2
    assert request.sampling.presence_penalty == 1.5


def test_an_alias_of_a_stronger_source_wins_over_the_main_name_of_a_weaker_one() -> None:
    assert parse(sampling_json(max_new_tokens=5), {"max_tokens": 9}).sampling.max_new_tokens == 5


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [40, "40", 40.0])
def test_numbers_are_read_by_every_name_and_from_texts(name: str, value: Any) -> None:
    assert parse(sampling_json(**{name: value})).sampling.max_new_tokens == 40


@pytest.mark.parametrize("name", ["stop", "stop_words", "stop_sequences"])
def test_stop_strings_come_as_list_text_or_json_text(name: str) -> None:
    assert parse(sampling_json(**{name: ["a", "b"]})).stop == ("a", "b")
    assert parse({}, {name: "a"}).stop == ("a",)
    assert parse({}, {name: '["a", "b"]'}).stop == ("a", "b")
    assert parse({}, {name: "[INST]"}).stop == ("[INST]",)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("temperature", -1.0, "at least 0"),
        ("temperature", "nan", "finite"),
        ("temperature", float("inf"), "finite"),
        ("temperature", "warm", "number"),
        ("top_p", 2.0, "above 0 and at most 1"),
        ("top_p", 0.0, "above 0"),
        ("top_k", -2, "at least -1"),
        ("top_k", 1.5, "whole number"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", True, "whole number"),
        ("min_tokens", -1, "at least 0"),
        ("repetition_penalty", 0.0, "above 0"),
        ("frequency_penalty", 2.5, "at most 2"),
        ("presence_penalty", -2.5, "at least -2"),
        ("seed", -1, "at least 0"),
        ("seed", 2**64, "at most"),
        ("truncate", 0, "at least 1"),
        ("return_k_alternatives", -1, "at least 1"),
        ("stream", "maybe", "true or false"),
        ("stop_words", 5, "text"),
        ("adapter_id", 5, "text"),
    ],
)
def test_a_bad_value_is_refused_with_field_value_and_range(name: str, value: Any, remedy: str) -> None:
    for fields, parameters in (({name: value}, {}), ({}, {name: value})):
        message = refused(fields, parameters)
        assert message.startswith(name)
        assert remedy in message
        assert str(value) in message


def test_all_problems_are_reported_together() -> None:
    message = refused({"temperature": -1, "top_p": 3, "text_input": ""} | sampling_json(tmperature=1))
    for part in ("temperature", "top_p", "text_input", "tmperature"):
        assert part in message


@pytest.mark.parametrize(
    ("values", "sampled"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"do_sample": False, "temperature": 0.7}, True),
        ({"temperature": 1.0}, True),
        ({"temperature": 0}, False),
        ({"temperature": 1e-9, "do_sample": True}, False),
        ({"temperature": 0, "top_k": 5}, False),
        ({"top_k": 5}, True),
        ({"top_k": 0}, False),
        ({"top_k": -1}, False),
        ({"top_p": 0.9}, True),
        ({"top_p": 1.0}, False),
        ({"repetition_penalty": 1.2}, False),
    ],
)
def test_what_shapes_the_distribution_switches_sampling_on_and_temperature_zero_off(
    values: dict[str, Any], sampled: bool
) -> None:
    sampling = parse(sampling_json(**values)).sampling
    assert sampling.do_sample is sampled
    assert sampling.top_k >= 0
    assert sampling.temperature > 1e-5


def test_whether_a_seed_was_given_is_remembered_even_if_it_is_zero() -> None:
    assert parse({"seed": 0}).seed_given
    assert not parse().seed_given
    assert parse({"seed": 2**64 - 1}).sampling.seed == 2**64 - 1


def test_unknown_keys_are_refused_with_the_nearest_name() -> None:
    assert "did you mean temperature?" in refused(sampling_json(temprature=1))
    assert "did you mean max_tokens?" in refused({}, {"max_token": 5})
    assert "did you mean max_tokens?" in refused({}, {"max-tokens": 5})


def test_keys_that_clients_and_proxies_add_are_left_alone() -> None:
    parameters = {"x-request-id": "7", "triton_enable_empty_final_response": True, "user-agent": "c"}
    assert parse(sampling_json(model="lorax", max_tokens="4"), parameters).sampling.max_new_tokens == 4


@pytest.mark.parametrize(
    ("name", "asks", "neutral"),
    [
        ("min_p", 0.1, 0),
        ("beam_width", 4, 1),
        ("response_format", {"type": "json_object"}, {"type": "text"}),
        ("response_format", '{"type": "json_schema"}', '{"type": "text", "schema": {}}'),
        ("guided_json", "{}", None),
        ("guided_regex", "a+", ""),
        ("schema", {"type": "object"}, ""),
        ("merged_adapters", {"ids": ["a", "b"]}, {}),
        ("use_beam_search", True, False),
        ("skip_special_tokens", False, True),
        ("embedding_request", "{}", None),
    ],
)
def test_a_feature_that_is_missing_is_named_and_its_neutral_value_passes(
    name: str, asks: Any, neutral: Any
) -> None:
    with pytest.raises(UnsupportedError, match=name):
        parse(sampling_json(**{name: asks}))
    parse(sampling_json(**{name: neutral}))


def test_an_embedding_request_is_refused_by_the_models_name_whatever_else_it_lacks() -> None:
    raw = RawRequest("r", {"embedding_request": '{"input": ["x"]}', "return_details": True})
    with pytest.raises(UnsupportedError, match="acme/base is served to generate text"):
        parse_request(raw, ServerConfig(model_id="acme/base"))


def test_unsupported_among_other_problems_is_a_validation_error() -> None:
    with pytest.raises(ValidationError) as caught:
        parse(sampling_json(min_p=0.5, temperature=-1))
    assert not isinstance(caught.value, UnsupportedError)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"adapter_id": ""}, None),
        ({"adapter_id": "__base_model__"}, None),
        ({"adapter_id": "org/name"}, AdapterRef("hub", "org/name")),
        ({"adapter_id": "org/name@v2"}, AdapterRef("hub", "org/name", "v2")),
        ({"lora_name": "org/name"}, AdapterRef("hub", "org/name")),
        ({"adapter_id": "/a/b@c", "adapter_source": "local"}, AdapterRef("local", "/a/b@c")),
        ({"adapter_id": "x", "adapter_source": "LOCAL"}, AdapterRef("local", "x")),
        (sampling_json(lora_name="y", adapter_source="local"), AdapterRef("local", "y")),
    ],
)
def test_adapters_are_named_as_in_lorax_and_vllm(fields: dict[str, Any], expected: AdapterRef | None) -> None:
    assert parse(fields).adapter == expected


def test_the_default_adapter_source_is_the_servers() -> None:
    assert parse({"adapter_id": "x"}, default_adapter_source="local").adapter == AdapterRef("local", "x")


def test_bad_adapter_fields_are_refused() -> None:
    assert "hub, local" in refused({"adapter_id": "x", "adapter_source": "ftp"})
    assert "id@revision" in refused({"adapter_id": "x@"})
    merged = refused({"adapter_id": "x", "merged_adapters": '{"ids": ["a"]}'})
    assert "adapter_id and merged_adapters: both given" in merged


def test_a_forwarded_authorization_header_is_the_api_token_unless_one_is_given() -> None:
    header = {"authorization": "Bearer secret"}
    assert parse({}, header).api_token == "secret"
    assert parse({"api_token": "own"}, header).api_token == "own"
    assert "secret" not in repr(parse({}, header))


def test_stop_strings_are_counted_and_not_empty() -> None:
    assert "max_stop_sequences" in refused({"stop": list("abcde")})
    assert "must not be empty" in refused({"stop": ["a", ""]})
    assert parse({"stop": list("abcde")}, max_stop_sequences=5).stop == tuple("abcde")


def test_two_names_of_one_parameter_must_agree() -> None:
    assert "also given as stop_words" in refused({"stop_words": ["a"], "stop": ["b"]})
    assert parse({"stop_words": ["a"], "stop": ["a"]}).stop == ("a",)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"text_input": None}, "missing"),
        ({"text_input": ""}, "must not be empty"),
        ({"text_input": "a", "input_ids": [1]}, "both given"),
        ({"text_input": None, "input_ids": []}, "must not be empty"),
        ({"text_input": None, "input_ids": ["x"]}, "list of token ids"),
        ({"text_input": None, "messages": "[]"}, "must not be empty"),
        ({"text_input": None, "messages": "{}"}, "JSON list"),
        ({"text_input": None, "messages": "[oops"}, "JSON list"),
        ({"text_input": None, "messages": '[{"role": "user"}]'}, "messages[0].content"),
        ({"text_input": None, "messages": '[{"content": "a"}]'}, "messages[0].role"),
        (
            {"text_input": None, "messages": '[{"role": "user", "content": [{"type": "image_url"}]}]'},
            'only parts of type "text"',
        ),
        ({"text_input": "好" * 400_000}, "1200000 bytes, at most 1048576"),
        (
            {"text_input": None, "messages": json.dumps([{"role": "user", "content": "x" * 1_100_000}])},
            "bytes",
        ),
        (sampling_json(text_input="b"), "not a sampling parameter"),
    ],
)
def test_bad_prompts_are_refused(fields: dict[str, Any], text: str) -> None:
    message = refused(fields)
    assert text in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "text", ["{", "[]", '"x"', "5", "[" * 100_000, '{"top_p": NaN}', '{"a": 1}{', "{'max_tokens': 3}"]
)
def test_malformed_json_is_a_short_validation_error(text: str) -> None:
    message = refused({"sampling_parameters": text})
    assert message.startswith("sampling_parameters")
    assert len(message) < 200


def test_lone_surrogates_are_refused_before_they_reach_the_tokenizer() -> None:
    assert "text_input" in refused({"text_input": "a\ud800"})
    assert "adapter_id" in refused(sampling_json(adapter_id="a\ud800"))
    assert "stop" in refused(sampling_json(stop=["\ud800"]))


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse({"text_input": None, "messages": json.dumps([{"role": "user", "content": parts}])})
    assert request.messages == [{"role": "user", "content": "ab"}]
    assert request.prompt is None


def test_apply_chat_template_makes_the_prompt_a_user_message() -> None:
    request = parse({}, {"apply_chat_template": True})
    assert request.messages == [{"role": "user", "content": "hi"}]
    assert request.prompt is None


def test_asking_for_tokens_or_log_probabilities_computes_them() -> None:
    assert parse({"return_tokens": True}).sampling.top_logprobs == 0
    assert parse({"return_logprobs": True}).sampling.top_logprobs == 0
    assert parse({"return_cumulative_logprob": True}).sampling.top_logprobs == 0
    assert parse(sampling_json(logprobs=3)).sampling.top_logprobs == 3
    assert parse(sampling_json(logprobs=True)).sampling.top_logprobs == 0
    assert parse(sampling_json(logprobs=False)).sampling.top_logprobs is None
    alternatives = parse({}, {"return_k_alternatives": 2})
    assert alternatives.sampling.top_logprobs == 2
    assert alternatives.outputs.tokens
    assert parse({"return_token_ids": True, "return_details": True}).sampling.top_logprobs is None


def test_the_prompt_is_repeated_by_either_name() -> None:
    assert not parse().return_full_text
    assert parse({"exclude_input_in_output": False}).return_full_text
    assert parse({}, {"return_full_text": True}).return_full_text
    assert not parse({"exclude_input_in_output": True}, {"return_full_text": False}).return_full_text


def test_min_tokens_must_not_exceed_max_tokens() -> None:
    assert "min_tokens" in refused({"min_tokens": 5, "max_tokens": 4})


def test_the_tokenizer_model_reads_only_the_prompt() -> None:
    raw = RawRequest("", {"text_input": "hi", "sampling_parameters": '{"truncate": 3}'}, {"temperature": 0.5})
    request = parse_prompt(raw, CONFIG)
    assert (request.prompt, request.truncate) == ("hi", 3)


def test_names_are_unique_and_documented() -> None:
    names = [name for parameter in PARAMETERS for name in (parameter.name, *parameter.aliases)]
    assert len(names) == len(set(names)) == len(BY_NAME)
    assert all(parameter.doc for parameter in PARAMETERS)


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    fields=st.dictionaries(st.sampled_from(sorted(BY_NAME)), _VALUES, max_size=4),
    parameters=st.dictionaries(st.sampled_from(sorted(BY_NAME)), _VALUES, max_size=3),
    text=st.one_of(st.none(), st.text(max_size=30), st.dictionaries(st.text(max_size=8), _VALUES).map(str)),
)
def test_whatever_comes_in_gives_a_request_or_a_validation_error(
    fields: dict[str, Any], parameters: dict[str, Any], text: str | None
) -> None:
    raw = RawRequest("", {"sampling_parameters": text} | fields, parameters)
    try:
        request = parse_request(raw, CONFIG)
    except ValidationError:
        return
    assert [request.prompt, request.messages, request.input_ids].count(None) == 2
    assert request.sampling.temperature > 0
    assert 0 < request.sampling.top_p <= 1


def test_the_documents_tables_are_the_generators_output() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "parameters.md").read_text(encoding="utf-8")
    command = "python -m lorax_backend.serving.parameter_reference docs/parameters.md"
    assert with_tables(text) == text, f"run: {command}"
    assert all(f"`{name}`" in text for name in BY_NAME)
