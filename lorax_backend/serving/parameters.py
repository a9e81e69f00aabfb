"""From what a caller sent to a `GenerateRequest`: names, precedence, types, ranges and combinations.

Precedence: input tensor, then the `sampling_parameters` JSON, then request parameter, then default. Everything that
can be checked without a tokenizer is checked here, and all problems of a request are reported together.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from lorax_backend.config import ServerConfig
from lorax_backend.errors import UnsupportedError, ValidationError
from lorax_backend.serving.chat import validate_messages
from lorax_backend.serving.schema import BY_NAME, PROMPT_PARAMETERS, Parameter, load_json, shorten
from lorax_backend.types import BASE_MODEL_ID, AdapterRef, GenerateRequest, OutputOptions, SamplingParams

SAMPLING_JSON = "sampling_parameters"
ADAPTER_SOURCES = ("hub", "local")
# Keys that clients and gateways send along and that ask for nothing.
_HARMLESS = frozenset(
    {"model", "user", "id", "request_id", "metadata", "service_tier", "store", "headers", "authorization"}
    | {"traceparent", "tracestate", "timeout", "sequence_id", "sequence_start", "sequence_end"}
    | {
        "binary_data_output",
        "host",
        "accept",
        "connection",
        "cookie",
        "te",
        "origin",
        "referer",
        "via",
        "forwarded",
    }
)
_PROMPT_NAMES = frozenset(parameter.name for parameter in PROMPT_PARAMETERS)
# Below this a division of the logits overflows; the distribution is a single token long before.
_GREEDY_TEMPERATURE = 1e-5


@dataclass(slots=True)
class RawRequest:
    """A request as it arrived.

    `fields` holds the input tensors given, by name, as plain values: str, bool, int, float or lists of them.
    `parameters` holds Triton's request parameters. None values count as not given.
    """

    request_id: str
    fields: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Given:
    """Values by canonical name, and the problems met on the way."""

    values: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    problems: list[ValidationError] = field(default_factory=list)

    def report(self, message: str) -> None:
        self.problems.append(ValidationError(message))

    def label(self, name: str) -> str:
        """The field's name as the caller wrote it."""
        return self.labels.get(name, name)

    def raise_problems(self) -> None:
        if not self.problems:
            return
        kind = (
            UnsupportedError
            if all(isinstance(p, UnsupportedError) for p in self.problems)
            else ValidationError
        )
        raise kind("; ".join(problem.message for problem in self.problems))


def parse_request(raw: RawRequest, config: ServerConfig) -> GenerateRequest:
    """Check a request and build what the service runs.

    Raises:
        ValidationError: naming every field that is unknown, of the wrong type, out of range or in conflict.
        UnsupportedError: every problem is a feature this server does not have.
    """
    given = _collect(raw)
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
    adapter = _read_adapter(given, config)
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
    )


def parse_prompt(raw: RawRequest, config: ServerConfig) -> GenerateRequest:
    """Read only what decides the prompt's token ids; for the tokenizer model, whose requests may lack the rest."""
    given = _collect(raw)
    prompt = _read_prompt(given, config)
    given.raise_problems()
    values = given.values
    return GenerateRequest(
        request_id=raw.request_id,
        sampling=SamplingParams(max_new_tokens=0),
        **prompt,
        truncate=values.get("truncate"),
        add_special_tokens=values.get("add_special_tokens", True),
        tools=values.get("tools"),
    )


def _collect(raw: RawRequest) -> _Given:
    """Merge the three sources by precedence and convert every value."""
    given = _Given()
    _take(given, {k: v for k, v in raw.fields.items() if k != SAMPLING_JSON}, "")
    text = raw.fields.get(SAMPLING_JSON, raw.parameters.get(SAMPLING_JSON))
    if text is not None and text != "":
        try:
            parsed = load_json(text, SAMPLING_JSON) if isinstance(text, str) else text
        except ValidationError as error:
            given.problems.append(error)
        else:
            if isinstance(parsed, dict):
                _take(given, parsed, f" (in {SAMPLING_JSON})")
            else:
                given.report(f"{SAMPLING_JSON}: expected a JSON object, got {shorten(parsed)}")
    _take(given, {k: v for k, v in raw.parameters.items() if k != SAMPLING_JSON and not _is_foreign(k)}, "")
    return given


