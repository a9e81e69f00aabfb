"""Embeddings and classes: what is asked of the server and how its answers are read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fake_triton_server import Call, FakeTriton, Script, error_json, error_response, response
from tritonclient.grpc import service_pb2

from lorax_triton import (
    AsyncClient,
    ClassifyResponse,
    Client,
    EmbedResponse,
    IncompleteGenerationError,
    MergedAdapters,
    UnsupportedError,
    ValidationError,
)

Serve = Callable[[Script], FakeTriton]
ENTITY = {"entity_group": "PER", "score": 0.5, "word": "ann", "start": 0, "end": 3}


def task(call: Call) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(call.inputs["embedding_request"][0])
    return parsed


def embedding(rows: list[list[float]]) -> Any:
    """A response with the rows one after another in an FP32 tensor."""
    message = service_pb2.ModelInferResponse(model_name="lorax")
    message.parameters["triton_final_response"].bool_param = True
    raw = np.array(rows, np.float32).tobytes()
    message.outputs.add(name="embedding", datatype="FP32", shape=[len(raw) // 4])
    message.raw_output_contents.append(raw)
    return service_pb2.ModelStreamInferResponse(infer_response=message)


def model(call: Call) -> Iterator[Any]:
    """Embeds a text as its length and twice it; finds one entity in each text."""
    texts = task(call)["input"]
    if task(call)["task"] == "embed":
        yield embedding([[len(text), 2 * len(text)] for text in texts])
    else:
        yield response(True, details=[json.dumps({"entities": [[ENTITY] for _ in texts]})])


def test_a_text_has_one_embedding_and_a_list_has_one_each(serve: Serve) -> None:
    fake = serve(model)
    with Client(fake.url, headers={"Authorization": "Bearer t"}) as client:
        assert client.embed("abc") == EmbedResponse([3.0, 6.0])
        assert client.embed(["a", "bb"]) == [EmbedResponse([1.0, 2.0]), EmbedResponse([2.0, 4.0])]
        client.embed("x", adapter_id="a", adapter_source="hub", api_token="mine")
        client.embed("x", merged_adapters=MergedAdapters(["a", "b"]))
    assert task(fake.calls[1]) == {"task": "embed", "input": ["a", "bb"]}
    assert fake.calls[0].inputs["api_token"] == ["t"]
    assert fake.calls[2].inputs["adapter_id"] == ["a"]
    assert fake.calls[2].inputs["adapter_source"] == ["hub"]
    assert fake.calls[2].inputs["api_token"] == ["mine"]
    assert "merged_adapters" in fake.calls[3].inputs["sampling_parameters"][0]


def test_classes_come_for_one_text_and_for_many(serve: Serve) -> None:
    fake = serve(model)
    with Client(fake.url) as client:
        assert client.classify("ann") == ClassifyResponse([ENTITY])
        assert client.classify_batch(["ann", "bo"]) == [ClassifyResponse([ENTITY])] * 2
    assert task(fake.calls[1]) == {"task": "classify", "input": ["ann", "bo"]}


def test_the_asynchronous_client_does_the_same(serve: Serve) -> None:
    fake = serve(model)

    async def main() -> None:
        async with AsyncClient(fake.url) as client:
            assert await client.embed("abc") == EmbedResponse([3.0, 6.0])
            assert len(await client.embed(["a", "bb"])) == 2
            assert await client.classify("ann") == ClassifyResponse([ENTITY])
            assert await client.classify_batch(["ann", "bo"]) == [ClassifyResponse([ENTITY])] * 2

    asyncio.run(main())


def test_a_server_without_such_a_model_says_so(serve: Serve) -> None:
    message = error_json("embedding_request: tiny generates text", "unsupported", 422)
    fake = serve(lambda call: iter([error_response(message)]))
    with Client(fake.url) as client:
        for call in (client.embed, client.classify, lambda text: client.classify_batch([text])):
            with pytest.raises(UnsupportedError, match="tiny generates text"):
                call("x")


def test_an_answer_without_what_was_asked_for_is_incomplete(serve: Serve) -> None:
    fake = serve(lambda call: iter([response(True, details=[json.dumps({"entities": [[]]})])]))
    with Client(fake.url) as client:
        with pytest.raises(IncompleteGenerationError, match="embeddings"):
            client.embed("x")
        with pytest.raises(IncompleteGenerationError, match="2 texts"):
            client.classify_batch(["x", "y"])
    fake = serve(lambda call: iter(()))
    with Client(fake.url) as client, pytest.raises(IncompleteGenerationError):
        client.embed("x")


def test_empty_inputs_are_refused_before_anything_is_sent(serve: Serve) -> None:
    fake = serve(model)
    with Client(fake.url) as client:
        for inputs in ("", [], ["x", ""]):
            with pytest.raises(ValidationError, match="inputs"):
                client.embed(inputs)
        with pytest.raises(ValidationError, match="adapter_source"):
            client.embed("x", adapter_id="a", adapter_source="moon")
    assert not fake.calls
