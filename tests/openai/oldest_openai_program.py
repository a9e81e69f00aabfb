"""What the first 1.x release of the official package can do, run by its own Python: see test_openai_other_clients.py.

Arguments: the gateway's address, the server's gRPC address, an adapter, the base model's id. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai

import lorax_triton
from lorax_triton import openai_shim
from lorax_triton.openai_api import Answer

HTTP, GRPC, ADAPTER, BASE = sys.argv[1:]
USER = [{"role": "user", "content": "Hi"}]
GREEDY: dict[str, Any] = {"model": "", "messages": USER, "temperature": 0, "max_tokens": 8}
LONG: dict[str, Any] = {
    "model": "",
    "prompt": "Hi",
    "max_tokens": 1500,
    "extra_body": {"ignore_eos_token": True},
}
CHECKS: list[Callable[[Any], Any]] = []


def check(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Run it for each client."""
    CHECKS.append(function)
    return function


def strict(model: Any) -> Any:
    """The model, once its release's own description has been held against it."""
    type(model).model_validate(model.model_dump(), strict=True)
    return model


def raised(kind: type[openai.APIStatusError], call: Callable[[], Any]) -> dict[str, Any]:
    """The error object of the exception of this kind that the call raises."""
    try:
        call()
    except kind as error:
        caught = error
    else:
        raise AssertionError(f"no {kind.__name__}")
    assert caught.response.status_code == caught.status_code
    return dict(caught.response.json()["error"])


@check
def chats(client: Any) -> str:
    answer = strict(client.chat.completions.create(**GREEDY))
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", BASE)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.choices[0].message.role == "assistant"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return str(answer.choices[0].message.content)


@check
def chat_streams(client: Any) -> str:
    chunks = [strict(chunk) for chunk in client.chat.completions.create(**GREEDY, stream=True)]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    return "".join(delta.content or "" for delta in deltas)


@check
def raw_responses(client: Any) -> str:
    raw = client.chat.completions.with_raw_response.create(**GREEDY)
    assert raw.status_code == 200
    assert raw.headers["content-type"].startswith("application/json")
    assert raw.headers["x-request-id"]
    return str(raw.parse().choices[0].message.content)


@check
def adapters(client: Any) -> str:
    answer = client.chat.completions.create(**{**GREEDY, "model": ADAPTER})
    assert answer.model == ADAPTER
    return str(answer.choices[0].message.content)


@check
def sampling_fields(client: Any) -> list[str]:
    answer = strict(
        client.chat.completions.create(
            model="", messages=USER, n=3, temperature=1.2, top_p=0.9, max_tokens=6, user="me",
            presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"5": -100}, stop=["\x00", "\x01"],
            extra_body={"seed": 7, "top_k": 20},
        )
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    return [str(choice.message.content) for choice in answer.choices]


@check
def newer_fields_by_extra_body(client: Any) -> Any:
    extra = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 4}
    answer = client.chat.completions.create(model="", messages=USER, temperature=0, extra_body=extra)
    tokens = answer.model_dump()["choices"][0]["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    stream = client.chat.completions.create(
        **GREEDY, stream=True, extra_body={"stream_options": {"include_usage": True}}
    )
    chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].model_dump()["usage"]["completion_tokens"] <= 8
    tool = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
    client.chat.completions.create(**GREEDY, extra_body={"tools": [tool], "tool_choice": "auto"})
    return [token["token"] for token in tokens]


@check
def completions(client: Any) -> list[str]:
    # Not held against its description, which knows neither fractions nor the first token's null in logprobs.
    answer = client.completions.create(
        model="", prompt=["Hi", "Ho"], max_tokens=4, temperature=0, logprobs=1, echo=True, n=2
    )
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.text[:1] == "H" for choice in answer.choices)
    shown = answer.choices[0].logprobs
    assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.text_offset) == len(shown.top_logprobs)
    assert shown.token_logprobs[0] is None
    ids = strict(client.completions.create(model="", prompt=[[5, 6], [7]], max_tokens=2, temperature=0))
    assert len(ids.choices) == 2
    best = client.completions.create(model="", prompt=[5, 6], max_tokens=4, best_of=2, n=1)
    assert len(best.choices) == 1
    return [choice.text for choice in answer.choices]


@check
def completion_streams(client: Any) -> list[str]:
    request = {"model": "", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**request, prompt="Hi").choices[0].text
    chunks = list(client.completions.create(**request, prompt="Hi", stream=True))
    streamed = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert streamed == whole
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    return [whole]


@check
def models(client: Any) -> str:
    listed = list(client.models.list())
    assert all(strict(model).object == "model" for model in listed)
    assert BASE in [model.id for model in listed]
    found = strict(client.models.retrieve(BASE))
    raised(openai.NotFoundError, lambda: client.models.retrieve("no-such-model"))
    return str(found.id)


