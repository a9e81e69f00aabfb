"""`/v1/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from lorax_triton.openai_api.answer import Answer, json_answer
from lorax_triton.openai_api.backend import Backend, Call, Piece
from lorax_triton.openai_api.errors import ApiError
from lorax_triton.openai_api.events import stream_events
from lorax_triton.openai_api.fields import Fields, missing, wrong_type
from lorax_triton.openai_api.generation import (
    MAX_CHOICES,
    Generation,
    Identity,
    read_generation,
    read_response_format,
    usage,
)
from lorax_triton.openai_api.logprobs import completion_logprobs
from lorax_triton.openai_api.models import adapter_of_model, base_model
from lorax_triton.openai_api.sequences import Finished, run_all, run_merged
from lorax_triton.openai_api.text_choice import Echo, TextChoice

KIND = "text_completion"
# OpenAI's; a chat goes on until the model ends it, but a text may have no end.
DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 2048
MAX_LOGPROBS = 20

Prompt = str | list[int]


@dataclass(slots=True)
class CompletionRequest:
    """A completion request, read and checked. `max_tokens` 0 asks for the prompt alone, which `echo` gives."""

    generation: Generation
    prompts: list[Prompt]
    best_of: int
    echo: bool
    max_tokens: int


def read_completion_request(fields: Fields, headers: Mapping[str, str]) -> CompletionRequest:
    """Read the fields of a completion request.

    Raises:
        ApiError: naming the field at fault.
    """
    fields.refuse(("suffix",), "is not supported by this model, which only writes on")
    generation = read_generation(fields, headers)
    generation.logprobs = _read_logprobs(fields)
    sampling = generation.sampling
    response_format = read_response_format(fields)
    if response_format is not None:
        sampling["response_format"] = response_format
    limit = fields.integer("max_tokens", 0)
    if limit is None:
        limit = fields.integer("max_completion_tokens", 0)
    echo = fields.flag("echo")
    if limit == 0 and not echo:
        raise ApiError("'max_tokens' must be at least 1 unless 'echo' is set.", "max_tokens", "invalid_value")
    limit = DEFAULT_MAX_TOKENS if limit is None else limit
    sampling["max_tokens"] = max(1, limit)
    if generation.logprobs is not None:
        sampling["logprobs"] = generation.logprobs
    best_of = fields.integer("best_of", 1, MAX_CHOICES) or generation.n
    if best_of < generation.n:
        raise ApiError("'best_of' must be greater than or equal to 'n'.", "best_of", "invalid_value")
    if best_of > generation.n and generation.stream:
        raise ApiError(
            "'best_of' above 'n' cannot be streamed: the best is known only at the end.",
            "best_of",
            "invalid_value",
        )
    return CompletionRequest(generation, read_prompts(fields), best_of, echo, limit)


def read_prompts(fields: Fields) -> list[Prompt]:
    """The prompts: one text, one list of token ids, or a list of either.

    Raises:
        ApiError: there is none, or it is something else.
    """
    prompt = fields.values.get("prompt")
    if prompt is None:
        raise missing("prompt")
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif not isinstance(prompt, list):
        raise wrong_type("prompt", "a string or an array", prompt)
    elif prompt and all(_is_id(item) for item in prompt):
        prompts = [prompt]
    else:
        prompts = prompt
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise ApiError(
            f"Invalid 'prompt': expected 1 to {MAX_PROMPTS} prompts, but got {len(prompts)}.",
            "prompt",
            "invalid_value",
        )
    for index, item in enumerate(prompts):
        ids = isinstance(item, list) and all(_is_id(part) for part in item)
        if not isinstance(item, str) and not ids:
            raise wrong_type(f"prompt[{index}]", "a string or an array of token ids", item)
        if not item:
            raise ApiError("Invalid 'prompt': a prompt must not be empty.", "prompt", "invalid_value")
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_logprobs(fields: Fields) -> int | None:
    alternatives = fields.integer("return_k_alternatives", 0, MAX_LOGPROBS)
    value = fields.values.get("logprobs")
    if value is False:
        return alternatives
    if value is True:
        return alternatives or 0
    number = fields.integer("logprobs", 0, MAX_LOGPROBS)
    given = [item for item in (number, alternatives) if item is not None]
    return max(given) if given else None


async def answer_completion(
    fields: Fields, headers: Mapping[str, str], backend: Backend, fingerprint: str
) -> Answer:
    """Answer a completion request.

    Raises:
        ApiError, LoraxError: the request is at fault, or failed before its first token.
    """
    request = read_completion_request(fields, headers)
    name = request.generation.model or await base_model(backend)
    identity = Identity.new("cmpl", name, fingerprint)
    adapter_id = await adapter_of_model(request.generation.model, backend)
    run = CompletionRun(request, identity, adapter_id, backend)
    if request.generation.stream:
        return await stream_events(run.chunks(), request.generation.include_usage)
    return json_answer(await run.whole())


class CompletionRun:
    """Runs the sequences of one request: `best_of` for each prompt, of which `n` become choices."""

    def __init__(
        self, request: CompletionRequest, identity: Identity, adapter_id: str | None, backend: Backend
    ) -> None:
        self._request = request
        self._generation = request.generation
        self._identity = identity
        self._adapter_id = adapter_id
        self._backend = backend

    async def whole(self) -> dict[str, Any]:
        """The whole answer."""
        request = self._request
        echoes = await self._echoes()
        groups: list[list[Finished]] = [
            [Finished(details={**echo.details, "generated_tokens": 0, "finish_reason": "length"})]
            * self._generation.n
            for echo in echoes
        ]
        if request.max_tokens > 0:
            results = await run_all(self._backend, self._calls(request.best_of))
            groups = [results[i : i + request.best_of] for i in range(0, len(results), request.best_of)]
        choices: list[dict[str, Any]] = []
        for echo, group in zip(echoes, groups, strict=True):
            if request.best_of > self._generation.n:
                group = sorted(group, key=lambda result: result.mean_logprob, reverse=True)
            for result in group[: self._generation.n]:
                choices.append(self._choice(len(choices), echo, result))
        counts = usage([[result.details for result in group] for group in groups])
        return self._identity.envelope(KIND, choices) | {"usage": counts}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream, the last one with the usage and no choices."""
        n = self._generation.n
        echoes = await self._echoes()
        shown = [
            TextChoice(index, echoes[index // n], self._generation.logprobs)
            for index in range(len(echoes) * n)
        ]
        for choice in shown:
            if self._request.echo:
                yield self._identity.envelope(KIND, [choice.echo_chunk(self._request.max_tokens == 0)])
        if self._request.max_tokens > 0:
            async with aclosing(run_merged(self._backend, self._calls(n))) as pieces:
                async for index, piece in pieces:
                    chunk = shown[index].feed(piece)
                    if chunk is not None:
                        yield self._identity.envelope(KIND, [chunk])
        groups = [[choice.details for choice in shown[i : i + n]] for i in range(0, len(shown), n)]
        yield self._identity.envelope(KIND, []) | {"usage": usage(groups)}

    def _calls(self, per_prompt: int) -> list[Call]:
        generation = self._generation
        return [
            self._call(prompt, f"{number}-{choice}", generation.sampling_of(choice), generation.stream)
            for number, prompt in enumerate(self._request.prompts)
            for choice in range(per_prompt)
        ]

    def _call(self, prompt: Prompt, suffix: str, sampling: dict[str, Any], stream: bool) -> Call:
        ranked = self._request.best_of > self._generation.n
        return Call(
            request_id=f"{self._identity.id}-{suffix}",
            sampling=sampling,
            prompt=prompt if isinstance(prompt, str) else None,
            input_ids=None if isinstance(prompt, str) else prompt,
            adapter_id=self._adapter_id,
            adapter_source=self._generation.adapter_source,
            api_token=self._generation.api_token,
            stream=stream,
            return_tokens=self._generation.logprobs is not None or ranked,
        )

    async def _echoes(self) -> list[Echo]:
        if not self._request.echo:
            return [Echo() for _ in self._request.prompts]
        return list(
            await asyncio.gather(
                *(self._echo(number, prompt) for number, prompt in enumerate(self._request.prompts))
            )
        )

    async def _echo(self, number: int, prompt: Prompt) -> Echo:
        """A prompt's text and tokens. The server knows them; it is asked with a request of its own, whose one token
        nobody sees, because an answer tells of its prompt only at its end."""
        wants_tokens = self._generation.logprobs is not None
        if isinstance(prompt, str) and not wants_tokens and self._request.max_tokens > 0:
            return Echo(prompt)
        sampling = {"max_tokens": 1, "temperature": 0, "logprobs": self._generation.logprobs or 0}
        if wants_tokens:
            sampling["decoder_input_details"] = True
        call = self._call(prompt, f"{number}-echo", sampling, stream=False)
        call.echo = call.return_tokens = True
        result = Finished()
        async with aclosing(self._backend.generate(call)) as pieces:
            async for piece in pieces:
                result.add(piece)
        tokens = list(result.details.get("prefill") or ()) if wants_tokens else []
        if isinstance(prompt, str):
            return Echo(prompt, tokens, result.details)
        generated = "".join(
            str(token.get("text") or "") for token in result.tokens if not token.get("special")
        )
        whole = str(result.details.get("generated_text") or "")
        return Echo(whole[: len(whole) - len(generated)], tokens, result.details)

    def _choice(self, index: int, echo: Echo, result: Finished) -> dict[str, Any]:
        choice = TextChoice(index, echo, self._generation.logprobs)
        shown = choice.feed(Piece(result.text, result.tokens, result.details)) or {}
        logprobs = None
        if self._generation.logprobs is not None:
            tokens = [*echo.tokens, *choice.tokens]
            logprobs = completion_logprobs(tokens, self._generation.logprobs, 0)
        return shown | {"text": echo.text + result.text, "logprobs": logprobs}
