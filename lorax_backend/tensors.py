"""The one table of input and output tensors of the three Triton models. Standard library only.

`config.pbtxt` of every model is generated from it (`server.repository`), requests are decoded by it
(`triton_io`) and the client is tested against it. Every input is optional: which combinations make sense is
decided after decoding, with an error that names the field.
"""

from __future__ import annotations

from dataclasses import dataclass

SCALAR = (1,)
LIST = (-1,)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor. `datatype` is the name on the wire (BYTES, BOOL, INT32...); `dims` is (1,) or, for lists,
    (-1,)."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    doc: str

    @property
    def is_list(self) -> bool:
        return self.dims == LIST


def _text(name: str, doc: str) -> TensorSpec:
    return TensorSpec(name, "BYTES", SCALAR, doc)


def _flag(name: str, doc: str) -> TensorSpec:
    return TensorSpec(name, "BOOL", SCALAR, doc)


def _int(name: str, doc: str) -> TensorSpec:
    return TensorSpec(name, "INT32", SCALAR, doc)


def _float(name: str, doc: str) -> TensorSpec:
    return TensorSpec(name, "FP32", SCALAR, doc)


PROMPT_INPUTS: tuple[TensorSpec, ...] = (
    _text("text_input", "prompt"),
    _text(
        "messages",
        "chat, a JSON list of {role, content}; rendered with the adapter's own or the model's chat template",
    ),
    TensorSpec("input_ids", "INT32", LIST, "prompt as token ids, used as they are"),
)

_SAMPLING_INPUTS: tuple[TensorSpec, ...] = (
    _text(
        "sampling_parameters",
        "JSON object of any parameters, by LoRAX's or vLLM's names; see docs/parameters.md",
    ),
    _int("max_tokens", "most tokens to generate; absent: up to the server's max_total_tokens"),
    _int("min_tokens", "tokens to generate before an end token counts"),
    _float("temperature", "0: greedy"),
    _int("top_k", "sample among the k likeliest tokens"),
    _float("top_p", "sample among the likeliest tokens of this total probability"),
    TensorSpec("seed", "UINT64", SCALAR, "seed of the random stream; absent: drawn and reported in details"),
    TensorSpec("stop_words", "BYTES", LIST, "texts that end the answer"),
    TensorSpec("stop", "BYTES", LIST, "same as stop_words"),
    _float("repetition_penalty", "above 1 discourages tokens of the prompt and the answer"),
    _float("frequency_penalty", "subtracted once per occurrence in the answer"),
    _float("presence_penalty", "subtracted from tokens present in the answer"),
    _text("response_format", "JSON: text, json_object or json_schema"),
    _text("schema", "JSON schema the answer must follow"),
)

_ADAPTER_INPUTS: tuple[TensorSpec, ...] = (
    _text("adapter_id", "LoRA adapter: hub id, id@revision or folder; empty or absent: the base model"),
    _text("adapter_source", "where adapter_id is looked up: hub, local, s3 or pbase"),
    _text("api_token", "token of the hub for a private adapter"),
    _text("lora_name", "same as adapter_id"),
    _text("merged_adapters", "JSON: adapters to merge for this request"),
)

_ANSWER_INPUTS: tuple[TensorSpec, ...] = (
    _flag("stream", "true: a response whenever tokens are ready; false: exactly one response"),
    _flag(
        "exclude_input_in_output",
        "false: text_output starts with the prompt (not when streaming); absent: true",
    ),
    _flag("return_finish_reason", "ask for finish_reason"),
    _flag("return_logprobs", "ask for logprobs"),
    _flag("return_cumulative_logprob", "ask for cumulative_logprob"),
    _flag("return_num_input_tokens", "ask for num_input_tokens"),
    _flag("return_num_output_tokens", "ask for num_output_tokens"),
    _flag("return_token_ids", "ask for token_ids"),
    _flag("return_tokens", "ask for tokens"),
    _flag("return_details", "ask for details on the last response"),
    _int("priority", "higher runs first"),
    _text("embedding_request", "JSON of an embedding request"),
)

CONTROL_INPUT = _text(
    "control",
    'JSON command instead of a generation: {"command": "cancel", "request_id": "..."}, '
    '"info", "stats", "adapters", "tokenize", "aliases", or, with "admin_key", alias_set, adapter_preload...; '
    "the answer is in details",
)

GENERATION_INPUTS: tuple[TensorSpec, ...] = (
    PROMPT_INPUTS + _SAMPLING_INPUTS + _ADAPTER_INPUTS + _ANSWER_INPUTS
)
INPUTS: tuple[TensorSpec, ...] = (*GENERATION_INPUTS, CONTROL_INPUT)

OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_output", "BYTES", LIST, "text since the last response"),
    TensorSpec("token_ids", "INT32", LIST, "ids generated since the last response"),
    TensorSpec(
        "tokens", "BYTES", LIST, "one JSON object a token: id, text, logprob, special, alternative_tokens"
    ),
    TensorSpec("finish_reason", "BYTES", LIST, "last response only: length, eos_token or stop_sequence"),
    TensorSpec("logprobs", "BYTES", LIST, "JSON list, one {id: {logprob, rank, decoded_token}} a new token"),
    TensorSpec("cumulative_logprob", "FP32", LIST, "sum of the log probabilities so far"),
    TensorSpec("num_input_tokens", "UINT32", SCALAR, "tokens of the prompt"),
    TensorSpec("num_output_tokens", "UINT32", LIST, "tokens generated since the last response"),
    TensorSpec(
        "details",
        "BYTES",
        SCALAR,
        "last response (of each sequence): JSON of counts, seed, timings, prefill, best_of_sequences; "
        "the answer to control",
    ),
    TensorSpec(
        "sequence_index", "INT32", SCALAR, "n > 1 only: which of the sequences this response belongs to"
    ),
    TensorSpec("embedding", "FP32", LIST, "embedding vector"),
)

# Which output each flag asks for.
OUTPUT_FLAGS: dict[str, str] = {
    "finish_reason": "return_finish_reason",
    "logprobs": "return_logprobs",
    "cumulative_logprob": "return_cumulative_logprob",
    "num_input_tokens": "return_num_input_tokens",
    "num_output_tokens": "return_num_output_tokens",
    "token_ids": "return_token_ids",
    "tokens": "return_tokens",
    "details": "return_details",
}

# The tokenizer needs what decides the prompt's ids, and no more: the adapter for its chat template, the seed for
# aliases that choose among adapters by it. Request parameters reach every model by themselves.
TOKENIZER_INPUTS: tuple[TensorSpec, ...] = (
    *PROMPT_INPUTS,
    *(spec for spec in _SAMPLING_INPUTS if spec.name in ("sampling_parameters", "seed")),
    *(spec for spec in _ADAPTER_INPUTS if spec.name != "merged_adapters"),
)
TOKENIZER_OUTPUTS: tuple[TensorSpec, ...] = (PROMPT_INPUTS[2],)

BY_INPUT_NAME: dict[str, TensorSpec] = {spec.name: spec for spec in INPUTS}
