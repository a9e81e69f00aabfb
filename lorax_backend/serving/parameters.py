"""From what a caller sent to a `GenerateRequest`: ranges and combinations.

Everything that can be checked without a tokenizer is checked here, and all problems of a request are reported together.
"""

from __future__ import annotations

from typing import Any

from lorax_backend.config import ServerConfig
from lorax_backend.errors import UnsupportedError, ValidationError
from lorax_backend.serving.adapter_fields import read_adapter
from lorax_backend.serving.chat import validate_messages
from lorax_backend.serving.constraint import read_constraint
from lorax_backend.serving.given import Given, RawRequest, at, collect
from lorax_backend.serving.schema import shorten
from lorax_backend.types import GenerateRequest, OutputOptions, SamplingParams

# Below this a division of the logits overflows; the distribution is a single token long before.
_GREEDY_TEMPERATURE = 1e-5
_BIAS_LIMIT = 100.0


def parse_request(raw: RawRequest, config: ServerConfig) -> GenerateRequest:
    """Check a request and build what the service runs.

    Raises:
        ValidationError: naming every field that is unknown, of the wrong type, out of range or in conflict.
        UnsupportedError: every problem is a feature this server does not have.
    """
    _refuse_embedding(raw, config)
    given = collect(raw)
    values = given.values
    prompt = _read_prompt(given, config)
    sampling = _read_sampling(given)
    stop = tuple(values.get("stop_words") or ())
    if len(stop) > config.max_stop_sequences:
        given.report(
            f"{given.label('stop_words')}: {len(stop)} stop strings, at most {config.max_stop_sequences} are allowed "
            "(server option max_stop_sequences)"
        )
    if any(not text for text in stop):
        given.report(f"{given.label('stop_words')}: a stop string must not be empty")
    n, best_of = _read_sequences(given, config, sampling)
    read_constraint(given)
    adapter = read_adapter(given, config)
    given.raise_problems()
    return GenerateRequest(
        request_id=raw.request_id,
        sampling=sampling,
        **prompt,
        adapter=adapter,
        api_token=values.get("api_token") or _bearer_token(raw.parameters),
        stop=stop,
        stream=values.get("stream", False),
        ignore_eos_token=values.get("ignore_eos_token", False),
        truncate=values.get("truncate"),
        return_full_text=_wants_full_text(values),
        add_special_tokens=values.get("add_special_tokens", True),
        seed_given="seed" in values,
        priority=values.get("priority", 0),
        outputs=_read_outputs(values),
        tools=values.get("tools"),
        include_stop_str_in_output=values.get("include_stop_str_in_output", True),
        n=n,
        best_of=best_of,
        queue_timeout_s=values.get("queue_timeout_s") or config.queue_timeout_s or None,
        guideline=values.get("guideline"),
    )


def _refuse_embedding(raw: RawRequest, config: ServerConfig) -> None:
    """Say what is wrong with a request for an embedding or classes, rather than that it has no prompt."""
    if raw.fields.get("embedding_request") or raw.parameters.get("embedding_request"):
        raise UnsupportedError(
            f"embedding_request: {config.model_id} is served to generate text, it neither embeds nor classifies; "
            "ask a server of a model that does"
        )


def parse_prompt(raw: RawRequest, config: ServerConfig) -> GenerateRequest:
    """Read only what decides the prompt's token ids; for the tokenizer model, whose requests may lack the rest."""
    given = collect(raw)
    prompt = _read_prompt(given, config)
    adapter = read_adapter(given, config)
    given.raise_problems()
    values = given.values
    seed = values.get("seed")
    return GenerateRequest(
        request_id=raw.request_id,
        sampling=SamplingParams(max_new_tokens=0, seed=seed or 0),
        **prompt,
        adapter=adapter,
        api_token=values.get("api_token") or _bearer_token(raw.parameters),
        seed_given=seed is not None,
        truncate=values.get("truncate"),
        add_special_tokens=values.get("add_special_tokens", True),
        tools=values.get("tools"),
        guideline=values.get("guideline"),
    )


def _read_prompt(given: Given, config: ServerConfig) -> dict[str, Any]:
    """Exactly one of the three forms of a prompt, within the size limit."""
    values = given.values
    names = [name for name in ("text_input", "messages", "input_ids") if name in given.labels]
    prompt: dict[str, Any] = {}
    if not names:
        given.report("text_input: missing; send one of text_input, messages or input_ids")
        return prompt
    if len(names) > 1:
        given.report(f"{' and '.join(names)}: both given; send one of text_input, messages or input_ids")
        return prompt
    if names[0] not in values:  # its conversion failed and was reported
        return prompt
    value = values[names[0]]
    label = given.label(names[0])
    size = _utf8_length(value) if names[0] != "input_ids" else 0
    if not value:
        given.report(f"{label}: must not be empty")
    elif size > config.max_prompt_bytes:
        given.report(
            f"{label}: {size} bytes, at most {config.max_prompt_bytes} are allowed; "
            "shorten it or raise the server option max_prompt_bytes"
        )
    elif names[0] == "input_ids":
        prompt["input_ids"] = value
    elif names[0] == "messages" or values.get("apply_chat_template", False):
        messages = value if names[0] == "messages" else [{"role": "user", "content": value}]
        try:
            prompt["messages"] = validate_messages(messages, label)
        except ValidationError as error:
            given.problems.append(error)
    else:
        prompt["prompt"] = value
    return prompt


def _utf8_length(value: Any) -> int:
    """Bytes of all texts inside `value`, which is a text or the lists and objects of JSON."""
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            total += len(item) if item.isascii() else len(item.encode("utf-8", "surrogatepass"))
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return total


