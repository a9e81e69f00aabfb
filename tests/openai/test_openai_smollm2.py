"""The built-in model with real adapters: whichever way a request takes, the text is the same."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import lorax_triton

MESSAGES = [{"role": "user", "content": "Name three colours of a rainbow."}]
TOKENS = 8
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def smol_ways(start_ways: Callable[..., Any], smollm2_path: Path) -> Any:
    return start_ways(model_id=str(smollm2_path), max_total_tokens="192", num_blocks="300")


@pytest.fixture(scope="module")
def clients(smol_ways: Any) -> Iterator[list[openai.OpenAI]]:
    """The official package over HTTP and over gRPC."""
    http = openai.OpenAI(base_url=smol_ways.http, api_key="EMPTY", max_retries=0)
    with http, lorax_triton.OpenAI(base_url=smol_ways.grpc, max_retries=0) as grpc:
        yield [http, grpc]


@pytest.fixture(scope="module")
def native(smol_ways: Any) -> Iterator[lorax_triton.Client]:
    with lorax_triton.Client(smol_ways.grpc) as made:
        yield made


@pytest.fixture(scope="module")
def adapter_ids(adapters_path: Path) -> list[str]:
    """The base model and two adapters for it."""
    return ["", *sorted(str(path) for path in adapters_path.iterdir() if path.is_dir())[:2]]


def streamed(chunks: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


@pytest.mark.parametrize(
    ("adapters", "options"),
    [(2, {"temperature": 0}), (1, {"temperature": 0.8, "top_p": 0.9, "seed": 42})],
    ids=["greedy", "sampled"],
)
def test_the_same_chat_gives_the_same_text_over_http_grpc_and_the_native_client(
    clients: list[openai.OpenAI],
    native: lorax_triton.Client,
    adapter_ids: list[str],
    adapters: int,
    options: dict[str, Any],
) -> None:
    texts = []
    for adapter_id in adapter_ids[-adapters:]:
        own = native.generate(
            messages=MESSAGES,
            adapter_id=adapter_id or None,
            max_new_tokens=TOKENS,
            temperature=options["temperature"],
            top_p=options.get("top_p"),
            seed=options.get("seed"),
        )
        for client in clients:
            request = {"model": adapter_id, "messages": MESSAGES, "max_tokens": TOKENS, **options}
            whole = client.chat.completions.create(**request)
            assert whole.choices[0].message.content == own.generated_text
            assert whole.usage.completion_tokens == own.details.generated_tokens
            assert whole.usage.prompt_tokens == own.details.prompt_tokens
            assert streamed(client.chat.completions.create(**request, stream=True)) == own.generated_text
        texts.append(own.generated_text)
    assert len(set(texts)) == len(texts)


def test_the_same_prompt_gives_the_same_text_over_http_grpc_and_the_native_client(
    clients: list[openai.OpenAI], native: lorax_triton.Client, adapter_ids: list[str]
) -> None:
    for adapter_id in adapter_ids[:2]:
        own = native.generate(
            PROMPT, adapter_id=adapter_id or None, max_new_tokens=TOKENS, return_k_alternatives=2
        )
        for client in clients:
            told = client.completions.create(
                model=adapter_id, prompt=PROMPT, max_tokens=TOKENS, temperature=0, logprobs=2, echo=False
            ).choices[0]
            assert told.text == own.generated_text
            assert told.logprobs.token_logprobs == pytest.approx(
                [token.logprob for token in own.details.tokens if not token.special], abs=1e-3
            )


def test_a_prompts_text_is_scored_as_the_model_continues_it(clients: list[openai.OpenAI]) -> None:
    told = [
        client.completions.create(model="", prompt=f"{PROMPT} Paris.", max_tokens=0, echo=True, logprobs=1)
        for client in clients
    ]
    for answer in told:
        scored = dict(
            zip(answer.choices[0].logprobs.tokens, answer.choices[0].logprobs.token_logprobs, strict=True)
        )
        assert scored[" Paris"] > -2.0
        assert answer.choices[0].text == f"{PROMPT} Paris."


TOOL = {
    "type": "function",
    "function": {"name": "rainbow", "parameters": {"type": "object", "properties": {}}},
}
CHATS: list[dict[str, Any]] = [
    {"n": 2, "temperature": 1, "seed": 3, "max_tokens": 4},
    {"temperature": 0, "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 3},
    {"temperature": 0, "max_tokens": 4, "logit_bias": {"400": 100}, "frequency_penalty": 0.5, "user": "ann"},
    {"temperature": 0, "max_tokens": 6, "stop": ["o"], "extra_body": {"top_k": 5, "repetition_penalty": 1.1}},
    {"temperature": 0, "max_tokens": 4, "tools": [TOOL]},
]
TEXTS: list[dict[str, Any]] = [
    {"prompt": [PROMPT, "Once upon a time"], "n": 2, "temperature": 1, "seed": 3, "max_tokens": 4},
    {"prompt": [504, 3575, 282], "echo": True, "logprobs": 2, "temperature": 0, "max_tokens": 3},
    {"prompt": PROMPT, "best_of": 3, "temperature": 1, "seed": 1, "max_tokens": 3},
]


def assert_same(one: Any, other: Any) -> None:
    """Equal but for ids, times and the last digits of numbers."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert set(one) == set(other)
        for key in set(one) - {"id", "created", "cached_tokens"}:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-3)
    else:
        assert one == other


