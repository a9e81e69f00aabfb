"""The blocking client against a real gRPC server with scripted answers."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from fake_triton_server import (
    WAIT_S,
    Call,
    FakeTriton,
    Script,
    answer,
    details,
    error_json,
    error_response,
    response,
    token,
)

from lorax_triton import (
    AdapterNotFoundError,
    Client,
    FinishReason,
    IncompleteGenerationError,
    OverloadedError,
    RequestCancelledError,
    RequestTimeoutError,
    ServerConnectionError,
    UnsupportedError,
    ValidationError,
)

Serve = Callable[[Script], FakeTriton]


def endless(call: Call) -> Iterator[Any]:
    """Tokens until the client gives up; not faster than it reads, or a test would fill memory."""
    for index in range(10**6):
        if not call.context.is_active():
            return
        yield response(text_output=["x"], tokens=[token(index, "x")])
        call.over.wait(0.001)


def silent(call: Call) -> Iterator[Any]:
    """Never answers; ends when the client is gone."""
    call.over.wait(WAIT_S)
    yield from ()


def test_generate_returns_the_text_and_the_details_of_one_response(serve: Serve) -> None:
    server = serve(
        lambda call: iter(
            [
                response(
                    True,
                    text_output=["Blue."],
                    tokens=[
                        token(5, "Blue"),
                        token(6, ".", alternative_tokens=[{"id": 7, "text": "!", "logprob": -1.0}]),
                    ],
                    details=[details("Blue.", 2, finish_reason="eos_token", seed=4, timings={"total": 0.1})],
                )
            ]
        )
    )
    with Client(server.url) as client:
        result = client.generate("Why?", max_new_tokens=2)
    assert result.generated_text == "Blue."
    assert result.details is not None
    assert result.details.finish_reason is FinishReason.EndOfSequenceToken
    assert (result.details.prompt_tokens, result.details.generated_tokens, result.details.seed) == (3, 2, 4)
    assert [item.text for item in result.details.tokens] == ["Blue", "."]
    alternatives = result.details.tokens[1].alternative_tokens
    assert alternatives is not None
    assert alternatives[0].text == "!"
    assert result.details.timings == {"total": 0.1}


def test_the_request_carries_the_named_tensors_and_nothing_the_caller_did_not_ask_for(serve: Serve) -> None:
    server = serve(lambda call: answer("a"))
    with Client(server.url) as client:
        client.generate(
            "Grüße",
            "acme/a",
            "hub",
            max_new_tokens=7,
            stop_sequences=["\n"],
            top_k=3,
            adapter_revision="v2",
            timeout=5,
        )
    call = server.wait_for_call()
    sampling = json.loads(call.inputs.pop("sampling_parameters")[0])
    assert sampling == {"max_new_tokens": 7, "stop": ["\n"], "top_k": 3}
    assert call.inputs == {
        "text_input": ["Grüße"],
        "stream": [False],
        "exclude_input_in_output": [True],
        "return_tokens": [True],
        "return_details": [True],
        "adapter_id": ["acme/a@v2"],
        "adapter_source": ["hub"],
    }
    assert call.model_name == "lorax"
    assert len(call.request_id) == 36


def test_generate_stream_yields_every_token_and_ends_with_text_and_details(serve: Serve) -> None:
    server = serve(lambda call: answer("Hel", "lo", " you", finish_reason="stop_sequence"))
    with Client(server.url) as client:
        items = list(client.generate_stream("Hi"))
    assert [item.token.text for item in items] == ["Hel", "lo", " you"]
    assert [item.generated_text for item in items] == [None, None, "Hello you"]
    assert items[-1].details is not None
    assert items[-1].details.finish_reason is FinishReason.StopSequence
    assert server.wait_for_call().over.wait(WAIT_S)
    assert not server.calls[0].cancelled, "a stream read to its end must not look cancelled to the server"


def test_several_tokens_in_one_response_become_several_items(serve: Serve) -> None:
    def script(call: Call) -> Iterator[Any]:
        yield response(text_output=["ab"], tokens=[token(1, "a"), token(2, "b")])
        yield response(True, text_output=["c"], tokens=[token(3, "c")], details=[details("abc", 3)])

    with Client(serve(script).url) as client:
        assert [item.token.id for item in client.generate_stream("x")] == [1, 2, 3]


def test_an_empty_final_response_after_the_details_is_no_token(serve: Serve) -> None:
    def script(call: Call) -> Iterator[Any]:
        yield response(text_output=["a"], tokens=[token(1, "a")], details=[details("a", 1)])
        yield response(True)

    with Client(serve(script).url) as client:
        items = list(client.generate_stream("x"))
    assert [(item.token.text, item.generated_text) for item in items] == [("a", "a")]


def test_details_false_leaves_them_out_but_not_the_text(serve: Serve) -> None:
    server = serve(lambda call: answer("a", "b"))
    with Client(server.url) as client:
        assert client.generate("x", details=False).details is None
        last = list(client.generate_stream("x", details=False))[-1]
    assert (last.generated_text, last.details) == ("ab", None)
    assert server.calls[0].inputs["return_tokens"] == [False]


def test_messages_and_input_ids_stand_in_for_the_prompt(serve: Serve) -> None:
    server = serve(lambda call: answer("a"))
    with Client(server.url) as client:
        client.generate(messages=[{"role": "user", "content": "é"}])
        client.generate(input_ids=[1, 2, 3])
        with pytest.raises(ValidationError, match="exactly one"):
            client.generate("x", input_ids=[1])
        with pytest.raises(ValidationError, match="exactly one"):
            client.generate()
        with pytest.raises(ValidationError, match="input_ids"):
            client.generate(input_ids=[1 << 40])
        with pytest.raises(ValidationError, match="text_input"):
            client.generate("\ud800")
    assert json.loads(server.calls[0].inputs["messages"][0]) == [{"role": "user", "content": "é"}]
    assert server.calls[1].inputs["input_ids"] == [1, 2, 3]
    assert server.calls[1].datatypes["input_ids"] == "INT32"
    assert len(server.calls) == 2


def test_headers_are_metadata_and_the_bearer_is_the_api_token_unless_one_is_given(serve: Serve) -> None:
    server = serve(lambda call: answer("a"))
    with Client(server.url, {"Authorization": "Bearer abc", "X-Tenant": "t"}, {"sid": "1"}) as client:
        client.generate("x")
        client.generate("x", api_token="mine")
    first, second = server.calls
    assert first.inputs["api_token"] == ["abc"]
    assert second.inputs["api_token"] == ["mine"]
    assert first.metadata["x-tenant"] == "t"
    assert first.metadata["authorization"] == "Bearer abc"
    assert first.metadata["cookie"] == "sid=1"


@pytest.mark.parametrize("prefix", ["", "in ensemble 'lorax_ensemble', "])
@pytest.mark.parametrize("in_band", [True, False])
def test_the_servers_json_becomes_the_exception_of_its_kind(serve: Serve, prefix: str, in_band: bool) -> None:
    text = prefix + error_json("no adapter {x}; check adapter_id", "adapter_not_found", 404)

    def script(call: Call) -> Iterator[Any]:
        if not in_band:
            call.context.abort(grpc.StatusCode.NOT_FOUND, text)
        yield error_response(text)

    with Client(serve(script).url) as client, pytest.raises(AdapterNotFoundError) as caught:
        client.generate("x", adapter_id="x")
    assert caught.value.message == "no adapter {x}; check adapter_id"
    assert (caught.value.status, caught.value.error_type) == (404, "adapter_not_found")
    assert caught.value.request_id


def test_a_servers_unavailable_is_its_answer_and_not_a_lost_connection(serve: Serve) -> None:
    def script(call: Call) -> Iterator[Any]:
        call.context.abort(grpc.StatusCode.UNAVAILABLE, error_json("too many", "overloaded", 429))
        yield

    server = serve(script)
    with Client(server.url) as client, pytest.raises(OverloadedError):
        client.generate("x")
    assert len(server.calls) == 1


def test_an_error_message_of_a_hundred_kilobytes_arrives(serve: Serve) -> None:
    def script(call: Call) -> Iterator[Any]:
        yield error_response(error_json("a" * 100_000, "validation", 422))

    with Client(serve(script).url) as client, pytest.raises(ValidationError) as caught:
        client.generate("x")
    assert len(caught.value.message) == 100_000


def test_an_error_in_mid_stream_comes_after_the_tokens_before_it(serve: Serve) -> None:
    def script(call: Call) -> Iterator[Any]:
        yield response(text_output=["a"], tokens=[token(1, "a")])
        yield error_response(error_json("cannot", "unsupported", 422))

    with Client(serve(script).url) as client:
        stream = client.generate_stream("x")
        assert next(stream).token.text == "a"
        with pytest.raises(UnsupportedError):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


@pytest.mark.parametrize("final", [False, True])
def test_a_stream_that_ends_without_details_is_an_incomplete_generation(serve: Serve, final: bool) -> None:
    server = serve(lambda call: iter([response(final, text_output=["a"], tokens=[token(1, "a")])]))
    with Client(server.url) as client:
        with pytest.raises(IncompleteGenerationError):
            list(client.generate_stream("x"))
        with pytest.raises(IncompleteGenerationError):
            client.generate("x")


def _leave_loop(client: Client) -> None:
    for _ in client.generate_stream("x"):
        break
    gc.collect()


def _leave_with(client: Client) -> None:
    with client.generate_stream("x") as stream:
        next(stream)


def _close(client: Client) -> None:
    stream = client.generate_stream("x")
    next(stream)
    stream.close()
    assert list(stream) == []


def _fail_in_loop(client: Client) -> None:
    def consume() -> None:
        for _ in client.generate_stream("x"):
            raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        consume()
    gc.collect()


@pytest.mark.parametrize("leave", [_leave_loop, _leave_with, _close, _fail_in_loop])
def test_leaving_a_stream_early_cancels_it_on_the_server(
    serve: Serve, leave: Callable[[Client], None]
) -> None:
    server = serve(endless)
    with Client(server.url) as client:
        leave(client)
        call = server.wait_for_call()
        assert call.over.wait(WAIT_S)
        assert call.cancelled


def test_closing_the_client_ends_its_streams(serve: Serve) -> None:
    server = serve(endless)
    client = Client(server.url)
    stream = client.generate_stream("x")
    next(stream)
    client.close()
    with pytest.raises(RequestCancelledError):
        list(stream)
    assert server.wait_for_call().over.wait(WAIT_S)
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("x")


def test_cancel_from_another_thread_wakes_the_reader(serve: Serve) -> None:
    server = serve(silent)
    with Client(server.url) as client:
        stream = client.generate_stream("x")
        server.wait_for_call()
        threading.Timer(0.05, stream.cancel).start()
        with pytest.raises(RequestCancelledError):
            next(stream)
        assert server.calls[0].over.wait(WAIT_S)


def test_a_server_that_never_answers_costs_no_more_than_the_timeout(serve: Serve) -> None:
    server = serve(silent)
    with Client(server.url, timeout=0.2) as client:
        start = time.monotonic()
        with pytest.raises(RequestTimeoutError, match=r"0\.2 s") as caught:
            client.generate("x")
        assert time.monotonic() - start < 2.0
        assert isinstance(caught.value, TimeoutError)
        call = server.wait_for_call()
        assert call.over.wait(WAIT_S)
        assert call.cancelled


def test_the_timeout_is_for_each_token_and_not_for_the_whole_answer(serve: Serve) -> None:
    def slow(call: Call) -> Iterator[Any]:
        for item in answer(*"abcdef"):
            call.over.wait(0.1)
            yield item

    def stalls(call: Call) -> Iterator[Any]:
        yield response(text_output=["a"], tokens=[token(1, "a")])
        call.over.wait(WAIT_S)

    with Client(serve(slow).url, timeout=0.4) as client:
        assert len(list(client.generate_stream("x"))) == 6
    with Client(serve(stalls).url) as client:
        stream = client.generate_stream("x", timeout=0.2)
        next(stream)
        with pytest.raises(RequestTimeoutError):
            next(stream)


def test_time_the_caller_takes_between_tokens_does_not_count(serve: Serve) -> None:
    with Client(serve(lambda call: answer("a", "b")).url, timeout=0.2) as client:
        stream = client.generate_stream("x")
        next(stream)
        threading.Event().wait(0.4)
        assert [item.token.text for item in stream] == ["b"]


def test_the_total_timeout_ends_a_stream_that_keeps_talking(serve: Serve) -> None:
    server = serve(endless)
    with Client(server.url, total_timeout=0.3) as client, pytest.raises(RequestTimeoutError):
        list(client.generate_stream("x"))
    assert server.wait_for_call().over.wait(WAIT_S)


def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    with Client("localhost:9", max_session_retries=1, connect_timeout=1) as client:
        with pytest.raises(ServerConnectionError) as caught:
            client.generate("x", timeout=5)
        assert isinstance(caught.value, ConnectionError)
        assert client.is_ready(timeout=1) is False


def test_a_lost_connection_is_made_again_before_the_first_token(serve: Serve) -> None:
    first = FakeTriton(silent)
    with Client(first.url, timeout=10, max_session_retries=5) as client:
        stream = client.generate_stream("x")
        first.wait_for_call()
        first.stop()
        second = FakeTriton(lambda call: answer("a", "b"), port=first.port)
        try:
            assert stream.response().generated_text == "ab"
            assert [call.request_id for call in second.calls] == [first.calls[0].request_id]
        finally:
            second.stop()


def test_a_lost_connection_after_the_first_token_is_an_error(serve: Serve) -> None:
    server = serve(endless)
    with Client(server.url, timeout=10) as client:
        stream = client.generate_stream("x")
        next(stream)
        server.stop()
        with pytest.raises(ServerConnectionError):
            list(stream)
    assert len(server.calls) == 1


def test_a_client_goes_on_after_its_server_was_restarted(serve: Serve) -> None:
    first = FakeTriton(lambda call: answer("a"))
    with Client(first.url) as client:
        assert client.generate("x").generated_text == "a"
        first.stop()
        second = FakeTriton(lambda call: answer("b"), port=first.port)
        try:
            assert client.generate("x").generated_text == "b"
        finally:
            second.stop()


def test_sixty_four_streams_share_one_client_and_one_channel(serve: Serve) -> None:
    everyone = threading.Barrier(64)

    def script(call: Call) -> Iterator[Any]:
        everyone.wait(WAIT_S)
        yield from answer(*(f"{call.inputs['text_input'][0]}-{index} " for index in range(8)))

    server = serve(script)
    texts: dict[int, str] = {}
    with Client(server.url) as client:

        def run(number: int) -> None:
            texts[number] = client.generate_stream(str(number)).response().generated_text

        threads = [threading.Thread(target=run, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    assert texts == {number: "".join(f"{number}-{index} " for index in range(8)) for number in range(64)}
    peers = {call.context.peer() for call in server.calls}
    assert len(peers) == 1


def test_control_requests_go_to_the_engine_and_their_answer_is_in_details(serve: Serve) -> None:
    answers = {
        "info": {"model_id": "m"},
        "stats": {"running": 2},
        "adapters": {"adapters": [{"id": "a"}]},
        "cancel": {"cancelled": True},
    }

    def script(call: Call) -> Iterator[Any]:
        command = json.loads(call.inputs["control"][0])["command"]
        yield response(True, details=[json.dumps(answers[command])])

    server = serve(script)
    with Client(server.url, model_name="lorax_ensemble") as client:
        assert client.info() == {"model_id": "m"}
        assert client.stats() == {"running": 2}
        assert client.adapters() == [{"id": "a"}]
        assert client.cancel("r-1") is True
        assert client.is_ready() is True
        server.ready = False
        assert client.is_ready() is False
    assert {call.model_name for call in server.calls} == {"lorax"}
    assert json.loads(server.calls[-1].inputs["control"][0]) == {"command": "cancel", "request_id": "r-1"}


def test_giving_up_a_stream_of_an_ensemble_cancels_it_by_a_control_request(serve: Serve) -> None:
    def script(call: Call) -> Iterator[Any]:
        if "control" in call.inputs:
            yield response(True, details=['{"cancelled": true}'])
        else:
            yield from endless(call)

    server = serve(script)
    with Client(server.url, model_name="lorax_ensemble") as client:
        with client.generate_stream("x") as stream:
            next(stream)
        control = server.wait_for_call(1)
    assert server.calls[0].model_name == "lorax_ensemble"
    assert control.model_name == "lorax"
    assert json.loads(control.inputs["control"][0]) == {"command": "cancel", "request_id": stream.request_id}


def test_a_finished_answer_of_an_ensemble_is_not_cancelled(serve: Serve) -> None:
    server = serve(lambda call: answer("a"))
    with Client(server.url, model_name="lorax_ensemble") as client:
        client.generate("x")
        list(client.generate_stream("x"))
    assert len(server.calls) == 2


def test_a_request_that_the_server_refused_is_not_cancelled_on_top(serve: Serve) -> None:
    server = serve(lambda call: iter([error_response(error_json("no", "validation", 422))]))
    with Client(server.url) as client:
        with pytest.raises(ValidationError):
            client.generate("x")
        with pytest.raises(ValidationError):
            client.stats()
    for call in server.calls:
        assert call.over.wait(WAIT_S)
        assert not call.cancelled