def _is_foreign(name: str) -> bool:
    """Request parameters that the server or a proxy added: forwarded headers and Triton's own."""
    header = "-" in name and name.replace("-", "_") not in BY_NAME
    return header or name.startswith("triton_")


def _take(given: _Given, source: dict[str, Any], where: str) -> None:
    """Add the values of one source for the names that no source before it gave."""
    taken: dict[str, tuple[str, Any]] = {}
    for name, value in source.items():
        parameter = BY_NAME.get(name)
        if parameter is None:
            if name not in _HARMLESS:
                given.report(_unknown(name, where))
            continue
        if value is None:
            continue
        if where and parameter.name in _PROMPT_NAMES:
            given.report(f"{name}{where}: not a sampling parameter; send it as an input tensor")
            continue
        if parameter.name in given.labels:  # a source before this one gave it
            continue
        if parameter.name in taken and taken[parameter.name][1] != value and parameter.neutral is None:
            given.report(
                f"{name}{where}: also given as {taken[parameter.name][0]} with another value; give one"
            )
            continue
        taken[parameter.name] = (name, value)
        _convert(given, parameter, value, f"{name}{where}")
    for name, (used, _) in taken.items():
        given.labels.setdefault(name, f"{used}{where}")


def _convert(given: _Given, parameter: Parameter, value: Any, label: str) -> None:
    try:
        if parameter.name == "response_format":
            value = _response_format(value, label)
        if parameter.name == "logprobs" and isinstance(value, bool):
            if not value:
                return
            value = 0  # the OpenAI chat API asks with true
        if parameter.name == "return_k_alternatives" and value == 0:
            return
        result = parameter.read(value, label)
    except ValidationError as error:
        given.problems.append(error)
    else:
        given.values[parameter.name] = result


def _response_format(value: Any, label: str) -> Any:
    """A response format of type "text" asks for nothing, whatever else it holds."""
    parsed = load_json(value, label) if isinstance(value, str) and value else value
    return None if isinstance(parsed, dict) and parsed.get("type") == "text" else parsed


def _unknown(name: str, where: str) -> str:
    near = difflib.get_close_matches(name.lower(), list(BY_NAME), n=1)
    return f"{shorten(name)}{where}: unknown parameter" + (f"; did you mean {near[0]}?" if near else "")


def _read_prompt(given: _Given, config: ServerConfig) -> dict[str, Any]:
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


def _read_sampling(given: _Given) -> SamplingParams:
    """The sampling parameters. Any parameter that shapes a distribution switches sampling on; temperature 0 wins."""
    values = given.values
    temperature = values.get("temperature")
    greedy = temperature is not None and temperature < _GREEDY_TEMPERATURE
    top_k = max(values.get("top_k", 0), 0)
    top_p = values.get("top_p", 1.0)
    shaped = temperature is not None or top_k > 0 or top_p < 1.0
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
    )


def _read_adapter(given: _Given, config: ServerConfig) -> AdapterRef | None:
    """The adapter asked for; None for the base model."""
    values = given.values
    source = (values.get("adapter_source") or config.default_adapter_source).lower()
    if source not in ADAPTER_SOURCES:
        given.report(
            f"{given.label('adapter_source')}: {shorten(source)} is not one of {', '.join(ADAPTER_SOURCES)}"
        )
    adapter_id = (values.get("adapter_id") or "").strip()
    if adapter_id in ("", BASE_MODEL_ID):
        return None
    if _asks_for_merge(given):
        given.report(
            f"{given.label('adapter_id')} and {given.label('merged_adapters')}: both given; a request uses one adapter "
            "or one merge"
        )
    revision: str | None = None
    if source == "hub" and "@" in adapter_id:  # a folder's name may hold an @
        adapter_id, revision = (part.strip() for part in adapter_id.rsplit("@", 1))
        if not adapter_id or not revision:
            given.report(
                f"{given.label('adapter_id')}: expected id@revision, got {shorten(values['adapter_id'])}"
            )
    return AdapterRef(source, adapter_id, revision or None)


def _asks_for_merge(given: _Given) -> bool:
    return "merged_adapters" in given.labels and "merged_adapters" not in given.values


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
        details=values.get("return_details", False),
    )


def _bearer_token(parameters: dict[str, Any]) -> str | None:
    """The token of a forwarded `Authorization: Bearer X` header."""
    header = parameters.get("authorization")
    if isinstance(header, str) and header[:7].lower() == "bearer ":
        return header[7:].strip() or None
    return None
