"""From a checked request to the engine's: tokenization, truncation, length limits, end tokens, seed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from lorax_backend.errors import ValidationError
from lorax_backend.serving.answer import PreparedPrompt
from lorax_backend.serving.template_sandbox import SandboxedTemplate
from lorax_backend.serving.tokenizer import TokenizerPool
from lorax_backend.types import EngineInfo, EngineRequest, GenerateRequest, SamplingParams

_SEED_BITS = 53  # a drawn seed survives JSON readers that hold numbers as doubles


@dataclass(frozen=True, slots=True)
class Limits:
    """Longest prompt, and longest prompt plus answer, in tokens."""

    max_input_length: int
    max_total_tokens: int

    @classmethod
    def of(cls, info: EngineInfo) -> Limits:
        return cls(info.max_input_length, info.max_total_tokens)


def encode_prompt(
    request: GenerateRequest, tokenizer: TokenizerPool, template: SandboxedTemplate | None = None
) -> tuple[list[int], str]:
    """Token ids of the prompt after truncation, and its text (empty unless the answer must repeat it).

    `template` is used for messages in place of the model's own. `truncate` keeps the last tokens and applies before
    any length check.

    Raises:
        TemplateError: the chat template failed.
        ValidationError: an id is out of range, or nothing is left.
    """
    text = ""
    if request.input_ids is not None:
        ids = _checked_ids(request.input_ids, tokenizer.vocab_size)
        if request.return_full_text:
            text = tokenizer.decode(ids)
    elif request.messages is not None:
        if template is None:
            text = tokenizer.render_chat(request.messages, request.tools, request.guideline)
        else:
            text = template.render(request.messages, request.tools, request.guideline)
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        text = request.prompt or ""
        ids = _checked_ids(tokenizer.encode(text, request.add_special_tokens), tokenizer.vocab_size)
    if request.truncate is not None:
        ids = ids[-request.truncate :]
    if not ids:
        raise ValidationError("text_input: the prompt has no tokens; send a text that is not empty")
    return ids, text if request.return_full_text else ""


def prepare(
    request: GenerateRequest,
    handle: int,
    tokenizer: TokenizerPool,
    limits: Limits,
    template: SandboxedTemplate | None = None,
) -> tuple[EngineRequest, PreparedPrompt]:
    """Build the engine's request; `template` as in `encode_prompt`.

    Raises:
        ValidationError, TemplateError: see `encode_prompt`; also a prompt or a sum that is too long.
    """
    if request.truncate is not None and request.truncate > limits.max_input_length:
        raise ValidationError(
            f"truncate: {request.truncate} is more than the longest prompt, {limits.max_input_length} tokens "
            "(server option max_input_length)"
        )
    ids, text = encode_prompt(request, tokenizer, template)
    sampling = _bounded(request, len(ids), limits)
    end_ids = () if request.ignore_eos_token else tokenizer.eos_token_ids
    stop_ids = tuple(dict.fromkeys((*end_ids, *sampling.stop_token_ids)))
    seed = None
    if sampling.do_sample:
        seed = sampling.seed if request.seed_given else secrets.randbits(_SEED_BITS)
    _check_bias(sampling, tokenizer.vocab_size)
    sampling = replace(sampling, stop_token_ids=stop_ids, seed=seed or 0)
    engine_request = EngineRequest(
        handle=handle,
        prompt_ids=ids,
        sampling=sampling,
        adapter=request.adapter,
        api_token=request.api_token,
        priority=request.priority,
        queue_timeout_s=request.queue_timeout_s,
    )
    return engine_request, PreparedPrompt(ids, text, seed)


def sibling(
    request: EngineRequest, prompt: PreparedPrompt, handle: int, number: int, seed_given: bool
) -> tuple[EngineRequest, PreparedPrompt]:
    """Sequence `number` (from 1 on) of a request for several: the same but for the seed, which is the request's plus
    the number, or drawn anew if the request gave none."""
    seed = prompt.seed
    if seed is not None:
        seed = (seed + number) % 2**64 if seed_given else secrets.randbits(_SEED_BITS)
    sampling = replace(request.sampling, seed=seed or 0)
    twin = replace(request, handle=handle, prompt_ids=list(request.prompt_ids), sampling=sampling)
    return twin, replace(prompt, seed=seed)


def _checked_ids(ids: list[int], vocab_size: int) -> list[int]:
    """Ids outside the embedding would fail inside the model, and with it every request of the batch."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        position = next(i for i, token_id in enumerate(ids) if not 0 <= token_id < vocab_size)
        raise ValidationError(
            f"input_ids[{position}]: {ids[position]} is not a token of this model, "
            f"must be from 0 to {vocab_size - 1}"
        )
    return ids


def _check_bias(sampling: SamplingParams, vocab_size: int) -> None:
    for token_id, _ in sampling.logit_bias:
        if token_id >= vocab_size:
            raise ValidationError(
                f"logit_bias[{token_id}]: not a token of this model, must be from 0 to {vocab_size - 1}"
            )


def _bounded(request: GenerateRequest, length: int, limits: Limits) -> SamplingParams:
    """The sampling parameters with `max_new_tokens` settled; the lengths are checked on the truncated prompt."""
    sampling = request.sampling
    wanted = sampling.max_new_tokens
    if length > limits.max_input_length:
        raise ValidationError(
            f"text_input: the prompt has {length} tokens, at most {limits.max_input_length} are allowed "
            "(server option max_input_length); shorten it or send truncate"
        )
    room = limits.max_total_tokens - length
    if room < 1:
        raise ValidationError(
            f"text_input: the prompt's {length} tokens leave no room for an answer (max_total_tokens is "
            f"{limits.max_total_tokens}); shorten it or send truncate"
        )
    if wanted > room:
        raise ValidationError(
            f"max_tokens: {wanted} with a prompt of {length} tokens is more than max_total_tokens "
            f"{limits.max_total_tokens}; ask for at most {room}, or leave max_tokens out"
        )
    if sampling.min_new_tokens > (wanted or room):
        raise ValidationError(
            f"min_tokens: {sampling.min_new_tokens} is more than the {wanted or room} tokens that can be generated"
        )
    return replace(sampling, max_new_tokens=wanted or room)
