"""Batches: order, errors per item, concurrency, full servers, interrupts, progress."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_triton_server import Call, FakeTriton, Script, answer, error_json, error_response, response, token

from lorax_triton import AsyncClient, Client, LoraxError, OverloadedError, Response, ValidationError
from lorax_triton._progress import open_progress

Serve = Callable[[Script], FakeTriton]
Run = Callable[..., list[Response | LoraxError]]


def run_sync(url: str, *args: Any, **kwargs: Any) -> list[Response | LoraxError]:
    with Client(url) as client:
        return client.generate_batch(*args, **kwargs)


def run_async(url: str, *args: Any, **kwargs: Any) -> list[Response | LoraxError]:
    async def main() -> list[Response | LoraxError]:
        async with AsyncClient(url) as client:
            return await client.generate_batch(*args, **kwargs)

    return asyncio.run(main())


both = pytest.mark.parametrize("run", [run_sync, run_async], ids=["sync", "async"])


def echo(call: Call) -> Iterator[Any]:
    """Answers with the prompt and the adapter; refuses the prompt 'bad'."""
    prompt = call.inputs["text_input"][0]
    if prompt == "bad":
        yield error_response(error_json("a bad prompt", "validation", 422))
    else:
        yield from answer(f"{prompt}/{call.inputs.get('adapter_id', ['-'])[0]}")


def text(item: Response | LoraxError) -> str:
    return item.generated_text if isinstance(item, Response) else type(item).__name__


@both
def test_answers_come_in_the_order_of_the_prompts_with_errors_in_their_places(serve: Serve, run: Run) -> None:
    fake = serve(echo)
    prompts = ["one", "bad", "two", *map(str, range(30))]
    adapters = ["a", "a", None, *["b"] * 30]
    answers = run(fake.url, prompts, adapters, concurrency=8, max_new_tokens=3)
    assert [text(item) for item in answers] == [
        "one/a",
        "ValidationError",
        "two/-",
        *[f"{n}/b" for n in range(30)],
    ]
    assert all(
        json.loads(call.inputs["sampling_parameters"][0]) == {"max_new_tokens": 3} for call in fake.calls
    )


@both
def test_one_adapter_serves_all_prompts_and_no_prompts_are_no_requests(serve: Serve, run: Run) -> None:
    fake = serve(echo)
    assert [text(item) for item in run(fake.url, ["x", "y"], "a")] == ["x/a", "y/a"]
    assert run(fake.url, []) == []
    assert len(fake.calls) == 2


@both
def test_chats_and_token_ids_are_prompts_too(serve: Serve, run: Run) -> None:
    fake = serve(lambda call: answer("x"))
    chat = [{"role": "user", "content": "hi"}]
    run(fake.url, [chat, [1, 2, 3]], concurrency=1)
    assert json.loads(fake.calls[0].inputs["messages"][0]) == chat
    assert fake.calls[1].inputs["input_ids"] == [1, 2, 3]


@both
def test_no_more_than_concurrency_requests_are_in_flight(serve: Serve, run: Run) -> None:
    lock, running, most = threading.Lock(), 0, 0

    def script(call: Call) -> Iterator[Any]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        yield response(tokens=[token(1, "a")], text_output=["a"])
        with lock:
            running -= 1
        yield from answer("b")

    answers = run(serve(script).url, ["x"] * 40, concurrency=5)
    assert len(answers) == 40
    assert 1 < most <= 5


@both
def test_a_full_server_is_tried_again(serve: Serve, run: Run) -> None:
    seen: itertools.count[int] = itertools.count()

    def script(call: Call) -> Iterator[Any]:
        if next(seen) % 3:
            yield from answer("x")
        else:
            yield error_response(error_json("full", "overloaded", 429))

    answers = run(serve(script).url, ["x"] * 6, concurrency=2)
    assert [text(item) for item in answers] == ["x"] * 6


@both
def test_a_server_that_stays_full_is_the_items_error(serve: Serve, run: Run) -> None:
    fake = serve(lambda call: iter([error_response(error_json("full", "overloaded", 429))]))
    (only,) = run(fake.url, ["x"], overload_retries=1)
    assert isinstance(only, OverloadedError)
    assert len(fake.calls) == 2


@both
def test_without_return_exceptions_the_first_error_ends_the_batch_and_cancels_the_rest(
    serve: Serve, run: Run
) -> None:
    both_running = threading.Barrier(2, timeout=10)

    def script(call: Call) -> Iterator[Any]:
        both_running.wait()
        if call.inputs["text_input"] == ["bad"]:
            yield error_response(error_json("a bad prompt", "validation", 422))
        else:
            yield response(tokens=[token(1, "a")], text_output=["a"])
            call.over.wait(10)

    fake = serve(script)
    with pytest.raises(ValidationError, match="a bad prompt"):
        run(fake.url, ["hangs", "bad", "never", "sent"], concurrency=2, return_exceptions=False)
    assert len(fake.calls) == 2
    hanging = next(call for call in fake.calls if call.inputs["text_input"] == ["hangs"])
    assert hanging.over.wait(10)
    assert hanging.cancelled


@both
def test_bad_arguments_name_the_prompt_and_send_nothing(serve: Serve, run: Run) -> None:
    fake = serve(echo)
    with pytest.raises(ValidationError, match="prompt 1"):
        run(fake.url, ["x", ""])
    with pytest.raises(ValidationError, match="2 entries for 1 prompts"):
        run(fake.url, ["x"], ["a", "b"])
    with pytest.raises(ValueError, match="concurrency"):
        run(fake.url, ["x"], concurrency=0)
    with pytest.raises(ValueError, match="overload_retries"):
        run(fake.url, ["x"], overload_retries=-1)
    assert not fake.calls


def slow_or_quick(call: Call) -> Iterator[Any]:
    if call.inputs["text_input"] == ["quick"]:
        yield from answer("x")
    else:
        yield response(tokens=[token(1, "a")], text_output=["a"])
        call.over.wait(10)


def test_an_interrupt_leaves_no_request_running(serve: Serve) -> None:
    fake = serve(slow_or_quick)

    def interrupt(done: int, total: int) -> None:
        fake.wait_for_call(1)
        raise KeyboardInterrupt

    with Client(fake.url) as client:
        with pytest.raises(KeyboardInterrupt):
            client.generate_batch(["quick", "slow"], concurrency=2, progress=interrupt)
        for call in fake.calls:
            assert call.over.wait(10)


def test_a_cancelled_batch_leaves_no_request_running(serve: Serve) -> None:
    fake = serve(slow_or_quick)

    async def main() -> None:
        async with AsyncClient(fake.url) as client:
            batch = asyncio.create_task(
                client.generate_batch(
                    ["quick", "slow"], concurrency=2, progress=lambda done, total: batch.cancel()
                )
            )
            with pytest.raises(asyncio.CancelledError):
                await batch
            for call in fake.calls:
                assert await asyncio.to_thread(call.over.wait, 10)

    asyncio.run(main())


@both
def test_progress_is_called_with_what_is_done_and_of_how_many(serve: Serve, run: Run) -> None:
    seen: list[tuple[int, int]] = []
    run(serve(echo).url, ["x", "bad", "y"], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("missing", [(), ("tqdm",), ("tqdm", "rich")])
def test_a_terminal_shows_a_bar_or_lines_whatever_is_installed(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    terminal = Terminal()
    progress = open_progress(True, 4, terminal)
    for done in range(1, 5):
        progress.update(done)
    progress.close()
    assert "4/4" in terminal.getvalue() or "100%" in terminal.getvalue()


def test_what_is_no_terminal_gets_no_progress(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    run_sync(serve(echo).url, ["x"], progress=True)
    assert not quiet.getvalue()