@pytest.mark.parametrize("fields", CHATS, ids=lambda fields: "-".join(fields))
def test_every_field_of_a_chat_has_the_same_effect_over_http_and_grpc(
    clients: list[openai.OpenAI], adapter_ids: list[str], fields: dict[str, Any]
) -> None:
    request = {"model": adapter_ids[1], "messages": MESSAGES, **fields}
    http, grpc = (client.chat.completions.create(**request) for client in clients)
    assert_same(http.model_dump(exclude_unset=True), grpc.model_dump(exclude_unset=True))
    chunks = clients[1].chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    texts = [""] * len(http.choices)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in http.choices]
    assert chunk.usage.completion_tokens == http.usage.completion_tokens


@pytest.mark.parametrize("fields", TEXTS, ids=lambda fields: "-".join(fields))
def test_every_field_of_a_completion_has_the_same_effect_over_http_and_grpc(
    clients: list[openai.OpenAI], fields: dict[str, Any]
) -> None:
    http, grpc = (client.completions.create(model="", **fields) for client in clients)
    assert_same(http.model_dump(exclude_unset=True), grpc.model_dump(exclude_unset=True))
    assert http.choices[0].text


def test_requests_for_different_adapters_run_together(
    clients: list[openai.OpenAI], adapter_ids: list[str]
) -> None:
    http, grpc = clients
    streams = [
        client.chat.completions.create(
            model=adapter_id, messages=MESSAGES, max_tokens=TOKENS, temperature=0, stream=True
        )
        for client in (http, grpc)
        for adapter_id in adapter_ids
    ]
    texts = [streamed(stream) for stream in streams]
    assert texts[:3] == texts[3:]


def run_as_written(program: str, base_url: str, model: str) -> str:
    """What a snippet of a guide prints, with its host and model replaced."""
    program = program.replace("http://127.0.0.1:8080/v1", base_url)
    program = program.replace("alignment-handbook/zephyr-7b-dpo-lora", model)
    printed = io.StringIO()
    scope: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed):
        exec(compile(textwrap.dedent(program), "snippet", "exec"), scope)
    scope["client"].close()
    answer = scope.get("resp") or scope["response"]
    assert answer.model == model
    assert answer.choices[0].message.content
    return printed.getvalue()


def test_the_guides_snippet_with_a_system_message_runs_as_written(
    smol_ways: Any, adapter_ids: list[str]
) -> None:
    program = """
        from openai import OpenAI
        client = OpenAI(api_key="EMPTY", base_url="http://127.0.0.1:8080/v1")

        resp = client.chat.completions.create(
            model="alignment-handbook/zephyr-7b-dpo-lora",
            messages=[
                {"role": "system", "content": "Be concise."},
                {"role": "user", "content": "Write a one-liner about LoRAX."},
            ],
            max_tokens=64,
        )
        print(resp.choices[0].message.content)
    """
    assert run_as_written(program, smol_ways.http, adapter_ids[1]).strip()


def test_the_guides_snippet_without_a_limit_runs_as_written(smol_ways: Any, adapter_ids: list[str]) -> None:
    program = """
        from openai import OpenAI
        client = OpenAI(api_key="EMPTY", base_url="http://127.0.0.1:8080/v1")
        response = client.chat.completions.create(
        model="alignment-handbook/zephyr-7b-dpo-lora",
        messages=[{"role": "user", "content": "How do I build a ship?"}]
        )
    """
    run_as_written(program, smol_ways.http, adapter_ids[2])
