"""LoRAX's rules for generation parameters, one test a row of its list (G01-G27), and its own checks of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorax_backend.config import ServerConfig
from lorax_backend.errors import LoraxError, UnsupportedError, ValidationError
from lorax_backend.serving.adapter_fields import MergedAdapters, parse_merge
from lorax_backend.serving.given import RawRequest
from lorax_backend.serving.parameters import parse_request
from lorax_backend.serving.prompt import Limits, prepare
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import AdapterRef, GenerateRequest


def parse(options: dict[str, Any] | None = None, **values: Any) -> GenerateRequest:
    fields = {"text_input": "hello", "sampling_parameters": json.dumps(values)}
    return parse_request(RawRequest("", fields), ServerConfig(**(options or {})))


def refusal(options: dict[str, Any] | None = None, **values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        parse(options, **values)
    assert not isinstance(caught.value, UnsupportedError)
    return caught.value.message


def test_g01_inputs_must_not_be_empty() -> None:
    with pytest.raises(ValidationError, match="must not be empty"):
        parse_request(RawRequest("", {"text_input": ""}), ServerConfig())


def test_g02_an_adapter_and_a_merge_exclude_each_other_and_an_empty_id_is_the_base() -> None:
    message = refusal(adapter_id="a", merged_adapters={"ids": ["b"]})
    assert "adapter_id" in message
    assert "merged_adapters" in message
    assert "both given" in message
    assert parse(adapter_id="").adapter is None


@pytest.mark.parametrize("source", ["hub", "local", "s3", "pbase", "S3", "PBASE"])
def test_g03_sources_are_known_in_any_case_and_others_refused_up_front(source: str) -> None:
    ref = parse(adapter_id="a", adapter_source=source).adapter
    assert ref is not None
    assert ref.source == source.lower()
    assert "adapter_source" in refusal(adapter_id="a", adapter_source="ftp")
    assert "adapter_source" in refusal(adapter_source="ftp")


@pytest.mark.parametrize(
    ("adapter_id", "expected"),
    [
        ("hf://org/name@v1", AdapterRef("hub", "org/name", "v1")),
        ("file:///data/adapter", AdapterRef("local", "/data/adapter")),
        ("s3://bucket/prefix", AdapterRef("s3", "s3://bucket/prefix")),
    ],
)
def test_g03_an_address_names_its_source(adapter_id: str, expected: AdapterRef) -> None:
    assert parse(adapter_id=adapter_id).adapter == expected
    assert parse(adapter_id=adapter_id, adapter_source="pbase").adapter == expected
    assert "ftp://" in refusal(adapter_id="ftp://host/adapter")


def test_g03_a_revision_may_stand_by_itself() -> None:
    assert parse(adapter_id="org/name", adapter_revision="v2").adapter == AdapterRef("hub", "org/name", "v2")
    assert "two revisions" in refusal(adapter_id="org/name@v1", adapter_revision="v2")


@pytest.mark.parametrize(
    ("merge", "key"),
    [
        ({"ids": []}, "ids"),
        ({"weights": [1.0]}, "ids"),
        ({"ids": ["a", 5]}, "ids"),
        ({"ids": ["a", "b"], "weights": [1.0]}, "weights"),
        ({"ids": ["a"], "weights": ["x"]}, "weights"),
        ({"ids": ["a"], "merge_strategy": "average"}, "merge_strategy"),
        ({"ids": ["a"], "majority_sign_method": "most"}, "majority_sign_method"),
        ({"ids": ["a"], "density": 1.5}, "density"),
        ({"ids": ["a"], "merge_strategy": "ties"}, "density"),
        ({"ids": ["a"], "wieghts": [1]}, "wieghts"),
    ],
)
def test_g04_a_merge_is_checked_key_by_key(merge: dict[str, Any], key: str) -> None:
    assert f"merged_adapters.{key}" in refusal(merged_adapters=merge).replace("'", "")


def test_g04_weights_default_to_ones_and_a_valid_merge_is_refused_as_unsupported() -> None:
    assert parse_merge({"ids": ["a", "b"]}) == MergedAdapters(("a", "b"), (1.0, 1.0), "linear", 0.0, "total")
    assert parse_merge({"ids": ["a"], "merge_strategy": "dare_ties", "density": 0.5}).density == 0.5
    with pytest.raises(UnsupportedError, match="merged_adapters"):
        parse(merged_adapters={"ids": ["a", "b"], "weights": [0.5, 0.5]})


def test_g05_the_token_comes_from_the_field_or_the_bearer_header() -> None:
    assert parse(api_token="t").api_token == "t"
    raw = RawRequest("", {"text_input": "x"}, {"authorization": "Bearer h"})
    assert parse_request(raw, ServerConfig()).api_token == "h"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"best_of": 2}, "sampling"),
        ({"best_of": 3, "do_sample": True}, "max_best_of"),
        ({"best_of": 2, "do_sample": True, "stream": True}, "stream"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
        ({"best_of": 0, "do_sample": True}, "at least 1"),
        ({"best_of": -1, "do_sample": True}, "at least 1"),
        ({"best_of": 2, "n": 3, "do_sample": True}, "less than n"),
        ({"best_of": 2, "temperature": 0.0}, "sampling"),
    ],
)
def test_g06_best_of_keeps_its_rules(values: dict[str, Any], word: str) -> None:
    fields = {"text_input": "hello", "stream": values.pop("stream", False)}
    with pytest.raises(ValidationError, match=word) as caught:
        parse_request(RawRequest("", fields | {"sampling_parameters": json.dumps(values)}), ServerConfig())
    assert "best_of" in caught.value.message


@pytest.mark.parametrize("warper", ["do_sample", "temperature", "top_k", "top_p", "typical_p"])
def test_g06_best_of_is_served_with_any_kind_of_sampling(warper: str) -> None:
    value = {"do_sample": True, "top_k": 4}.get(warper, 0.5)
    request = parse(best_of=2, **{warper: value})
    assert (request.best_of, request.n) == (2, 1)
    assert request.sampling.top_logprobs == 0  # the answers are compared by them


def test_g06_best_of_one_is_always_allowed_and_more_only_where_the_server_says_so() -> None:
    assert parse(best_of=1).best_of == 1
    assert "max_best_of is 1" in refusal({"max_best_of": 1}, best_of=2, do_sample=True)
    assert parse({"max_best_of": 5}, best_of=5, do_sample=True).best_of == 5


def test_g06_n_answers_may_be_greedy_streamed_and_seeded_up_to_the_servers_cap() -> None:
    assert parse(n=3, seed=4).n == 3
    assert "max_n" in refusal({"max_n": 2}, n=3)
    both = parse({"max_best_of": 4}, n=2, best_of=4, do_sample=True)
    assert (both.n, both.best_of) == (2, 4)


def assert_range(name: str, good: list[Any], bad: list[Any]) -> None:
    """Good values reach the engine as they are; bad ones are refused by the name the caller used."""
    for value in good:
        sampling = parse(**{name: value}).sampling
        assert getattr(sampling, name) == value
    for value in bad:
        assert refusal(**{name: value}).startswith(name)


def test_g07_a_temperature_is_at_least_zero_and_zero_is_greedy() -> None:
    assert_range("temperature", [1.0, 0.3, 2], [-1, -0.01])
    assert parse(temperature=0.3).sampling.do_sample
    assert not parse(temperature=0, do_sample=True).sampling.do_sample
    assert parse().sampling.temperature == 1.0


def test_g08_a_repetition_penalty_is_above_zero_and_one_without_being_given() -> None:
    assert_range("repetition_penalty", [1, 0.5, 1.3], [0, -1])
    assert parse().sampling.repetition_penalty == 1.0


def test_g09_a_frequency_penalty_lies_within_two_of_zero() -> None:
    assert_range("frequency_penalty", [-2, 0, 2, 0.5], [-2.1, 2.1])
    assert parse().sampling.frequency_penalty == 0.0


def test_g10_a_presence_penalty_lies_within_two_of_zero() -> None:
    assert_range("presence_penalty", [-2, 0, 2, 0.5], [-2.1, 2.1])
    assert parse().sampling.presence_penalty == 0.0


def test_g11_top_k_is_above_zero_and_zero_or_minus_one_switch_it_off() -> None:
    """LoRAX refuses 0; callers of other servers write 0 or -1 for "off", so both pass and mean that."""
    assert_range("top_k", [1, 50], [-2, 2**31])
    for off in (0, -1):
        sampling = parse(top_k=off).sampling
        assert (sampling.top_k, sampling.do_sample) == (0, False)


def test_g12_top_p_is_above_zero_and_at_most_one() -> None:
    assert_range("top_p", [0.5, 0.99, 1.0], [0, -1, 1.1])


def test_g13_typical_p_lies_between_zero_and_one_and_is_neither() -> None:
    assert_range("typical_p", [0.5, 0.01, 0.99], [0, -1, 1])


def test_g15_max_new_tokens_is_at_least_one() -> None:
    assert_range("max_new_tokens", [1, 20], [0, -1])


def test_g19_truncate_is_at_least_one() -> None:
    assert parse(truncate=1).truncate == 1
    for bad in (0, -1):
        assert refusal(truncate=bad).startswith("truncate")


def test_g23_alternatives_are_as_many_as_are_asked_for_and_zero_is_none() -> None:
    for count in (1, 100):
        request = parse(return_k_alternatives=count)
        assert request.sampling.top_logprobs == count
        assert request.outputs.tokens
    for bad in (-1, 101):
        assert refusal(return_k_alternatives=bad).startswith("return_k_alternatives")
    for none in ({}, {"return_k_alternatives": 0}):
        assert parse(**none).sampling.top_logprobs is None


def test_g25_a_seed_is_an_unsigned_number_of_64_bits() -> None:
    assert_range("seed", [0, 1, 2**64 - 1], [-1, 2**64])
    assert parse(seed=0).seed_given
    assert not parse().seed_given


@pytest.mark.parametrize(
    ("values", "sampled"),
    [({"do_sample": True}, True), ({"typical_p": 0.4}, True), ({"typical_p": 0.4, "temperature": 0}, False)],
)
def test_g14_a_warper_switches_sampling_on_and_temperature_zero_off(
    values: dict[str, Any], sampled: bool
) -> None:
    assert parse(**values).sampling.do_sample is sampled


def prepared(tokenizer: TokenizerPool, limits: Limits, **values: Any) -> Any:
    return prepare(parse(**values), 1, tokenizer, limits)


def test_g15_g27_z03_lengths_are_refused_with_all_their_numbers(byte_level: TokenizerPool) -> None:
    limits = Limits(4, 5)
    ids = {"text_input": "", "input_ids": [5], "sampling_parameters": '{"max_new_tokens": 10}'}
    request = parse_request(RawRequest("", {k: v for k, v in ids.items() if v != ""}), ServerConfig())
    with pytest.raises(ValidationError) as caught:
        prepare(request, 1, byte_level, limits)
    assert all(number in caught.value.message for number in ("10", "1 token", "5"))
    too_long = parse_request(RawRequest("", {"input_ids": [5] * 5}), ServerConfig())
    with pytest.raises(ValidationError, match=r"5 tokens, at most 4 .*max_input_length"):
        prepare(too_long, 1, byte_level, limits)


def test_g15_the_default_is_all_that_the_limit_leaves(byte_level: TokenizerPool) -> None:
    engine_request, prompt = prepared(byte_level, Limits(200, 256))
    assert engine_request.sampling.max_new_tokens == 256 - len(prompt.ids)


def test_z03_best_of_without_sampling_top_p_above_one_and_its_default() -> None:
    assert "sampling" in refusal(best_of=2)
    assert "top_p" in refusal(top_p=1.1)
    assert parse(top_p=0.99).sampling.top_p == 0.99
    assert parse().sampling.top_p == 1.0


def test_g16_the_end_token_can_be_ignored(byte_level: TokenizerPool) -> None:
    assert prepared(byte_level, Limits(200, 256), ignore_eos_token=True)[0].sampling.stop_token_ids == ()
    assert prepared(byte_level, Limits(200, 256))[0].sampling.stop_token_ids == byte_level.eos_token_ids


def test_g17_the_prompt_is_kept_for_the_answer_where_asked(byte_level: TokenizerPool) -> None:
    assert prepared(byte_level, Limits(200, 256), return_full_text=True)[1].text == "hello"
    assert prepared(byte_level, Limits(200, 256))[1].text == ""


def test_g18_stop_strings_are_counted() -> None:
    assert parse(stop=list("abcd")).stop == tuple("abcd")
    assert "max_stop_sequences" in refusal(stop=list("abcde"))


def test_g19_truncation_keeps_the_last_tokens_and_comes_before_the_length_checks(
    byte_level: TokenizerPool,
) -> None:
    raw = RawRequest("", {"input_ids": list(range(10, 90))}, {"truncate": 3})
    engine_request, prompt = prepare(parse_request(raw, ServerConfig()), 1, byte_level, Limits(8, 12))
    assert engine_request.prompt_ids == prompt.ids == [87, 88, 89]
    raw = RawRequest("", {"input_ids": [1]}, {"truncate": 9})
    with pytest.raises(ValidationError, match="truncate: 9"):
        prepare(parse_request(raw, ServerConfig()), 1, byte_level, Limits(8, 12))


def test_g20_the_watermark_reaches_the_engine(byte_level: TokenizerPool) -> None:
    assert prepared(byte_level, Limits(200, 256), watermark=True)[0].sampling.watermark
    assert not parse().sampling.watermark


def test_g21_details_are_off_unless_asked_for() -> None:
    assert not parse().outputs.details
    assert parse(details=True).outputs.details


def test_g22_x09_prompt_details_force_details_and_are_refused_in_streams() -> None:
    request = parse(decoder_input_details=True)
    assert request.sampling.prompt_logprobs
    assert request.outputs.details
    fields = {"text_input": "x", "stream": True, "sampling_parameters": '{"decoder_input_details": true}'}
    with pytest.raises(ValidationError, match="decoder_input_details"):
        parse_request(RawRequest("", fields), ServerConfig())


def test_g24_the_chat_template_is_honoured(byte_level: TokenizerPool) -> None:
    request = parse(apply_chat_template=True)
    engine_request, _ = prepare(request, 1, byte_level, Limits(200, 256))
    rendered = byte_level.render_chat([{"role": "user", "content": "hello"}])
    assert engine_request.prompt_ids == byte_level.encode(rendered, add_special_tokens=False)


@pytest.mark.parametrize(
    "value", [{"type": "text"}, {"type": "text", "schema": {"type": "object"}}, {}, None, '{"type": "text"}']
)
def test_g26_a_response_format_of_type_text_does_not_constrain(value: Any) -> None:
    parse(response_format=value)


@pytest.mark.parametrize(
    ("values", "kind", "word"),
    [
        ({"response_format": {"type": "json_object"}}, UnsupportedError, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, UnsupportedError, "format"),
        ({"response_format": {"type": "xml"}}, ValidationError, "json_schema"),
        ({"response_format": {"schema": {}}}, ValidationError, "type"),
        ({"response_format": {"type": "json_schema", "schema": 5}}, ValidationError, "schema"),
        ({"schema": "{oops"}, ValidationError, "not valid JSON"),
        ({"schema": {"type": "object"}, "guided_regex": "a"}, ValidationError, "both constrain"),
        ({"guided_choice": ["a", "b"]}, UnsupportedError, "guided_choice"),
        ({"tool_choice": "required"}, ValidationError, "needs tools"),
        ({"tool_choice": "required", "tools": [{"type": "function"}]}, UnsupportedError, "tool_choice"),
    ],
)  # fmt: skip
def test_g26_constraints_are_checked_and_refused_by_name(
    values: dict[str, Any], kind: type[LoraxError], word: str
) -> None:
    with pytest.raises(kind, match=word) as caught:
        parse(**values)
    assert type(caught.value) is kind


@pytest.mark.parametrize("bias", [{"x": 1}, {"-1": 1}, {"5": 101}, {"5": "high"}, {"5": True}])
def test_logit_bias_names_ids_and_numbers_within_a_hundred(bias: dict[str, Any]) -> None:
    assert "logit_bias[" in refusal(logit_bias=bias)


def test_logit_bias_beyond_the_vocabulary_is_refused(byte_level: TokenizerPool) -> None:
    assert parse(logit_bias={"5": 1.5, "7": -100}).sampling.logit_bias == ((5, 1.5), (7, -100.0))
    with pytest.raises(ValidationError, match=r"logit_bias\[384\]"):
        prepared(byte_level, Limits(200, 256), logit_bias={"384": 1})


def test_the_wait_in_the_queue_is_the_requests_or_the_servers() -> None:
    assert parse().queue_timeout_s is None
    assert parse({"queue_timeout_s": 9.0}).queue_timeout_s == 9.0
    assert parse({"queue_timeout_s": 9.0}, queue_timeout_s=2).queue_timeout_s == 2.0
    assert "queue_timeout_s" in refusal(queue_timeout_s=0)


def test_a62_the_default_adapter_serves_requests_that_name_none_but_not_those_for_the_base() -> None:
    options = {"adapter_id": "org/own@v3"}
    assert parse(options).adapter == AdapterRef("hub", "org/own", "v3")
    assert parse(options, adapter_id="__base_model__").adapter is None
    assert parse(options, adapter_id="org/other").adapter == AdapterRef("hub", "org/other")
    assert parse({"adapter_id": "/own", "adapter_source": "local"}).adapter == AdapterRef("local", "/own")
