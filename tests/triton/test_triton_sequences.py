"""Several answers to one request, details of the prompt, and processors of logits, through a real tritonserver."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.triton

PROMPT = "hello world this is"
EXACT = {"ignore_eos_token": True}


def test_n_streamed_sequences_come_interleaved_with_their_index(caller):
    inputs = {"text_input": PROMPT, "max_tokens": 6, "stream": True, "seed": 5, "return_token_ids": True}
    asked = {**inputs, "return_details": True, "temperature": 1.5}

    answer = caller.generate(asked, parameters=EXACT | {"n": 3})
    alone = [caller.generate(asked | {"seed": 5 + index}, parameters=EXACT).token_ids for index in range(3)]

    assert answer.error is None
    by_index: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for part in answer.responses:
        if "sequence_index" in part.outputs:
            by_index[part.outputs["sequence_index"][0]] += part.outputs["token_ids"]
    assert list(by_index.values()) == alone  # the i-th sequence is what seed + i gives, in any batch
    assert [part.final for part in answer.responses] == [False] * (len(answer.responses) - 1) + [True]
    ends = [json.loads(part.outputs["details"][0]) for part in answer.responses if "details" in part.outputs]
    assert sorted(end["index"] for end in ends) == [0, 1, 2]
    assert all(end["finish_reason"] == "length" for end in ends)


def test_best_of_returns_the_likeliest_and_reports_the_other(caller):
    inputs = {"text_input": PROMPT, "max_tokens": 5, "return_details": True, "return_tokens": True}

    answer = caller.generate(inputs, parameters=EXACT | {"best_of": 2, "do_sample": True})

    assert answer.error is None
    assert len(answer.responses) == 1
    assert "sequence_index" not in answer.responses[0].outputs
    (other,) = answer.details["best_of_sequences"]
    assert answer.details["cumulative_logprob"] >= other["cumulative_logprob"]
    assert len(other["tokens"]) == other["generated_tokens"] == 5
    repeated = caller.generate({**inputs, "seed": other["seed"]}, parameters=EXACT | {"do_sample": True})
    assert repeated.text == other["generated_text"]


def test_the_prompts_tokens_come_with_log_probabilities(caller):
    inputs = {"text_input": PROMPT, "max_tokens": 1}

    first = caller.generate(inputs, parameters={"decoder_input_details": True}).details["prefill"]
    again = caller.generate(inputs, parameters={"decoder_input_details": True}).details["prefill"]

    assert first[0]["logprob"] is None
    assert all(entry["logprob"] < 0 for entry in first[1:])
    assert "".join(entry["text"] for entry in first).strip() == PROMPT
    assert again == first  # the prefix cache hides nothing


def test_a_stream_with_prompt_details_is_refused(caller):
    inputs = {"text_input": PROMPT, "max_tokens": 1, "stream": True}

    error = caller.generate(inputs, parameters={"decoder_input_details": True}).error

    assert error["error_type"] == "validation"


@pytest.mark.parametrize(
    "parameters", [{"watermark": True}, {"typical_p": 0.3, "seed": 3}, {"repetition_penalty": 1.8}]
)
def test_processors_change_the_answer_and_repeat_it(caller, parameters):
    inputs = {"text_input": PROMPT, "max_tokens": 24}

    plain = caller.generate(inputs, parameters=EXACT)
    changed = [caller.generate(inputs, parameters=EXACT | parameters) for _ in range(2)]

    assert changed[0].error is None
    assert changed[0].text == changed[1].text != plain.text


def test_a_biased_token_is_always_drawn(caller):
    bias = {"max_tokens": 4, "logit_bias": {"70": 100}, "ignore_eos": True}
    answer = caller.generate(
        {"text_input": PROMPT, "return_token_ids": True, "sampling_parameters": json.dumps(bias)}
    )

    assert answer.token_ids == [70] * 4


def test_tokenize_answers_with_offsets(caller):
    tokens = caller.control("tokenize", inputs=PROMPT)["tokens"]

    assert "".join(PROMPT[token["start"] : token["stop"]] for token in tokens) == PROMPT


def test_commands_that_change_something_are_refused_without_a_key(caller):
    command = json.dumps({"command": "alias_set", "alias": "a", "adapter_id": "b"})

    assert caller.generate({"control": command}).error["error_type"] == "unauthorized"


@pytest.mark.parametrize("parameters", [{"timeout": 1}, {"queue_timeout_s": 1e-6}])
def test_a_deadline_that_has_passed_refuses_the_request_by_either_name(caller, parameters):
    error = caller.generate({"text_input": PROMPT, "max_tokens": 3}, parameters=parameters).error

    assert (error["error_type"], error["http_status"]) == ("overloaded", 429)
    assert error["retry_after_s"] >= 1


def test_a_deadline_that_has_not_passed_changes_nothing(caller):
    answer = caller.generate({"text_input": PROMPT, "max_tokens": 3}, parameters={"timeout": 60_000_000})

    assert answer.error is None
