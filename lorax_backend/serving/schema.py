"""The one table of request parameters: names, types, ranges, defaults. Standard library only.

A parameter has the same meaning whether it comes as an input tensor, as a key of the `sampling_parameters` JSON or as
a request parameter. LoRAX's and vLLM's names are both accepted.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from lorax_backend.errors import UnsupportedError, ValidationError

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_KIND_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a finite number",
    "text": "a text",
    "texts": "a text or a list of texts",
    "ids": "a list of token ids",
    "object": "a JSON object",
    "objects": "a JSON list of objects",
    "any": "anything",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter.

    `kind` is a key of `_KIND_WORDS`. `low` and `high` bound numbers, inclusive unless open. A parameter with
    `neutral` values is known but not supported: only those values, which ask for nothing, are accepted.
    """

    name: str
    kind: str
    doc: str
    aliases: tuple[str, ...] = ()
    default: str = "absent"
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    remedy: str = ""
    neutral: tuple[Any, ...] | None = None

    @property
    def range_text(self) -> str:
        """The allowed range in words; empty if there is none."""
        parts = []
        if self.low is not None:
            parts.append(f"{'above' if self.open_low else 'at least'} {self.low}")
        if self.high is not None:
            parts.append(f"{'below' if self.open_high else 'at most'} {self.high}")
        return " and ".join(parts)

    def read(self, value: Any, label: str) -> Any:
        """Convert a value to the parameter's type and check it. `label` names the field in errors.

        Raises:
            ValidationError: wrong type or out of range.
            UnsupportedError: the value asks for something this server cannot do.
        """
        if self.neutral is not None:
            return self._read_unsupported(value, label)
        try:
            result = _CONVERTERS[self.kind](value)
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise ValidationError(
                f"{label}: expected {_KIND_WORDS[self.kind]}, got {shorten(value)}"
            ) from None
        if self.kind in ("int", "float"):
            too_low = self.low is not None and (result <= self.low if self.open_low else result < self.low)
            too_high = self.high is not None and (
                result >= self.high if self.open_high else result > self.high
            )
            if too_low or too_high:
                remedy = f"; {self.remedy}" if self.remedy else ""
                raise ValidationError(
                    f"{label}: {shorten(value)} is out of range, must be {self.range_text}{remedy}"
                )
        return result

    def _read_unsupported(self, value: Any, label: str) -> None:
        for accepted in self.neutral or ():
            try:
                kind = (
                    "bool" if isinstance(accepted, bool) else "float" if isinstance(accepted, int) else "any"
                )
                if _CONVERTERS[kind](value) == accepted:
                    return
            except (ValueError, TypeError, OverflowError):
                continue
        remedy = self.remedy or "leave it out"
        raise UnsupportedError(
            f"{label}: {self.doc} not supported by this server (got {shorten(value)}); {remedy}"
        )


