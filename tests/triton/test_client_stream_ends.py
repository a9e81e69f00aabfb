"""How the client leaves its streams, against a real tritonserver.

Triton 24.10 keeps a model for ever in use by a request whose client cancelled between the last response and the end
of the stream; the server then waits its whole exit timeout at SIGTERM. So a server that stops at once has lost no
request.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from triton_calls import TritonCaller

from lorax_backend.server.launch import TritonServer
from lorax_triton import AsyncClient, Client, TokenStream

pytestmark = pytest.mark.triton

PROMPT = "hello world"
EXIT_TIMEOUT_S = 60
STOPPED_S = 45.0
StartTiny = Callable[..., tuple[TritonServer, TritonCaller]]


def leave_asynchronously(address: str, count: int, parallel: int) -> None:
    """Short answers: read to the end, left at the last token, cut by a task's cancellation, or in one piece."""

    async def one(client: AsyncClient, number: int) -> None:
        kind = number % 4
        if kind == 0:
            await client.generate(PROMPT, max_new_tokens=1 + number % 3)
            return
        stream = client.generate_stream(PROMPT, max_new_tokens=2, ignore_eos_token=True)
        if kind == 1:
            async for item in stream:
                if item.details is not None:
                    break
            stream.cancel()
        elif kind == 2:
            async with stream:
                async for item in stream:
                    if item.details is not None:
                        return
        else:
            await stream.response()

    async def main() -> None:
        async with AsyncClient(address, timeout=60) as client:
            free = asyncio.Semaphore(parallel)

            async def limited(number: int) -> None:
                async with free:
                    await one(client, number)

            await asyncio.gather(*(limited(number) for number in range(count)))

    asyncio.run(main())


def leave_from_threads(address: str, count: int, threads: int) -> None:
    """The same with the blocking client."""

    def leave(stream: TokenStream, number: int) -> None:
        for item in stream:
            if item.details is not None and number % 2:
                break
        stream.close()

    with Client(address, timeout=60) as client:

        def work(thread: int) -> None:
            for number in range(thread, count, threads):
                leave(
                    client.generate_stream(PROMPT, max_new_tokens=2, ignore_eos_token=True), number // threads
                )

        workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()


def seconds_to_stop(server: TritonServer) -> float:
    start = time.monotonic()
    server.terminate(timeout=EXIT_TIMEOUT_S + 20)
    return time.monotonic() - start


def test_streams_left_at_their_last_token_under_stress_do_not_hold_up_the_servers_end(
    start_tiny: StartTiny,
) -> None:
    server, _ = start_tiny({"exit_timeout_s": EXIT_TIMEOUT_S})
    asynchronous = threading.Thread(target=leave_asynchronously, args=(server.grpc_address, 400, 64))
    asynchronous.start()
    leave_from_threads(server.grpc_address, 200, 16)
    asynchronous.join()
    assert seconds_to_stop(server) < STOPPED_S
