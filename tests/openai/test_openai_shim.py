"""`lorax_triton.OpenAI` and `AsyncOpenAI`: what the package promises holds without an HTTP server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

import lorax_triton
from lorax_triton import openai_shim
from lorax_triton.openai_api import Answer
from lorax_triton.openai_api.errors import ApiError

USER = [{"role": "user", "content": "Hi"}]
LONG = {"model": "", "messages": USER, "max_tokens": 1500, "extra_body": {"ignore_eos_token": True}}
SHORT = {"model": "", "messages": USER, "max_tokens": 8, "temperature": 0}
PATIENCE_S = 20.0


def until(condition: Callable[[], bool]) -> bool:
    """True once the condition holds; False if it does not within `PATIENCE_S` seconds."""
    pause = threading.Event()
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if condition():
            return True
        pause.wait(0.02)
    return False


def idle(native: lorax_triton.Client) -> bool:
    """True if the server runs nothing."""
    stats = native.stats()
    return stats["running"] == 0 and stats["waiting"] == 0


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def test_the_base_package_does_not_load_openai() -> None:
    program = "import sys, lorax_triton; sys.exit('openai' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_without_the_openai_package_the_error_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['openai'] = None\n"
        "import lorax_triton\n"
        "try: lorax_triton.OpenAI\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "lorax-triton[openai]" in done.stdout, done


def test_tokens_come_while_the_server_still_writes(
    shim: lorax_triton.OpenAI, native: lorax_triton.Client
) -> None:
    with shim.chat.completions.create(**LONG, stream=True) as stream:
        chunks = [next(stream) for _ in range(4)]
        assert chunks[1].choices[0].delta.content
        assert not idle(native)


@pytest.mark.parametrize("read", [0, 3])
def test_closing_a_stream_frees_what_the_request_holds(
    shim: lorax_triton.OpenAI, native: lorax_triton.Client, read: int
) -> None:
    stream = shim.chat.completions.create(**LONG, n=2, stream=True)
    for _ in range(read):
        next(stream)
    assert not idle(native)
    stream.close()
    assert until(lambda: idle(native))


def test_a_timeout_is_the_packages_and_frees_what_the_request_holds(
    shim: lorax_triton.OpenAI, native: lorax_triton.Client
) -> None:
    with pytest.raises(openai.APITimeoutError):
        shim.with_options(timeout=0.2).chat.completions.create(**LONG)
    assert until(lambda: idle(native))
    assert text_of(shim.chat.completions.create(**SHORT))


def test_retries_are_the_packages(shim: lorax_triton.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = openai_shim.handle, []

    async def busy_at_first(*request: Any) -> Answer:
        asked.append(request)
        if len(asked) == 1:
            answer = ApiError("busy", status=429, kind="rate_limit_error").answer()
            answer.headers["retry-after"] = "0.01"
            return answer
        return await real(*request)

    monkeypatch.setattr(openai_shim, "handle", busy_at_first)
    with pytest.raises(openai.RateLimitError):
        shim.chat.completions.create(**SHORT)
    asked.clear()
    assert text_of(shim.with_options(max_retries=1).chat.completions.create(**SHORT))
    assert len(asked) == 2


def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    with (
        lorax_triton.OpenAI(base_url="127.0.0.1:1", max_retries=0) as client,
        pytest.raises(openai.APIConnectionError) as error,
    ):
        client.chat.completions.create(**SHORT)
    assert isinstance(error.value.__cause__.__cause__, lorax_triton.ServerConnectionError)


def test_raw_responses_have_status_headers_and_what_they_parse_to(shim: lorax_triton.OpenAI) -> None:
    raw = shim.chat.completions.with_raw_response.create(**SHORT)
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-request-id"]
    assert text_of(raw.parse()) == text_of(shim.chat.completions.create(**SHORT))
    named = shim.chat.completions.with_raw_response.create(**SHORT, extra_headers={"x-request-id": "mine"})
    assert named.headers["x-request-id"] == "mine"


def test_threads_share_a_client(shim: lorax_triton.OpenAI) -> None:
    alone = text_of(shim.chat.completions.create(**SHORT))
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda _: text_of(shim.chat.completions.create(**SHORT)), range(16))
        assert set(texts) == {alone}


def test_a_closed_client_takes_no_more_requests(ways: Any) -> None:
    client = lorax_triton.OpenAI(base_url=ways.grpc, max_retries=0)
    client.chat.completions.create(**SHORT)
    client.close()
    client.close()
    with pytest.raises((RuntimeError, openai.APIConnectionError)):
        client.chat.completions.create(**SHORT)


def test_a_forgotten_client_ends_its_thread(ways: Any) -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "lorax-triton-openai"}

    before = threads()  # of clients that other tests forgot, and that may end at any time
    client = lorax_triton.OpenAI(base_url=ways.grpc)
    client.chat.completions.create(**SHORT)
    own = threads() - before
    assert len(own) == 1
    del client
    import gc

    gc.collect()
    assert until(lambda: not own & threads())


def test_an_async_client_streams_gathers_and_closes(ways: Any, native: lorax_triton.Client) -> None:
    async def run() -> None:
        async with lorax_triton.AsyncOpenAI(base_url=ways.grpc, max_retries=0) as client:
            whole = text_of(await client.chat.completions.create(**SHORT))
            stream = await client.chat.completions.create(**SHORT, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(pieces) == whole
            answers = await asyncio.gather(*(client.chat.completions.create(**SHORT) for _ in range(8)))
            assert {text_of(answer) for answer in answers} == {whole}
            with pytest.raises(openai.APITimeoutError):
                await client.with_options(timeout=0.2).chat.completions.create(**LONG)
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(**{**SHORT, "model": "no/such"})
            long = await client.chat.completions.create(**LONG, stream=True)
            async for _ in long:
                break
            await long.close()
            task = asyncio.ensure_future(client.chat.completions.create(**LONG))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert until(lambda: idle(native))


def test_an_async_client_may_be_used_from_one_event_loop_after_another(ways: Any) -> None:
    client = lorax_triton.AsyncOpenAI(base_url=ways.grpc)

    async def run() -> str:
        answer = await client.chat.completions.create(**SHORT)
        await client._client._transport.aclose()
        return text_of(answer)

    assert asyncio.run(run()) == asyncio.run(run())


def test_a_key_is_never_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.openai.com/v1")
    with lorax_triton.OpenAI() as client:
        assert client.api_key == "EMPTY"
        assert "openai.com" not in str(client.base_url)


def test_an_address_that_cannot_be_read_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="http"):
        lorax_triton.OpenAI(base_url="http://localhost:8080/v1")
