"""What a caller of a real tritonserver gets: the forms of prompts, answers and parameters."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from triton_calls import http_post

pytestmark = pytest.mark.triton

PROMPT = "hello world this is"
# A random model ends when it likes; these answers have a known length.
EXACT = {"ignore_eos_token": True}


def sse_events(body: str) -> list[dict]:
    return [
        json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")
    ]


def test_streamed_pieces_put_together_are_the_answer_in_one_piece(caller):
    inputs = {"text_input": PROMPT, "max_tokens": 40, "return_token_ids": True}

    whole = caller.generate({**inputs, "stream": False}, parameters=EXACT)
    streamed = caller.generate({**inputs, "stream": True}, parameters=EXACT)

    assert whole.error is None
    assert len(whole.token_ids) == 40
    assert streamed.text == whole.text
    assert streamed.token_ids == whole.token_ids
    assert len(streamed.responses) > 1


def test_without_streaming_there_is_exactly_one_response_and_it_is_final(caller):
    answer = caller.generate({"text_input": PROMPT, "max_tokens": 8}, parameters=EXACT, request_id="mine")

    assert [(part.final, part.request_id) for part in answer.responses] == [(True, "mine")]


def test_the_final_flag_comes_with_the_last_token_and_only_there(caller):
    inputs = {"text_input": PROMPT, "max_tokens": 12, "stream": True, "return_token_ids": True}

    parts = caller.generate(inputs, parameters=EXACT).responses

    assert [part.final for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].outputs["token_ids"]


def test_only_the_outputs_asked_for_are_sent(caller):
    plain = caller.generate({"text_input": PROMPT, "max_tokens": 4}, parameters=EXACT)
    flagged = caller.generate(
        {
            "text_input": PROMPT,
            "max_tokens": 4,
            "return_finish_reason": True,
            "return_num_output_tokens": True,
        },
        parameters=EXACT,
    )
    named = caller.generate(
        {"text_input": PROMPT, "max_tokens": 4}, parameters=EXACT, outputs=("text_output", "finish_reason")
    )

    assert set(plain.responses[0].outputs) == {"text_output"}
    assert set(flagged.responses[0].outputs) == {"text_output", "finish_reason", "num_output_tokens"}
    assert set(named.responses[0].outputs) == {"text_output", "finish_reason"}


def test_text_and_its_ids_get_the_same_answer(caller, tiny_llama):
    ids = Tokenizer.from_file(str(tiny_llama / "tokenizer.json")).encode(PROMPT).ids

    by_text = caller.generate({"text_input": PROMPT, "max_tokens": 10}, parameters=EXACT)
    by_ids = caller.generate({"input_ids": ids, "max_tokens": 10}, parameters=EXACT)

    assert by_ids.error is None
    assert by_ids.text == by_text.text


def test_messages_are_rendered_with_the_chat_template(caller):
    messages = json.dumps([{"role": "user", "content": "hello"}])
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"

    chat = caller.generate({"messages": messages, "max_tokens": 10}, parameters=EXACT)
    text = caller.generate({"text_input": rendered, "max_tokens": 10}, parameters=EXACT)

    assert chat.error is None
    assert chat.text == text.text


def test_all_details_of_an_answer_agree_with_each_other(caller):
    inputs = {"text_input": PROMPT, "max_tokens": 6, "temperature": 0.7, "seed": 2**63 + 5}
    asks = ["return_details", "return_tokens", "return_token_ids", "return_logprobs", "return_cumulative_logprob",
            "return_finish_reason", "return_num_input_tokens", "return_num_output_tokens"]  # fmt: skip

    answer = caller.generate(inputs | dict.fromkeys(asks, True), parameters=EXACT)

    tokens = [json.loads(token) for token in answer.last("tokens")]
    details = answer.details
    assert [token["id"] for token in tokens] == answer.token_ids
    shown = [token["text"] for token in tokens if not token["special"]]
    assert "".join(shown) == answer.text == details["generated_text"]
    assert sum(token["logprob"] for token in tokens) == pytest.approx(
        answer.last("cumulative_logprob")[0], rel=1e-4
    )
    assert answer.last("num_output_tokens") == [6] == [details["generated_tokens"]]
    assert answer.last("num_input_tokens") == [details["prompt_tokens"]]
    assert answer.last("finish_reason") == ["length"] == [details["finish_reason"]]
    assert details["seed"] == 2**63 + 5
    assert {"queue", "first_token", "total"} <= set(details["timings"])
    logprobs = json.loads(answer.last("logprobs")[0])
    assert [entry[str(token["id"])]["logprob"] for entry, token in zip(logprobs, tokens, strict=True)] == [
        token["logprob"] for token in tokens
    ]


def test_streamed_counts_add_up_to_the_whole(caller):
    inputs = {"text_input": PROMPT, "max_tokens": 9, "stream": True, "return_num_output_tokens": True}

    parts = caller.generate(inputs, parameters=EXACT).responses

    assert sum(part.outputs["num_output_tokens"][0] for part in parts) == 9


def test_a_tensor_wins_over_the_json_which_wins_over_a_request_parameter(caller):
    def generated(inputs, parameters=None):
        answer = caller.generate(
            {"text_input": PROMPT, "return_details": True, **inputs},
            parameters={**EXACT, **(parameters or {})},
        )
        assert answer.error is None, answer.error
        return answer.details["generated_tokens"]

    by_json = {"sampling_parameters": json.dumps({"max_tokens": 5})}
    assert generated({}, {"max_tokens": 3}) == 3
    assert generated(by_json, {"max_tokens": 3}) == 5
    assert generated({**by_json, "max_tokens": 7}, {"max_tokens": 3}) == 7


def test_a_request_in_the_words_of_nvidias_vllm_backend_works(caller, tiny_adapters):
    sampling = {"max_tokens": "6", "min_tokens": "6", "temperature": "0", "ignore_eos": True, "model": "any",
                "lora_name": tiny_adapters[1]}  # fmt: skip
    inputs = {
        "text_input": PROMPT,
        "stream": False,
        "exclude_input_in_output": False,
        "sampling_parameters": json.dumps(sampling),
        "return_finish_reason": True,
        "return_cumulative_logprob": True,
        "return_logprobs": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }

    answer = caller.generate(inputs)
    ours = caller.generate(
        {"text_input": PROMPT, "max_tokens": 6, "adapter_id": tiny_adapters[1]}, parameters=EXACT
    )

    assert answer.error is None, answer.error
    assert answer.text == PROMPT + ours.text
    assert answer.last("finish_reason") == ["length"]
    assert answer.last("num_output_tokens") == [6]


def test_the_same_seed_draws_the_same_answer_and_another_seed_another(caller):
    def drawn(seed):
        inputs = {"text_input": PROMPT, "max_tokens": 16, "temperature": 1.0, "seed": seed}
        return caller.generate(inputs, parameters=EXACT).text

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_each_adapter_answers_in_its_own_way(caller, tiny_adapters):
    answers = {
        adapter: caller.generate(
            {"text_input": PROMPT, "max_tokens": 16, "adapter_id": adapter}, parameters=EXACT
        )
        for adapter in ["", *tiny_adapters]
    }

    assert [answer.error for answer in answers.values()] == [None] * 4
    assert len({answer.text for answer in answers.values()}) == 4


def test_a_stop_word_ends_the_answer(caller):
    free = caller.generate({"text_input": PROMPT, "max_tokens": 30}, parameters=EXACT).text
    stop = free[len(free) // 2 :][:2]

    inputs = {"text_input": PROMPT, "max_tokens": 30, "stop_words": [stop], "return_finish_reason": True}
    answer = caller.generate(inputs, parameters=EXACT)

    assert answer.last("finish_reason") == ["stop_sequence"]
    assert answer.text == free[: free.index(stop) + len(stop)]


@pytest.mark.parametrize(
    "inputs",
    [
        {"text_input": PROMPT},
        {"messages": json.dumps([{"role": "user", "content": PROMPT}])},
        {"input_ids": [5, 6, 7, 8]},
        {"text_input": PROMPT, "sampling_parameters": json.dumps({"truncate": 3, "top_k": "5", "seed": 3})},
        {"text_input": PROMPT, "exclude_input_in_output": False},
    ],
    ids=["text", "messages", "ids", "truncated", "with the prompt"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_ensemble_answers_as_the_model_itself(caller, tiny_adapters, inputs, stream):
    inputs = {**inputs, "max_tokens": 12, "stream": stream, "adapter_id": tiny_adapters[0],
              "return_token_ids": True, "return_finish_reason": True, "return_num_input_tokens": True}  # fmt: skip

    direct = caller.generate(inputs, parameters=EXACT)
    ensemble = caller.generate(inputs, parameters=EXACT, model="lorax_ensemble")

    assert direct.error is None, direct.error
    assert ensemble.error is None, ensemble.error
    assert len(direct.token_ids) == 12
    for output in ("token_ids", "text"):
        assert getattr(ensemble, output) == getattr(direct, output)
    assert ensemble.last("num_input_tokens") == direct.last("num_input_tokens")
    assert ensemble.responses[-1].final


def test_http_generate_answers_once(server, caller):
    status, body = http_post(
        server.http_address,
        "/v2/models/lorax/generate",
        {
            "text_input": PROMPT,
            "max_tokens": 10,
            "return_finish_reason": True,
            "stop_words": ["zzzz", "yyyy"],
            "parameters": EXACT,
        },
    )

    answer = json.loads(body)
    assert status == 200
    assert (
        answer["text_output"]
        == caller.generate({"text_input": PROMPT, "max_tokens": 10}, parameters=EXACT).text
    )
    assert answer["finish_reason"] == "length"


def test_http_generate_stream_sends_events(server, caller):
    status, body = http_post(
        server.http_address,
        "/v2/models/lorax/generate_stream",
        {"text_input": PROMPT, "max_tokens": 10, "stream": True, "ignore_eos_token": True},
    )

    events = sse_events(body)
    assert status == 200
    assert len(events) > 1
    whole = caller.generate({"text_input": PROMPT, "max_tokens": 10}, parameters=EXACT).text
    assert "".join(event["text_output"] for event in events) == whole


def test_http_generate_reports_an_error_with_its_status(server):
    status, body = http_post(
        server.http_address, "/v2/models/lorax/generate", {"text_input": PROMPT, "top_p": 2.0}
    )

    assert status == 400
    error = json.loads(json.loads(body)["error"])
    assert error["error_type"] == "validation"
    assert "top_p" in error["error"]


def test_control_tells_facts_state_and_adapters(caller, tiny_adapters):
    caller.generate({"text_input": PROMPT, "max_tokens": 2, "adapter_id": tiny_adapters[2]})

    info, stats, adapters = (caller.control(command) for command in ("info", "stats", "adapters"))

    assert info["max_total_tokens"] == 4096
    assert info["num_blocks"] == stats["blocks_total"] == 1200
    assert stats["generated_tokens"] > 0
    assert tiny_adapters[2] in [adapter["id"] for adapter in adapters["adapters"]]
    caller.control("check")


def test_an_unknown_control_command_is_refused_by_name(caller):
    answer = caller.generate({"control": json.dumps({"command": "dance"})})

    assert answer.error["error_type"] == "validation"
    assert "dance" in answer.error["error"]
