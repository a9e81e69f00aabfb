"""The client package against a real tritonserver: texts, errors, cancelling and control requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lorax_backend.server.launch import TritonServer
from lorax_triton import (
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AsyncClient,
    Client,
    FinishReason,
    LoraxError,
    MergedAdapters,
    NotFoundError,
    RequestCancelledError,
    Response,
    Token,
    TokenStream,
    UnauthorizedError,
    UnsupportedError,
    ValidationError,
)

pytestmark = pytest.mark.triton

PROMPT = "hello world this is"
PATIENCE_S = 60.0
LONG = 2000


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_address, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def ensemble(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_address, timeout=60, model_name="lorax_ensemble") as client:
        yield client


def wait_idle(client: Client) -> int:
    """Wait until the engine runs nothing and holds no block; the tokens that it has generated so far."""
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE_S:
        stats = client.stats()
        if not (stats["running"] or stats["waiting"] or stats["blocks_used"]):
            return int(stats["generated_tokens"])
    pytest.fail(f"still busy after {PATIENCE_S} s: {stats}")


@contextmanager
def freed_early(client: Client) -> Iterator[None]:
    """The one long request within is ended long before its answer would be: told by tokens, not by the clock, which on
    a busy machine says nothing."""
    before = wait_idle(client)
    yield
    assert wait_idle(client) - before < LONG - 100


def shown_text(stream: TokenStream) -> str:
    return "".join(item.token.text for item in stream if not item.token.special)


@pytest.mark.parametrize("adapter", [None, 0, 1, 2])
def test_streamed_tokens_are_the_text_of_the_answer_in_one_piece(
    client: Client, tiny_adapters: list[str], adapter: int | None
) -> None:
    adapter_id = None if adapter is None else tiny_adapters[adapter]
    whole = client.generate(PROMPT, adapter_id, max_new_tokens=24, ignore_eos_token=True)
    items = list(client.generate_stream(PROMPT, adapter_id, max_new_tokens=24, ignore_eos_token=True))
    assert whole.details is not None
    assert whole.details.generated_tokens == len(whole.details.tokens) == 24
    assert [item.token.id for item in items] == [item.id for item in whole.details.tokens]
    assert items[-1].generated_text == whole.generated_text
    assert "".join(item.token.text for item in items if not item.token.special) == whole.generated_text
    assert all(item.logprob is not None and item.logprob <= 0 for item in whole.details.tokens)
    assert whole.details.finish_reason is FinishReason.Length
    assert items[-1].details is not None
    assert items[-1].details.prompt_tokens == whole.details.prompt_tokens


def test_messages_ids_full_text_and_alternatives_arrive(client: Client) -> None:
    full = client.generate(PROMPT, max_new_tokens=4, return_full_text=True).generated_text
    assert full.startswith(PROMPT)
    assert (
        list(client.generate_stream(PROMPT, max_new_tokens=4, return_full_text=True))[-1].generated_text
        == full
    )
    chosen = client.generate(
        input_ids=[5, 6, 7], max_new_tokens=3, return_k_alternatives=2, ignore_eos_token=True
    )
    assert chosen.details is not None
    assert chosen.details.prompt_tokens == 3
    for token in chosen.details.tokens:
        assert token.alternative_tokens is not None
        assert len(token.alternative_tokens) == 2
        assert token.alternative_tokens[0].id == token.id
    sampled = [
        client.generate(PROMPT, temperature=1.0, seed=7, max_new_tokens=8).generated_text for _ in range(2)
    ]
    assert sampled[0] == sampled[1]
    assert client.generate(PROMPT, details=False, max_new_tokens=2).details is None


def test_every_refusal_has_the_exception_of_its_kind_and_names_the_field(
    client: Client, ensemble: Client, tiny_adapters: list[str]
) -> None:
    for one in (client, ensemble):
        with pytest.raises(AdapterNotFoundError, match="no/such"):
            one.generate(PROMPT, "/no/such/adapter")
        with pytest.raises(ValidationError, match="max_total_tokens"):
            one.generate(PROMPT, max_new_tokens=10**6)
    with pytest.raises(UnsupportedError, match="response_format"):
        client.generate(PROMPT, response_format={"type": "json_object", "schema": {"type": "object"}})
    with pytest.raises(UnsupportedError, match="merged_adapters"):
        client.generate(PROMPT, merged_adapters=MergedAdapters(tiny_adapters[:2]))
    for ask in (client.embed, client.classify):
        with pytest.raises(UnsupportedError, match="is served to generate text"):
            ask(PROMPT)
    with pytest.raises(UnauthorizedError, match="administrator"):
        client.adapters.unload(tiny_adapters[0])


def test_the_likeliest_of_several_answers_comes_with_the_others(client: Client) -> None:
    got = client.generate(PROMPT, best_of=2, temperature=1.0, max_new_tokens=6, ignore_eos_token=True)
    assert got.details is not None
    assert got.details.best_of_sequences is not None
    (other,) = got.details.best_of_sequences
    assert other.generated_tokens == len(other.tokens) == got.details.generated_tokens == 6

    def score(tokens: list[Token]) -> float:
        return sum(token.logprob or 0.0 for token in tokens)

    assert score(got.details.tokens) >= score(other.tokens)
    again = client.generate(PROMPT, seed=other.seed, temperature=1.0, max_new_tokens=6, ignore_eos_token=True)
    assert again.generated_text == other.generated_text


def test_the_prompts_own_tokens_come_with_their_log_probabilities(client: Client) -> None:
    got = client.generate(PROMPT, decoder_input_details=True, max_new_tokens=1)
    assert got.details is not None
    prefill = got.details.prefill
    assert len(prefill) == got.details.prompt_tokens
    assert prefill[0].logprob is None
    assert all(token.logprob is not None and token.logprob <= 0 for token in prefill[1:])
    assert "".join(token.text for token in prefill).endswith(PROMPT)


def test_a_batch_over_many_adapters_gives_what_each_prompt_gets_alone(
    client: Client, tiny_adapters: list[str]
) -> None:
    adapters = [None, *tiny_adapters, "/no/such/adapter"] * 5
    seen: list[int] = []
    answers = client.generate_batch(
        [PROMPT] * len(adapters),
        adapters,
        concurrency=8,
        max_new_tokens=8,
        progress=lambda done, total: seen.append(done),
    )
    for adapter, answer in zip(adapters, answers, strict=True):
        if adapter == "/no/such/adapter":
            assert isinstance(answer, AdapterNotFoundError)
        else:
            assert isinstance(answer, Response)
            assert answer.generated_text == client.generate(PROMPT, adapter, max_new_tokens=8).generated_text
    assert seen == list(range(1, len(adapters) + 1))


def test_metrics_come_from_the_servers_metrics_port(server: TritonServer, client: Client) -> None:
    client.generate(PROMPT, max_new_tokens=1)
    with Client(server.grpc_address, metrics_url=server.metrics_address) as asked:
        text = asked.metrics()
        found = asked.metrics("json")
    assert isinstance(text, str)
    assert "lorax_request_count" in text
    assert isinstance(found, dict)
    assert found["nv_inference_request_success"]["type"] == "counter"
    models = [sample["labels"]["model"] for sample in found["nv_inference_request_success"]["samples"]]
    assert "lorax" in models


def test_a_text_is_told_in_tokens(client: Client) -> None:
    tokens = client.tokenize(PROMPT, add_special_tokens=False)
    assert "".join(PROMPT[token["start"] : token["stop"]] for token in tokens) == PROMPT
    answer = client.generate(input_ids=[token["id"] for token in tokens], max_new_tokens=1)
    assert answer.details is not None
    assert answer.details.prompt_tokens == len(tokens)


def test_an_adapter_of_another_shape_is_incompatible(client: Client, adapters_path) -> None:
    with pytest.raises(AdapterIncompatibleError):
        client.generate(PROMPT, str(adapters_path / "pirate"), max_new_tokens=2)


def test_a_model_that_is_not_there_is_not_found_and_not_ready(server: TritonServer) -> None:
    with Client(server.grpc_address, timeout=30, model_name="nothing") as client:
        assert not client.is_ready()
        with pytest.raises(NotFoundError):
            client.generate(PROMPT)


def test_control_requests_tell_what_the_server_is_and_does(client: Client, tiny_adapters: list[str]) -> None:
    assert client.is_ready()
    client.generate(PROMPT, tiny_adapters[0], max_new_tokens=2)
    assert client.info()["max_total_tokens"] > 0
    assert client.stats()["generated_tokens"] > 0
    assert tiny_adapters[0] in [adapter["id"] for adapter in client.adapters()]
    assert client.cancel("nobody's") is False


@pytest.mark.parametrize("model", ["lorax", "lorax_ensemble"])
def test_a_stream_given_up_frees_its_blocks(client: Client, ensemble: Client, model: str) -> None:
    caller = client if model == "lorax" else ensemble
    with (
        freed_early(client),
        caller.generate_stream(PROMPT, max_new_tokens=LONG, ignore_eos_token=True) as stream,
    ):
        next(stream)
        assert client.stats()["running"] == 1


def test_a_request_cancelled_by_its_id_ends_with_an_error_for_its_caller(client: Client) -> None:
    with freed_early(client):
        stream = client.generate_stream(PROMPT, max_new_tokens=LONG, ignore_eos_token=True)
        next(stream)
        assert client.cancel(stream.request_id) is True
        with pytest.raises(RequestCancelledError):
            list(stream)


def test_a_timeout_in_mid_answer_frees_what_the_request_held(client: Client) -> None:
    with freed_early(client), pytest.raises(TimeoutError):
        client.generate(PROMPT, max_new_tokens=LONG, ignore_eos_token=True, timeout=0.2)


def test_refused_and_cancelled_requests_cost_a_running_stream_nothing(
    client: Client, tiny_adapters: list[str]
) -> None:
    alone = shown_text(
        client.generate_stream(PROMPT, tiny_adapters[1], max_new_tokens=200, ignore_eos_token=True)
    )
    stream = client.generate_stream(PROMPT, tiny_adapters[1], max_new_tokens=200, ignore_eos_token=True)
    first = next(stream).token.text

    def annoy(number: int) -> None:
        for turn in range(10):
            if (number + turn) % 2:
                with pytest.raises(LoraxError):
                    client.generate(PROMPT, "/no/such/adapter")
            else:
                with client.generate_stream(PROMPT, max_new_tokens=LONG, ignore_eos_token=True) as other:
                    next(other)

    threads = [threading.Thread(target=annoy, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    assert first + shown_text(stream) == alone
    for thread in threads:
        thread.join()
    wait_idle(client)


def test_the_asynchronous_client_gets_the_same_answers_from_many_streams_at_once(
    server: TritonServer, client: Client, tiny_adapters: list[str]
) -> None:
    adapters = [None, *tiny_adapters]
    alone = [client.generate(PROMPT, adapter, max_new_tokens=16).generated_text for adapter in adapters]

    async def main() -> list[str]:
        async with AsyncClient(server.grpc_address, timeout=60) as many:
            calls = (
                many.generate_stream(PROMPT, adapters[n % 4], max_new_tokens=16).response() for n in range(32)
            )
            answers = await asyncio.gather(*calls)
            async with many.generate_stream(PROMPT, max_new_tokens=LONG, ignore_eos_token=True) as stream:
                await anext(stream)
        return [answer.generated_text for answer in answers]

    assert asyncio.run(main()) == [alone[n % 4] for n in range(32)]
    wait_idle(client)
