"""The rarer parts of an answer's details: the prompt's tokens, and sequences that were not picked."""

from __future__ import annotations

import pytest
from gateway_calls import GatewayCaller

pytestmark = pytest.mark.triton


def test_p03_prefill_tokens_come_when_asked_for_and_the_first_has_no_logprob(gateway: GatewayCaller) -> None:
    answer = gateway.generate("hello there", max_new_tokens=2, decoder_input_details=True)
    assert answer.status == 200, answer.body
    details = answer.json["details"]  # asking for the prompt's details asks for details
    assert [set(token) for token in details["prefill"]] == [{"id", "text", "logprob"}] * details[
        "prompt_tokens"
    ]
    assert details["prefill"][0]["logprob"] is None
    assert all(token["logprob"] <= 0 for token in details["prefill"][1:])


def test_p06_best_of_shows_the_sequences_that_were_not_picked(gateway: GatewayCaller) -> None:
    answer = gateway.generate(max_new_tokens=4, best_of=2, do_sample=True, temperature=2.0, details=True)
    assert answer.status == 200, answer.body
    (other,) = answer.json["details"]["best_of_sequences"]
    wanted = {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"}
    assert wanted <= set(other)
    assert len(other["tokens"]) == other["generated_tokens"]
