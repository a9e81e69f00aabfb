"""What chat and text completions have in common: the fields of a request, and the calls they lead to."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorax_triton.openai_api.errors import ApiError
from lorax_triton.openai_api.fields import Fields, wrong_type

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
_UNSIGNED_64 = 2**64
# Keys that stand for "no key" in programs that must send one.
_PLACEHOLDER_TOKENS = frozenset(
    {
        "",
        "empty",
        "none",
        "null",
        "dummy",
        "dummy-key",
        "unused",
        "not-needed",
        "no-key",
        "sk-no-key-required",
    }
)
# Fields that the server understands as they are: OpenAI's, LoRAX's, and those other servers have added.
_PASSED_ON = (
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "ignore_eos_token",
    "ignore_eos",
    "watermark",
    "truncate",
    "truncate_prompt_tokens",
    "min_tokens",
    "min_new_tokens",
    "stop_token_ids",
    "include_stop_str_in_output",
    "add_special_tokens",
    "merged_adapters",
    "priority",
    "bad_words",
    "schema",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
)
# Ask for something that cannot be left out without a wrong answer.
_REFUSED = ("audio", "web_search_options", "use_beam_search", "length_penalty")

# What `response_format: {"type": "json_object"}` without a schema stands for: any JSON object.
ANY_OBJECT_SCHEMA: dict[str, Any] = {
    "additionalProperties": {"type": ["object", "string", "integer", "number", "boolean", "null"]},
    "title": "ArbitraryJsonModel",
    "type": "object",
}


@dataclass(slots=True)
class Generation:
    """A request's fields, read and checked.

    `logprobs` is None for none, else how many alternatives to show beside each token. `include_usage` is None if the
    request does not say. `sampling` lacks the seed, which differs among choices.
    """

    model: str
    sampling: dict[str, Any]
    n: int = 1
    seed: int | None = None
    stream: bool = False
    include_usage: bool | None = None
    logprobs: int | None = None
    adapter_source: str | None = None
    api_token: str | None = None

    def sampling_of(self, choice: int) -> dict[str, Any]:
        """The sampling parameters of one of a prompt's choices. The first has the request's own seed, so that it is
        the same whatever `n` is."""
        if self.seed is None:
            return dict(self.sampling)
        return self.sampling | {"seed": (self.seed + choice) % _UNSIGNED_64}


@dataclass(frozen=True, slots=True)
class Identity:
    """What every part of an answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: str, model: str, fingerprint: str) -> Identity:
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, fingerprint)

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An answer, or a part of one, around its choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.system_fingerprint,
        }


def read_generation(fields: Fields, headers: Mapping[str, str]) -> Generation:
    """The fields that chat and text completions share; lengths, log probabilities and formats are not among them.

    Raises:
        ApiError: naming the field at fault.
    """
    fields.refuse(_REFUSED, "is not supported by this server")
    model = fields.values.get("model")
    if model is None:
        raise ApiError("you must provide a model parameter", "model", "missing_required_parameter")
    stream = fields.flag("stream")
    options = Fields(fields.object("stream_options") or {}, "stream_options.")
    if fields.has("stream_options") and not stream:
        raise ApiError(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
        )
    seed = fields.integer("seed", -(2**63), _UNSIGNED_64 - 1)
    return Generation(
        model=fields.required_text("model"),
        sampling=_read_sampling(fields),
        n=fields.integer("n", 1, MAX_CHOICES) or 1,
        seed=None if seed is None else seed % _UNSIGNED_64,
        stream=stream,
        include_usage=options.flag("include_usage") if options.has("include_usage") else None,
        adapter_source=fields.text("adapter_source"),
        api_token=fields.text("api_token") or bearer_token(headers),
    )


def _read_sampling(fields: Fields) -> dict[str, Any]:
    sampling: dict[str, Any] = {"include_stop_str_in_output": False}
    temperature = fields.number("temperature", 0)
    # OpenAI's API samples at 1 unless told otherwise.
    sampling["temperature"] = 1.0 if temperature is None else temperature
    if temperature != 0:
        sampling["do_sample"] = True
    top_p = fields.number("top_p", 0, 1)
    if top_p == 0:  # the likeliest token alone; the server wants it said that way
        sampling["top_k"] = 1
    elif top_p is not None:
        sampling["top_p"] = top_p
    for name in ("frequency_penalty", "presence_penalty"):
        value = fields.number(name, -2, 2)
        if value is not None:
            sampling[name] = value
    stop = fields.texts("stop")
    if stop:
        sampling["stop"] = stop
    bias = read_logit_bias(fields)
    if bias:
        sampling["logit_bias"] = bias
    for name in _PASSED_ON:
        if fields.has(name):
            sampling[name] = fields.values[name]
    return sampling


def read_logit_bias(fields: Fields) -> dict[str, float]:
    """Token id (as text, which JSON's keys are) -> bias.

    Raises:
        ApiError: a key is no token id, or a bias is not within -100 to 100.
    """
    bias = fields.object("logit_bias") or {}
    entries = Fields(bias, "logit_bias.")
    for key in bias:
        if not key.strip().isdecimal():
            raise ApiError(
                f"Invalid key in 'logit_bias': {key!r}. Keys are token ids.", "logit_bias", "invalid_value"
            )
        if entries.number(key, -100, 100) is None:
            raise wrong_type(f"logit_bias.{key}", "a decimal", None)
    return bias


def read_response_format(fields: Fields) -> dict[str, Any] | None:
    """The server's response format for OpenAI's and LoRAX's; None for plain text.

    Raises:
        ApiError: its type is unknown or a part has the wrong type.
    """
    given = fields.object("response_format")
    if given is None:
        return None
    parts = Fields(given, "response_format.")
    kind = parts.required_text("type")
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise ApiError(
            f"Invalid value: '{kind}'. Supported values are: 'text', 'json_object' and 'json_schema'.",
            "response_format.type",
            "invalid_value",
        )
    schema = parts.object("schema")
    if kind == "json_schema" and parts.has("json_schema"):
        wrapped = Fields(parts.object("json_schema") or {}, "response_format.json_schema.")
        schema = wrapped.object("schema") or schema
    elif kind == "json_schema" and schema is None:
        raise ApiError(
            "Missing required parameter: 'response_format.json_schema'.",
            "response_format.json_schema",
            "missing_required_parameter",
        )
    return {"type": kind, "schema": ANY_OBJECT_SCHEMA if schema is None else schema}


def bearer_token(headers: Mapping[str, str]) -> str | None:
    """The token of `Authorization: Bearer X`, unless it is one of the words that stand for none."""
    header = next((value for name, value in headers.items() if name.lower() == "authorization"), "")
    if header[:7].lower() != "bearer ":
        return None
    token = header[7:].strip()
    return None if token.lower().replace("_", "-") in _PLACEHOLDER_TOKENS else token


def finish_reason(details: Mapping[str, Any]) -> str:
    """OpenAI's word for why a sequence ended."""
    return "length" if details.get("finish_reason") == "length" else "stop"


def usage(details_of_prompts: list[list[Mapping[str, Any]]]) -> dict[str, Any]:
    """Token counts. A prompt counts once, however many choices were made from it.

    Args:
        details_of_prompts: for each prompt, the server's details of all sequences generated from it.
    """
    prompt = sum(int(group[0].get("prompt_tokens") or 0) for group in details_of_prompts if group)
    cached = sum(int(group[0].get("cached_tokens") or 0) for group in details_of_prompts if group)
    completion = sum(
        int(details.get("generated_tokens") or 0) for group in details_of_prompts for details in group
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