def shorten(value: Any, limit: int = 60) -> str:
    """A value as it may stand in an error message."""
    text = repr(value[: limit + 1] if isinstance(value, str | list) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def load_json(text: str, label: str) -> Any:
    """Parse strict JSON.

    Raises:
        ValidationError: naming `label` and the place of the mistake.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise ValidationError(f"{label}: not valid JSON ({error.msg}, {place})") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValidationError(f"{label}: not valid JSON ({reason})") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _to_bool(value: Any) -> bool:
    word = str(value).strip().lower()
    if isinstance(value, bool | int | str) and word in (*_TRUE, *_FALSE):
        return word in _TRUE
    raise ValueError


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise ValueError


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not value.isascii():
        value.encode()  # JSON can spell lone surrogates, which are no text
    return value


def _to_texts(value: Any) -> list[str]:
    if isinstance(value, str):
        # Request parameters cannot hold lists, so a JSON list written as a text is understood too.
        if value.startswith('["') and value.endswith('"]'):
            return _to_texts(json.loads(value))
        return [_to_text(value)]
    if isinstance(value, list | tuple):
        return [_to_text(item) for item in value]
    raise TypeError


def _to_ids(value: Any) -> list[int]:
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, list | tuple):
        raise TypeError
    return [_to_int(item) for item in value]


def _to_object(value: Any) -> dict[str, Any]:
    parsed = json.loads(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise TypeError
    return parsed


def _to_objects(value: Any) -> list[dict[str, Any]]:
    parsed = json.loads(value) if isinstance(value, str) else value
    if not isinstance(parsed, list) or not all(isinstance(item, dict) for item in parsed):
        raise TypeError
    return parsed


_CONVERTERS: dict[str, Any] = {
    "bool": _to_bool,
    "int": _to_int,
    "float": _to_float,
    "text": _to_text,
    "texts": _to_texts,
    "ids": _to_ids,
    "object": _to_object,
    "objects": _to_objects,
    "any": lambda value: value,
}

_P = Parameter
_UNSIGNED_64 = 2**64 - 1
_INT_32 = 2**31 - 1

PROMPT_PARAMETERS: tuple[Parameter, ...] = (
    _P("text_input", "text", "prompt", ("inputs", "prompt")),
    _P("messages", "objects", "chat messages, rendered with the chat template"),
    _P("input_ids", "ids", "prompt as token ids, used as they are", ("prompt_token_ids",)),
)

_LENGTH_PARAMETERS = (
    _P("max_tokens", "int", "most tokens to generate", ("max_new_tokens", "max_completion_tokens"),
       "up to max_total_tokens", low=1, high=_INT_32,
       remedy="leave it out to generate up to the server's max_total_tokens"),
    _P("min_tokens", "int", "tokens to generate before an end token or stop string counts",
       ("min_new_tokens", "min_length"), "0", low=0, high=_INT_32),
    _P("truncate", "int", "keep only the last so many tokens of the prompt", ("truncate_prompt_tokens",),
       low=1, high=_INT_32),
    _P("stop_words", "texts", "texts that end the answer, wherever they appear", ("stop", "stop_sequences"), "none"),
    _P("stop_token_ids", "ids", "token ids that end the answer, beside the model's own", (), "none"),
    _P("ignore_eos_token", "bool", "go on after the model's end token", ("ignore_eos",), "false"),
    _P("include_stop_str_in_output", "bool", "keep the stop string at the end of the text", (), "true"),
)  # fmt: skip

_SAMPLING_PARAMETERS = (
    _P("do_sample", "bool", "sample even if no other sampling parameter is given", (), "false"),
    _P("temperature", "float", "sharpness of the distribution; 0 is greedy", (), "1", low=0,
       remedy="use 0 for greedy decoding"),
    _P("top_k", "int", "sample among the k likeliest tokens; 0 or -1 is off", (), "0", low=-1, high=_INT_32,
       remedy="use 0 to switch it off"),
    _P("top_p", "float", "sample among the likeliest tokens of this total probability; 1 is off", (), "1",
       low=0, high=1, open_low=True, remedy="use 1 to switch it off"),
    _P("typical_p", "float", "sample among the tokens nearest to the distribution's entropy, of this total probability",
       (), "off", low=0, high=1, open_low=True, open_high=True, remedy="leave it out to switch it off"),
    _P("seed", "int", "seed of the random stream; the i-th of n sequences uses seed + i", ("random_seed",),
       "drawn by the server", low=0, high=_UNSIGNED_64),
    _P("best_of", "int", "draw so many answers and return the one of the highest mean log probability per token", (),
       "n", low=1, high=_INT_32),
    _P("n", "int", "answers to return, each with its own index", ("num_return_sequences",), "1", low=1, high=_INT_32),
    _P("watermark", "bool", "mark the text by favouring, after each token, a half of the vocabulary that the token "
       "decides (watermark_gamma, watermark_delta)", (), "false"),
    _P("logit_bias", "object", "JSON object, token id -> number from -100 to 100 added to its logit", (), "none"),
    _P("repetition_penalty", "float", "above 1 discourages tokens of the prompt and the answer", (), "1",
       low=0, open_low=True, remedy="use 1 to switch it off"),
    _P("frequency_penalty", "float", "subtracted once per occurrence in the answer", (), "0", low=-2, high=2),
    _P("presence_penalty", "float", "subtracted from tokens present in the answer", (), "0", low=-2, high=2),
    _P("return_k_alternatives", "int", "likeliest alternatives reported beside every token", (), "0",
       low=1, high=100),
    _P("logprobs", "int", "log probabilities of so many likeliest tokens; 0: of the chosen token only",
       ("top_logprobs",), low=0, high=100),
)  # fmt: skip

_ADAPTER_PARAMETERS = (
    _P("adapter_id", "text", "LoRA adapter: hub id, id@revision or folder; empty for the base model",
       ("lora_name",), "base model"),
    _P("adapter_source", "text", "hub, local, s3 or pbase", (), "default_adapter_source"),
    _P("adapter_revision", "text", "revision of adapter_id; the same as id@revision", (), "the newest"),
    _P("api_token", "text", "token for a private adapter", (), "the server's own"),
    _P("merged_adapters", "object", "merge of adapters: ids, weights, merge_strategy, density, majority_sign_method; "
       "checked, and then refused: merging is not served yet", (), "none"),
)  # fmt: skip

_ANSWER_PARAMETERS = (
    _P("stream", "bool", "one response whenever tokens are ready, instead of one at the end", ("streaming",), "false"),
    _P("return_full_text", "bool", "put the prompt before the text (not in streamed pieces)", ("echo",), "false"),
    _P("exclude_input_in_output", "bool", "opposite of return_full_text", ("exclude_input_from_output",), "true"),
    _P("add_special_tokens", "bool", "let the tokenizer add its begin token to a text prompt", (), "true"),
    _P("apply_chat_template", "bool", "treat text_input as one user message", (), "false"),
    _P("tools", "objects", "tools handed to the chat template", (), "none"),
    _P("return_finish_reason", "bool", "ask for finish_reason", (), "false"),
    _P("return_logprobs", "bool", "ask for logprobs", ("return_log_probs",), "false"),
    _P("return_cumulative_logprob", "bool", "ask for cumulative_logprob", (), "false"),
    _P("return_num_input_tokens", "bool", "ask for num_input_tokens", (), "false"),
    _P("return_num_output_tokens", "bool", "ask for num_output_tokens", (), "false"),
    _P("return_token_ids", "bool", "ask for token_ids", (), "false"),
    _P("return_tokens", "bool", "ask for tokens", (), "false"),
    _P("return_details", "bool", "ask for details on the last response", ("details",), "false"),
    _P("decoder_input_details", "bool", "the prompt's tokens with their log probabilities in details; not in streams",
       ("prompt_logprobs",), "false"),
    _P("priority", "int", "higher runs first", (), "0", low=-_INT_32, high=_INT_32),
    _P("queue_timeout_s", "float", "longest wait for the first step in seconds; after it the request is refused",
       ("queue_timeout",), "the server's queue_timeout_s", low=0, open_low=True),
    _P("guideline", "text", "text for chat templates that have a place for it", (), "none"),
)  # fmt: skip

# What the answer's form must be: `serving.constraint` checks these together.
CONSTRAINT_PARAMETERS = (
    _P("response_format", "object", 'JSON object of type "text", "json_object" or "json_schema"', (), "text"),
    _P("schema", "any", "JSON schema of the answer", ("guided_json", "json_schema"), "none"),
    _P("guided_regex", "text", "regular expression of the answer", (), "none"),
    _P("guided_choice", "texts", "texts of which the answer is one", (), "none"),
    _P("guided_grammar", "text", "grammar of the answer", (), "none"),
    _P("tool_choice", "any", '"auto" and "none" leave the choice to the model', (), "auto"),
)  # fmt: skip

# Known to LoRAX, vLLM or TensorRT-LLM. Asking for one is an error that names it; it is never silently ignored.
_UNSUPPORTED_PARAMETERS = (
    _P("min_p", "float", "min_p sampling is", (), neutral=(None, 0), remedy="use top_p"),
    _P("embedding_bias_words", "any", "biasing words is", ("embedding_bias_weights",), neutral=(None, "", []),
       remedy="use logit_bias"),
    _P("bad_words", "texts", "forbidding words is", neutral=(None, "", [])),
    _P("length_penalty", "float", "beam search is", neutral=(None, 1)),
    _P("beam_width", "int", "beam search is", neutral=(None, 1), remedy="use best_of"),
    _P("use_beam_search", "bool", "beam search is", neutral=(None, False)),
    _P("structured_outputs", "any", "this form of constrained output is",
       ("guided_decoding_guide", "guided_decoding_guide_type"), neutral=(None, ""), remedy="use response_format"),
    _P("skip_special_tokens", "bool", "special tokens in the text are", neutral=(None, True),
       remedy="ask for return_tokens, whose texts show them"),
    _P("embedding_request", "any", "embedding is", neutral=(None, "")),
    _P("image", "any", "image input is", neutral=(None, "", [])),
)  # fmt: skip

PARAMETERS: tuple[Parameter, ...] = (
    *PROMPT_PARAMETERS, *_LENGTH_PARAMETERS, *_SAMPLING_PARAMETERS, *_ADAPTER_PARAMETERS, *_ANSWER_PARAMETERS,
    *CONSTRAINT_PARAMETERS, *_UNSUPPORTED_PARAMETERS,
)  # fmt: skip

BY_NAME: dict[str, Parameter] = {
    name: parameter for parameter in PARAMETERS for name in (parameter.name, *parameter.aliases)
}
