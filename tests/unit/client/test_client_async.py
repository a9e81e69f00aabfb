"""The asynchronous client against a real gRPC server with scripted answers."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from fake_triton_server import WAIT_S, Call, FakeTriton, Script, answer, error_json, response, token

from lorax_triton import (
    AdapterIncompatibleError,
    AsyncClient,
    AsyncTokenStream,
    IncompleteGenerationError,
    RequestCancelledError,
    RequestTimeoutError,
    ServerConnectionError,
)

Serve = Callable[[Script], FakeTriton]


def endless(call: Call) -> Iterator[Any]:
    """Tokens until the client gives up."""
    for index in range(10**6):
        if not call.context.is_active():
            return
        yield response(text_output=["x"], tokens=[token(index, "x")])
        call.over.wait(0.001)


def silent(call: Call) -> Iterator[Any]:
    """Never answers; ends when the client is gone."""
    call.over.wait(WAIT_S)
    yield from ()


async def wait_over(call: Call) -> None:
    """Wait for the end of a call without holding up the event loop."""
    assert await asyncio.to_thread(call.over.wait, WAIT_S)


def test_generate_and_generate_stream_give_what_the_blocking_client_gives(serve: Serve) -> None:
    server = serve(lambda call: answer("Hel", "lo"))

    async def main() -> None:
        async with AsyncClient(server.url, {"Authorization": "Bearer abc"}) as client:
            result = await client.generate("x", "acme/a", max_new_tokens=2)
            assert result.generated_text == "Hello"
            assert result.details is not None
            assert [item.text for item in result.details.tokens] == ["Hel", "lo"]
            items = [item async for item in client.generate_stream("x")]
            assert [item.token.text for item in items] == ["Hel", "lo"]
            assert items[-1].generated_text == "Hello"
            assert await client.is_ready() is True

    asyncio.run(main())
    assert server.calls[0].inputs["api_token"] == ["abc"]
    assert not any(call.cancelled for call in server.calls)


async def _break(stream: AsyncTokenStream) -> None:
    async for _ in stream:
        break


async def _close(stream: AsyncTokenStream) -> None:
    await anext(stream)
    await stream.aclose()
    assert [item async for item in stream] == []


async def _leave_with(stream: AsyncTokenStream) -> None:
    async with stream:
        await anext(stream)


async def _cancel_task(stream: AsyncTokenStream) -> None:
    started = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            started.set()

    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [_break, _close, _leave_with, _cancel_task])
def test_leaving_a_stream_early_cancels_it_on_the_server(
    serve: Serve, leave: Callable[[AsyncTokenStream], Awaitable[None]]
) -> None:
    server = serve(endless)

    async def main() -> None:
        async with AsyncClient(server.url) as client:
            await leave(client.generate_stream("x"))
            gc.collect()
            call = server.wait_for_call()
            await wait_over(call)
            assert call.cancelled

    asyncio.run(main())


def test_cancel_from_another_thread_or_task_wakes_the_reader(serve: Serve) -> None:
    server = serve(silent)

    async def main() -> None:
        async with AsyncClient(server.url) as client:
            for number in range(2):
                stream = client.generate_stream("x")
                reader = asyncio.ensure_future(anext(stream))
                call = await asyncio.to_thread(server.wait_for_call, number)
                if number == 0:
                    stream.cancel()
                else:
                    await asyncio.to_thread(stream.cancel)
                with pytest.raises(RequestCancelledError):
                    await reader
                await wait_over(call)

    asyncio.run(main())


def test_the_timeout_is_in_seconds_and_cancels_on_the_server(serve: Serve) -> None:
    server = serve(silent)

    async def main() -> None:
        async with AsyncClient(server.url, timeout=0.2) as client:
            start = time.monotonic()
            with pytest.raises(RequestTimeoutError, match=r"0\.2 s"):
                await client.generate("x")
            assert time.monotonic() - start < 2.0
            call = server.wait_for_call()
            await wait_over(call)
            assert call.cancelled

    asyncio.run(main())


def test_the_total_timeout_ends_a_stream_that_keeps_talking(serve: Serve) -> None:
    server = serve(endless)

    async def main() -> None:
        async with AsyncClient(server.url) as client:
            with pytest.raises(RequestTimeoutError):
                async for _ in client.generate_stream("x", total_timeout=0.3):
                    pass

    asyncio.run(main())


def test_errors_carry_their_kind_and_the_request(serve: Serve) -> None:
    def script(call: Call) -> Iterator[Any]:
        call.context.abort(grpc.StatusCode.INVALID_ARGUMENT, error_json("rank", "adapter_incompatible", 422))
        yield

    async def main() -> None:
        async with AsyncClient(serve(script).url) as client:
            with pytest.raises(AdapterIncompatibleError) as caught:
                await client.generate("x", request_id="r-7")
            assert (caught.value.status, caught.value.request_id) == (422, "r-7")
        async with AsyncClient(serve(lambda call: iter(())).url) as client:
            with pytest.raises(IncompleteGenerationError):
                await client.generate("x")

    asyncio.run(main())


def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    async def main() -> None:
        async with AsyncClient("localhost:9", max_session_retries=1, connect_timeout=1) as client:
            with pytest.raises(ServerConnectionError):
                await client.generate("x", timeout=5)
            assert await client.is_ready(timeout=1) is False

    asyncio.run(main())


def test_a_lost_connection_is_made_again_before_the_first_token_and_not_after_it() -> None:
    first = FakeTriton(silent)

    async def main() -> None:
        async with AsyncClient(first.url, timeout=10, max_session_retries=5) as client:
            reader = asyncio.ensure_future(client.generate_stream("x").response())
            await asyncio.to_thread(first.wait_for_call)
            await asyncio.to_thread(first.stop)
            second = FakeTriton(lambda call: answer("a", "b"), port=first.port)
            assert (await reader).generated_text == "ab"
            second.script = endless
            stream = client.generate_stream("x")
            await anext(stream)
            await asyncio.to_thread(second.stop)
            with pytest.raises(ServerConnectionError):
                async for _ in stream:
                    pass
            assert len(second.calls) == 2

    asyncio.run(main())


def test_sixty_four_streams_share_one_client(serve: Serve) -> None:
    server = serve(lambda call: answer(*(f"{call.inputs['text_input'][0]}-{index} " for index in range(8))))

    async def main() -> None:
        async with AsyncClient(server.url) as client:
            results = await asyncio.gather(*(client.generate_stream(str(n)).response() for n in range(64)))
        for number, result in enumerate(results):
            assert result.generated_text == "".join(f"{number}-{index} " for index in range(8))

    asyncio.run(main())
    assert len({call.context.peer() for call in server.calls}) == 1


def test_control_requests_and_cancelling_through_an_ensemble(serve: Serve) -> None:
    def script(call: Call) -> Iterator[Any]:
        if "control" not in call.inputs:
            yield from endless(call)
        else:
            yield response(True, details=['{"cancelled": true, "adapters": [{"id": "a"}]}'])

    server = serve(script)

    async def main() -> str:
        async with AsyncClient(server.url, model_name="lorax_ensemble") as client:
            assert await client.cancel("r-1") is True
            assert await client.adapters() == [{"id": "a"}]
            assert (await client.info())["cancelled"] is True
            assert (await client.stats())["cancelled"] is True
            async with client.generate_stream("x") as stream:
                await anext(stream)
            return stream.request_id

    request_id = asyncio.run(main())
    assert [call.model_name for call in server.calls] == ["lorax"] * 4 + ["lorax_ensemble", "lorax"]
    assert json.loads(server.calls[-1].inputs["control"][0]) == {
        "command": "cancel",
        "request_id": request_id,
    }


def test_a_stream_that_outlives_its_event_loop_does_no_harm(serve: Serve) -> None:
    server = serve(endless)
    kept: list[AsyncTokenStream] = []

    async def main() -> None:
        client = AsyncClient(server.url)
        kept.append(client.generate_stream("x"))
        await anext(kept[0])

    asyncio.run(main())
    kept.clear()
    gc.collect()
    assert server.wait_for_call().over.wait(WAIT_S)
