"""The built-in model with its eight example adapters through a real tritonserver, against transformers and PEFT."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.triton, pytest.mark.slow]

MAX_TOKENS = 24
FINISH = {"eos": "eos_token", "length": "length"}


@pytest.fixture(scope="module")
def requests(reference, adapters_path):
    """(adapter name, index of the prompt, inputs) of every reference answer, adapters mixed."""
    return [
        (
            name,
            index,
            {
                "input_ids": prompt["ids"],
                "max_tokens": MAX_TOKENS,
                "adapter_id": "" if name == "base" else str(adapters_path / name),
                "stream": index % 2 == 0,
                "sampling_parameters": json.dumps({"return_k_alternatives": 5}),
                "return_token_ids": True,
                "return_finish_reason": True,
            },
        )
        for index, prompt in enumerate(reference["prompts"])
        for name in reference["outputs"]
    ]


def test_one_mixed_load_gives_every_reference_answer(
    start_server, connect, smollm2_path, reference, requests
):
    server = start_server(
        {"model_id": str(smollm2_path), "default_adapter_source": "local", "max_total_tokens": "256"},
        models=("lorax",),
    )
    caller = connect(server)

    streams = [caller.stream(inputs, timeout=240.0) for _, _, inputs in requests]
    answers = [stream.rest() for stream in streams]

    for (name, index, _), answer in zip(requests, answers, strict=True):
        expected = reference["outputs"][name][index]
        assert answer.error is None, (name, index, answer.error)
        assert answer.token_ids == expected["ids"], (name, index)
        assert answer.last("finish_reason") == [FINISH[expected["finish"]]], (name, index)
        first = json.loads(answer.responses[0].outputs["tokens"][0])
        alternatives = {token["id"]: token["logprob"] for token in first["alternative_tokens"]}
        assert alternatives == pytest.approx(dict(expected["first_top5"]), abs=1e-3), (name, index)
    by_adapter = {
        name: answer.text for (name, index, _), answer in zip(requests, answers, strict=True) if index == 0
    }
    assert len(set(by_adapter.values())) == len(by_adapter), "two adapters gave the same answer"
    caller.control("check")
