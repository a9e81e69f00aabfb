"""What goes into a request, in LoRAX's words. Plain dataclasses; the checks raise `ValidationError`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from numbers import Integral, Real
from typing import Any

from lorax_triton.errors import ValidationError

ADAPTER_SOURCES = ("hub", "local", "s3", "pbase")
MERGE_STRATEGIES = ("linear", "ties", "dare_linear", "dare_ties")
MAJORITY_SIGN_METHODS = ("total", "frequency")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValidationError(message)


@dataclass
class MergedAdapters:
    """Several adapters merged into one for a request.

    Two spellings: `MergedAdapters(ids, weights, merge_strategy=..., density=...)`, or
    `MergedAdapters(adapters=[{"adapter_id": "a", "alpha": 0.5}, ...], strategy="ties", density=0.5)`.

    Attributes:
        ids: adapter ids, at least one.
        weights: one a adapter; 1.0 each if not given.
        merge_strategy: linear (the server's default), ties, dare_linear or dare_ties.
        density: share of each adapter's weights to keep, 0 to 1; needed by every strategy but linear.
        majority_sign_method: total (the server's default) or frequency; used by ties and dare_ties.
    """

    ids: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    merge_strategy: str | None = None
    density: float | None = None
    majority_sign_method: str | None = None
    adapters: InitVar[Sequence[Mapping[str, Any]] | None] = None
    strategy: InitVar[str | None] = None

    def __post_init__(self, adapters: Sequence[Mapping[str, Any]] | None, strategy: str | None) -> None:
        if adapters is not None:
            _require(
                not self.ids and not self.weights, "give either `adapters` or `ids` and `weights`, not both"
            )
            _require(
                all("adapter_id" in adapter for adapter in adapters),
                "each of `adapters` needs an `adapter_id`",
            )
            self.ids = [str(adapter["adapter_id"]) for adapter in adapters]
            self.weights = [float(adapter.get("alpha", 1.0)) for adapter in adapters]
        if strategy is not None:
            _require(self.merge_strategy is None, "give either `strategy` or `merge_strategy`, not both")
            self.merge_strategy = strategy
        _require(bool(self.ids), "`ids` cannot be empty")
        self.weights = list(self.weights) or [1.0] * len(self.ids)
        _require(len(self.ids) == len(self.weights), "`ids` and `weights` must have the same length")
        _require(
            self.merge_strategy is None or self.merge_strategy in MERGE_STRATEGIES,
            f"`merge_strategy={self.merge_strategy}` must be one of {', '.join(MERGE_STRATEGIES)}",
        )
        _require(
            self.density is not None or self.merge_strategy in (None, "linear"),
            f"`density` is needed by `merge_strategy={self.merge_strategy}`",
        )
        _require(self.density is None or 0.0 <= self.density <= 1.0, "`density` must be >= 0.0 and <= 1.0")
        _require(
            self.majority_sign_method is None or self.majority_sign_method in MAJORITY_SIGN_METHODS,
            f"`majority_sign_method={self.majority_sign_method}` must be one of {', '.join(MAJORITY_SIGN_METHODS)}",
        )


class ResponseFormatType(str, Enum):
    """What the generated text is held to."""

    text = "text"
    json_object = "json_object"
    json_schema = "json_schema"


@dataclass
class ResponseFormat:
    """Holds the generated text to JSON of a `schema` (a JSON Schema object)."""

    type: ResponseFormatType
    schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        try:
            self.type = ResponseFormatType(self.type)
        except ValueError:
            names = ", ".join(kind.value for kind in ResponseFormatType)
            raise ValidationError(f"`response_format.type={self.type}` must be one of {names}") from None
        _require(
            self.type is not ResponseFormatType.json_schema or self.schema is not None,
            "`response_format.schema` is needed by `type=json_schema`",
        )


def _read_schema(schema: Any) -> Mapping[str, Any]:
    """The JSON Schema object behind what a caller may give as `json_schema`."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ValidationError(f"`json_schema` is not valid JSON: {error}") from None
    make = getattr(schema, "model_json_schema", None)
    if callable(make):
        schema = make()
    if not isinstance(schema, Mapping):
        raise ValidationError(
            "`json_schema` must be a JSON Schema object, its JSON text or a pydantic model class,"
            f" not {type(schema).__name__}"
        )
    return schema


@dataclass
class Parameters:
    """How to generate. None leaves a choice to the server. Field names are those of LoRAX's REST API; beyond it:

    Attributes:
        adapter_revision: branch, tag or commit of the adapter.
        min_new_tokens: tokens to generate before an end-of-sequence token counts.
        priority: requests of higher priority are scheduled first; 0 is the server's default.
        queue_timeout: longest wait in the server's queue in seconds; after it the request fails as overloaded.
        apply_chat_template: render the prompt as one message of the user's with the model's chat template.
        json_schema: another way to write `response_format`: a JSON Schema as an object or as JSON text, or a pydantic
            model class.
        extra_parameters: further keys for the server's `sampling_parameters`, sent as they are.

    Raises:
        ValidationError: a value is out of range, or two fields exclude each other.
    """

    adapter_id: str | None = None
    adapter_source: str | None = None
    adapter_revision: str | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = field(default=None, repr=False)
    do_sample: bool = False
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    ignore_eos_token: bool = False
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    return_full_text: bool = False
    stop: Sequence[str] = field(default_factory=list)
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    truncate: int | None = None
    typical_p: float | None = None
    best_of: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    return_k_alternatives: int | None = None
    response_format: ResponseFormat | Mapping[str, Any] | None = None
    priority: int | None = None
    queue_timeout: float | None = None
    apply_chat_template: bool = False
    json_schema: InitVar[Any] = None
    extra_parameters: Mapping[str, Any] | None = None

    def __post_init__(self, json_schema: Any) -> None:
        if isinstance(self.response_format, Mapping):
            self.response_format = ResponseFormat(**self.response_format)
        if json_schema is not None:
            _require(self.response_format is None, "give either `response_format` or `json_schema`, not both")
            self.response_format = ResponseFormat(
                ResponseFormatType.json_object, schema=_read_schema(json_schema)
            )
        self._check_adapter()
        for name in ("max_new_tokens", "top_k", "truncate", "return_k_alternatives", "best_of"):
            self._check_number(name, Integral, lambda value: value > 0, "strictly positive")
        self._check_number("priority", Integral, lambda value: -(2**31) < value < 2**31, "of 32 bits")
        self._check_number("queue_timeout", Real, lambda value: 0.0 < value < math.inf, "strictly positive")
        for name in ("seed", "min_new_tokens"):
            self._check_number(name, Integral, lambda value: value >= 0, "non-negative")
        self._check_number("temperature", Real, lambda value: 0.0 <= value < math.inf, "non-negative")
        self._check_number(
            "repetition_penalty", Real, lambda value: 0.0 < value < math.inf, "strictly positive"
        )
        for name in ("top_p", "typical_p"):
            self._check_number(name, Real, lambda value: 0.0 < value < 1.0, "> 0.0 and < 1.0 (None is off)")
        for name in ("frequency_penalty", "presence_penalty"):
            self._check_number(name, Real, lambda value: -2.0 <= value <= 2.0, ">= -2.0 and <= 2.0")
        self._check_best_of()
        _require(
            not isinstance(self.stop, str) and all(isinstance(text, str) and text for text in self.stop),
            "`stop` must be a list of non-empty strings",
        )

    def _check_number(self, name: str, kind: type, allowed: Callable[[Any], bool], wanted: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        # True is an Integral to Python, but hardly what the caller meant.
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        noun = "an integer" if kind is Integral else "a number"
        _require(is_number, f"`{name}` must be {noun}, not {value!r}")
        _require(allowed(value), f"`{name}` must be {wanted}, not {value!r}")

    def _check_adapter(self) -> None:
        _require(
            self.adapter_id is None or self.merged_adapters is None,
            "you must specify at most one of `adapter_id` or `merged_adapters`",
        )
        _require(
            self.adapter_source is None or self.adapter_source in ADAPTER_SOURCES,
            f"`adapter_source={self.adapter_source}` must be one of {', '.join(ADAPTER_SOURCES)}",
        )
        if self.adapter_revision is not None:
            _require(bool(self.adapter_id), "`adapter_revision` needs an `adapter_id`")
            _require(self.adapter_source != "local", "a folder has no `adapter_revision`")
            _require("@" not in (self.adapter_id or ""), "`adapter_id` already names a revision after its @")

    def _check_best_of(self) -> None:
        if self.best_of is None or self.best_of == 1:
            return
        _require(self.seed is None, "`seed` must not be set when `best_of` is > 1")
        warpers = (self.temperature, self.top_k, self.top_p, self.typical_p)
        sampling = self.do_sample or any(value is not None for value in warpers)
        _require(sampling, "you must use sampling when `best_of` is > 1")


@dataclass
class Request:
    """One request: exactly one of `inputs` (a prompt), `messages` (a chat) and `input_ids` (token ids).

    Raises:
        ValidationError: none or several of the three are given, one is empty, or `best_of` > 1 with `stream`.
    """

    inputs: str | None = None
    parameters: Parameters | None = None
    stream: bool = False
    messages: Sequence[Mapping[str, Any]] | None = None
    input_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        given = {"inputs": self.inputs, "messages": self.messages, "input_ids": self.input_ids}
        named = [name for name, value in given.items() if value is not None]
        _require(len(named) == 1, "give exactly one of a prompt (`inputs`), `messages` and `input_ids`")
        _require(len(given[named[0]] or ()) > 0, f"`{named[0]}` cannot be empty")
        _check_best_of_in_stream(self.parameters, self.stream)


@dataclass
class BatchRequest:
    """Several prompts with the same parameters.

    Raises:
        ValidationError: there is no prompt or an empty one, or `best_of` > 1 with `stream`.
    """

    inputs: list[str]
    parameters: Parameters | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        _require(bool(self.inputs) and all(self.inputs), "`inputs` cannot be empty")
        _check_best_of_in_stream(self.parameters, self.stream)


def _check_best_of_in_stream(parameters: Parameters | None, stream: bool) -> None:
    several = parameters is not None and parameters.best_of is not None and parameters.best_of > 1
    _require(not (several and stream), "`best_of` != 1 is not supported when `stream` == True")