def _read_sampling(given: Given) -> SamplingParams:
    """The sampling parameters. Any parameter that shapes a distribution switches sampling on; temperature 0 wins."""
    values = given.values
    temperature = values.get("temperature")
    greedy = temperature is not None and temperature < _GREEDY_TEMPERATURE
    top_k = max(values.get("top_k", 0), 0)
    top_p, typical_p = values.get("top_p", 1.0), values.get("typical_p", 1.0)
    shaped = temperature is not None or top_k > 0 or top_p < 1.0 or typical_p < 1.0
    max_tokens = values.get("max_tokens", 0)
    min_tokens = values.get("min_tokens", 0)
    if max_tokens and min_tokens > max_tokens:
        given.report(
            f"{given.label('min_tokens')}: {min_tokens} is more than {given.label('max_tokens')} {max_tokens}"
        )
    if any(token_id < 0 for token_id in values.get("stop_token_ids") or ()):
        given.report(f"{given.label('stop_token_ids')}: token ids are not negative")
    alternatives = max(values.get("return_k_alternatives", 0), values.get("logprobs", 0))
    logprobs_wanted = (
        "logprobs" in values
        or alternatives > 0
        or any(values.get(name) for name in ("return_logprobs", "return_cumulative_logprob", "return_tokens"))
        or values.get("best_of", 1) > 1  # the answers are compared by them
    )
    if values.get("decoder_input_details") and values.get("stream"):
        given.report(
            f"{given.label('decoder_input_details')}: the prompt's tokens are not sent in streams; leave it out or set "
            "stream to false"
        )
    return SamplingParams(
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        do_sample=not greedy and (shaped or values.get("do_sample", False)),
        temperature=1.0 if temperature is None or greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=values.get("seed", 0),
        repetition_penalty=values.get("repetition_penalty", 1.0),
        frequency_penalty=values.get("frequency_penalty", 0.0),
        presence_penalty=values.get("presence_penalty", 0.0),
        top_logprobs=alternatives if logprobs_wanted else None,
        stop_token_ids=tuple(values.get("stop_token_ids") or ()),
        typical_p=typical_p,
        watermark=values.get("watermark", False),
        logit_bias=_read_bias(given),
        prompt_logprobs=values.get("decoder_input_details", False),
    )


def _read_bias(given: Given) -> tuple[tuple[int, float], ...]:
    bias = []
    for key, value in (given.values.get("logit_bias") or {}).items():
        label = at(given.label("logit_bias"), f"[{shorten(key)}]")
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
        if not str(key).isdecimal() or len(str(key)) > 9:
            given.report(f"{label}: expected a token id as key")
        elif number is None or not -_BIAS_LIMIT <= number <= _BIAS_LIMIT:
            given.report(
                f"{label}: expected a number from -{_BIAS_LIMIT:g} to {_BIAS_LIMIT:g}, got {shorten(value)}"
            )
        else:
            bias.append((int(key), float(number)))
    return tuple(bias)


def _read_sequences(given: Given, config: ServerConfig, sampling: SamplingParams) -> tuple[int, int]:
    """How many answers to return and how many to draw, by LoRAX's rules for best_of."""
    n = given.values.get("n", 1)
    best_of = given.values.get("best_of", n)
    if n > config.max_n:
        given.report(
            f"{given.label('n')}: {n} answers, at most {config.max_n} are allowed (server option max_n)"
        )
    if best_of <= 1 or "best_of" not in given.values:
        if best_of < n:
            given.report(f"{given.label('best_of')}: {best_of} is less than {given.label('n')} {n}")
        return n, best_of
    label = given.label("best_of")
    if best_of > config.max_best_of:
        problem = (
            f"{best_of} answers, at most {config.max_best_of} are allowed (server option max_best_of)"
            if config.max_best_of > 1
            else "not allowed on this server (its option max_best_of is 1); leave it out"
        )
        given.report(f"{label}: {problem}")
    if best_of < n:
        given.report(f"{label}: {best_of} is less than {given.label('n')} {n}")
    if not sampling.do_sample:
        given.report(f"{label}: more than one answer needs sampling; set do_sample, or temperature, top_k, top_p or "
                     "typical_p")  # fmt: skip
    if "seed" in given.values:
        given.report(f"{label}: a seed makes all answers of best_of alike; leave {given.label('seed')} out")
    if given.values.get("stream"):
        given.report(
            f"{label}: the best answer is known only at the end; set stream to false or leave best_of out"
        )
    return n, best_of


def _wants_full_text(values: dict[str, Any]) -> bool:
    if "return_full_text" in values:
        return bool(values["return_full_text"])
    return not values.get("exclude_input_in_output", True)


def _read_outputs(values: dict[str, Any]) -> OutputOptions:
    return OutputOptions(
        token_ids=values.get("return_token_ids", False),
        tokens=values.get("return_tokens", False) or "return_k_alternatives" in values,
        finish_reason=values.get("return_finish_reason", False),
        logprobs=values.get("return_logprobs", False),
        cumulative_logprob=values.get("return_cumulative_logprob", False),
        num_input_tokens=values.get("return_num_input_tokens", False),
        num_output_tokens=values.get("return_num_output_tokens", False),
        details=values.get("return_details", False) or values.get("decoder_input_details", False),
    )


def _bearer_token(parameters: dict[str, Any]) -> str | None:
    """The token of a forwarded `Authorization: Bearer X` header."""
    header = parameters.get("authorization")
    if isinstance(header, str) and header[:7].lower() == "bearer ":
        return header[7:].strip() or None
    return None