@check
def errors(client: Any) -> list[Any]:
    create = client.chat.completions.create
    long = [{"role": "user", "content": "x" * 40_000}]
    told = [
        raised(openai.NotFoundError, lambda: create(**{**GREEDY, "model": "no/such"})),
        raised(openai.BadRequestError, lambda: create(**{**GREEDY, "temperature": -1})),
        raised(openai.BadRequestError, lambda: create(**{**GREEDY, "messages": []})),
        raised(
            openai.BadRequestError,
            lambda: create(**{**GREEDY, "messages": long}),
        ),
        raised(openai.BadRequestError, lambda: create(**GREEDY, functions=[{"name": "f", "parameters": {}}])),
        raised(openai.BadRequestError, lambda: client.completions.create(**LONG, suffix="!")),
        raised(openai.BadRequestError, lambda: list(create(**{**GREEDY, "top_p": 2}, stream=True))),
        raised(openai.BadRequestError, lambda: client.embeddings.create(model="", input="x")),
        raised(openai.NotFoundError, lambda: client.moderations.create(input="x")),
        raised(openai.NotFoundError, lambda: client.files.list()),
    ]
    for error in told:
        assert set(error) == {"message", "type", "param", "code"}
    return [[error["param"], error["code"]] for error in told]


@check
def time_limits(client: Any) -> bool:
    for limit in (0.2, httpx.Timeout(0.2)):
        try:
            client.with_options(timeout=limit).completions.create(**LONG)
        except openai.APITimeoutError:
            continue
        raise AssertionError("no APITimeoutError")
    try:
        client.completions.create(**LONG, timeout=0.2)
    except openai.APITimeoutError:
        return True
    raise AssertionError("no APITimeoutError")


@check
def streams_left_early(client: Any) -> int:
    stream = client.completions.create(**LONG, stream=True)
    seen = 0
    for _ in stream:
        seen += 1
        if seen == 3:
            break
    stream.response.close()
    assert client.chat.completions.create(**GREEDY).choices
    return seen


@check
def headers_and_copies(client: Any) -> str:
    copy = client.copy(default_headers={"x-request-id": "mine"})
    raw = copy.chat.completions.with_raw_response.create(**GREEDY)
    assert raw.headers["x-request-id"] == "mine"
    raw = client.chat.completions.with_raw_response.create(**GREEDY, extra_headers={"x-request-id": "once"})
    assert raw.headers["x-request-id"] == "once"
    return str(raw.parse().choices[0].message.content)


def retries() -> list[int]:
    """Over gRPC, how often a busy server is asked: twice more, but once without retries."""
    real = openai_shim.handle
    asked = 0

    async def busy_at_first(*request: Any) -> Answer:
        nonlocal asked
        asked += 1
        if asked > 2:
            return await real(*request)
        body = json.dumps({"error": {"message": "busy", "type": "t", "param": None, "code": "c"}})
        return Answer(429, {"content-type": "application/json", "retry-after": "0.01"}, body.encode())

    openai_shim.handle = busy_at_first
    with lorax_triton.OpenAI(base_url=GRPC, max_retries=2) as client:
        assert client.chat.completions.create(**GREEDY).choices
    counts = [asked]
    asked = 0
    with lorax_triton.OpenAI(base_url=GRPC, max_retries=0) as client:
        raised(openai.RateLimitError, lambda: client.chat.completions.create(**GREEDY))
    counts.append(asked)
    openai_shim.handle = real
    try:
        with lorax_triton.OpenAI(base_url="localhost:1", max_retries=0) as client:
            client.chat.completions.create(**GREEDY)
    except openai.APIConnectionError:
        return counts
    raise AssertionError("no APIConnectionError")


async def asynchronous(client: Any) -> list[str]:
    async with client:
        one, two = await asyncio.gather(*(client.chat.completions.create(**GREEDY) for _ in range(2)))
        stream = await client.chat.completions.create(**GREEDY, stream=True)
        text = ""
        async for chunk in stream:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        raw = await client.chat.completions.with_raw_response.create(**GREEDY)
        ids = [model.id async for model in client.models.list()]
        assert BASE in ids
        try:
            await client.chat.completions.create(**{**GREEDY, "model": "no/such"})
        except openai.NotFoundError:
            pass
        else:
            raise AssertionError("no NotFoundError")
        answers = (one, two, raw.parse())
        return [text, *(str(answer.choices[0].message.content) for answer in answers)]


def clients() -> Iterator[Any]:
    yield openai.OpenAI(base_url=HTTP, api_key="EMPTY", max_retries=0)
    yield lorax_triton.OpenAI(base_url=GRPC, max_retries=0)


def main() -> None:
    told: dict[str, Any] = {"version": openai.__version__}
    for client in clients():
        with client:
            for function in CHECKS:
                told.setdefault(function.__name__, []).append(function(client))
    told["asynchronous"] = [
        asyncio.run(asynchronous(openai.AsyncOpenAI(base_url=HTTP, api_key="EMPTY", max_retries=0))),
        asyncio.run(asynchronous(lorax_triton.AsyncOpenAI(base_url=GRPC, max_retries=0))),
    ]
    told["retries"] = retries()
    openai.base_url, openai.api_key = f"{HTTP}/", "EMPTY"  # the module's own client
    told["module"] = openai.chat.completions.create(**GREEDY).choices[0].message.content
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
