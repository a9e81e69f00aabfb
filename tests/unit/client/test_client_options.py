"""Arguments beyond LoRAX's: schemas, deadlines, priorities, and whatever else a server may know."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_triton_server import FakeTriton, Script, answer

from lorax_triton import Client, MergedAdapters, Parameters, ResponseFormat, ValidationError

Serve = Callable[[Script], FakeTriton]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}


def sent(fake: FakeTriton, index: int = -1) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(fake.calls[index].inputs["sampling_parameters"][0])
    return parsed


class Model:
    """Stands for a pydantic model class."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMA


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA), Model], ids=["object", "text", "pydantic"])
def test_json_schema_is_another_way_to_write_a_response_format(serve: Serve, schema: Any) -> None:
    fake = serve(lambda call: answer("{}"))
    with Client(fake.url) as client:
        client.generate("x", json_schema=schema)
        client.generate("x", response_format={"type": "json_object", "schema": SCHEMA})
        list(client.generate_stream("x", json_schema=schema))
        client.generate("x", response_format=ResponseFormat("json_object", SCHEMA))
    assert [sent(fake, n) for n in range(4)] == [
        {"response_format": {"type": "json_object", "schema": SCHEMA}}
    ] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"json_schema": "{"}, "not valid JSON"),
        ({"json_schema": "[]"}, "not list"),
        ({"json_schema": 3}, "not int"),
        ({"json_schema": SCHEMA, "response_format": {"type": "json_object"}}, "not both"),
        ({"response_format": {"type": "yaml"}}, "text, json_object, json_schema"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        ({"queue_timeout": 0}, "queue_timeout"),
        ({"queue_timeout": float("inf")}, "queue_timeout"),
        ({"priority": 1.5}, "priority"),
        ({"extra_parameters": {"x": {1, 2}}}, "JSON"),
        ({"extra_parameters": {"x": float("nan")}}, "JSON"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_sent(
    serve: Serve, arguments: dict[str, Any], message: str
) -> None:
    fake = serve(lambda call: answer("x"))
    with Client(fake.url) as client, pytest.raises(ValidationError, match=message):
        client.generate("x", **arguments)
    assert not fake.calls


def test_options_travel_by_the_servers_names(serve: Serve) -> None:
    fake = serve(lambda call: answer("x"))
    with Client(fake.url) as client:
        client.generate(
            "x",
            priority=-3,
            queue_timeout=1.5,
            apply_chat_template=True,
            min_new_tokens=0,
            extra_parameters={"min_p": 0.1},
        )
    assert sent(fake) == {
        "priority": -3,
        "queue_timeout_s": 1.5,
        "apply_chat_template": True,
        "min_new_tokens": 0,
        "min_p": 0.1,
    }


def test_an_argument_that_does_not_exist_is_a_type_error(serve: Serve) -> None:
    fake = serve(lambda call: answer("x"))
    with Client(fake.url) as client:
        for call in (client.generate, client.generate_stream):
            with pytest.raises(TypeError, match="tempreature"):
                call("x", tempreature=1.0)  # type: ignore[call-arg]
    assert not fake.calls


def test_both_spellings_of_a_merge_ask_for_the_same(serve: Serve) -> None:
    fake = serve(lambda call: answer("x"))
    spellings = [
        MergedAdapters(["a", "b"], [1.0, 0.5], "linear"),
        MergedAdapters(adapters=[{"adapter_id": "a"}, {"adapter_id": "b", "alpha": 0.5}], strategy="linear"),
    ]
    with Client(fake.url) as client:
        for merged in spellings:
            client.generate("x", merged_adapters=merged)
    assert sent(fake, 0) == sent(fake, 1)
    assert sent(fake, 0)["merged_adapters"] == {
        "ids": ["a", "b"],
        "weights": [1.0, 0.5],
        "merge_strategy": "linear",
    }


def test_parameters_can_be_copied_and_do_not_show_their_token() -> None:
    import dataclasses

    parameters = Parameters(json_schema=SCHEMA, api_token="secret")
    copy = dataclasses.replace(parameters, top_k=3)
    assert copy.response_format == parameters.response_format
    assert "secret" not in repr(parameters)


def test_the_results_of_best_of_and_prefill_are_read(serve: Serve) -> None:
    first = {"id": 1, "text": "a", "logprob": None}
    other = {
        "generated_text": "y",
        "finish_reason": "length",
        "generated_tokens": 1,
        "seed": 7,
        "prefill": [first],
        "tokens": [{"id": 2, "text": "y", "logprob": -1.0, "special": False, "skipped": False}],
    }
    fake = serve(
        lambda call: answer(
            "x", prefill=[first, first | {"logprob": -2.0}], best_of_sequences=[other], seed=5
        )
    )
    with Client(fake.url) as client:
        got = client.generate("ab", best_of=2, do_sample=True, decoder_input_details=True)
    assert sent(fake) == {"best_of": 2, "do_sample": True, "decoder_input_details": True}
    assert got.details is not None
    assert [token.logprob for token in got.details.prefill] == [None, -2.0]
    assert got.details.seed == 5
    (sequence,) = got.details.best_of_sequences or ()
    assert (sequence.generated_text, sequence.seed, sequence.finish_reason.value) == ("y", 7, "length")
    assert (sequence.tokens[0].id, sequence.prefill[0].text) == (2, "a")


def test_tokenize_asks_the_engine(serve: Serve) -> None:
    from fake_triton_server import response

    tokens = [{"id": 1, "text": "a", "start": 0, "stop": 1}]
    fake = serve(lambda call: iter([response(True, details=[json.dumps({"tokens": tokens})])]))
    with Client(fake.url) as client:
        assert client.tokenize("a", add_special_tokens=False) == tokens
    assert json.loads(fake.calls[0].inputs["control"][0]) == {
        "command": "tokenize",
        "inputs": "a",
        "add_special_tokens": False,
    }
