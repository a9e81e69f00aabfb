"""`adapter_config.json` of PEFT: what it says about ranks, scaling and modules, and what this server cannot do.

Every key is in one of three groups: read here, known not to change the maths of inference, or refused when it is set.
A key in none of them is refused too unless its value is empty, because silence would mean wrong answers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]

from lorax_backend.adapters.weight_files import CONFIG_NAME

MAX_CONFIG_BYTES = 4 << 20
# A hostile pattern holds up other threads no longer than one match, and its own adapter no longer than the budget.
_MATCH_TIMEOUT_S = 0.1
_PATTERN_BUDGET_S = 1.0
_MAX_PATTERN_LENGTH = 10_000

# fmt: off
_READ = frozenset(
    {
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
    }
)
# fan_in_fan_out says how the base layer stores its weight; A and B are [r, in] and [out, r] either way.
# VeLoRA changes the backward pass only; the *_config of an initialization matter only with init_lora_weights.
_HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_dtype", "lora_ga_config",
        "lorap_emb_lr", "lorap_lr_ratio", "megatron_core", "merge_weights", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "task_type", "velora_config",
    }
)
# fmt: on
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on LoRA B",
    "modules_to_save": "fully trained modules",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "alora_invocation_tokens": "activated LoRA",
    "alora_invocation_string": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron parallel layers",
}
# These start from B A != 0 and take it out of the base weights, so that the adapter fits only the changed base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(slots=True)
class _Matcher:
    """Regular expressions of untrusted files, with limits on the time they may take.

    `regex` is used because it has a timeout; its default syntax is `re`'s.
    """

    spent: float = 0.0  # CPU seconds of this thread

    def matches(self, field_name: str, pattern: str, text: str) -> bool:
        """True if the whole of `text` matches.

        Raises:
            ValueError: the pattern is not a regular expression, or the adapter's patterns took too long.
        """
        return self._run(field_name, pattern, text) is not None

    def layer_index(self, field_name: str, pattern: str, text: str) -> int | None:
        """The group `idx` of a match of the start of `text`, or None."""
        match = self._run(field_name, pattern + ".*", text)
        return None if match is None else int(match.group("idx"))

    def _run(self, field_name: str, pattern: str, text: str) -> Any:
        started = time.thread_time()
        try:
            if len(pattern) > _MAX_PATTERN_LENGTH or self.spent > _PATTERN_BUDGET_S:
                raise TimeoutError
            return regex.compile(pattern).fullmatch(text, timeout=_MATCH_TIMEOUT_S)
        except regex.error as error:
            raise ValueError(
                f"{field_name}: {_short(pattern)} is not a regular expression: {error}"
            ) from None
        except TimeoutError:
            raise ValueError(
                f"{field_name}: {_short(pattern)} takes too long to match; write it simpler"
            ) from None
        finally:
            self.spent += time.thread_time() - started


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields of `adapter_config.json` that choose modules, ranks and scaling; see PEFT's `LoraConfig`."""

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    _matcher: _Matcher = field(default_factory=_Matcher, repr=False, compare=False)

    def rank_for(self, module: str) -> int:
        """Rank of a module by `rank_pattern`, else `r`.

        Raises:
            ValueError: a pattern cannot be used.
        """
        key = self._pattern_key("rank_pattern", self.rank_pattern, module)
        return self.rank if key is None else self.rank_pattern[key]

    def scaling_for(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (arXiv:2312.03732).

        Raises:
            ValueError: a pattern cannot be used.
        """
        key = self._pattern_key("alpha_pattern", self.alpha_pattern, module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def selects(self, module: str) -> bool:
        """True if PEFT would put LoRA on the module of this name.

        Raises:
            ValueError: a pattern cannot be used.
        """
        if self.exclude_modules and self._named("exclude_modules", self.exclude_modules, module):
            return False
        if self.target_modules is None:
            return True
        if self.target_modules == "all-linear":
            return module.rpartition(".")[2] != "lm_head"
        if not self._named("target_modules", self.target_modules, module):
            return False
        if (
            isinstance(self.target_modules, str)
            or not self.layers_to_transform
            or module in self.target_modules
        ):
            return True
        return self._layer_of(module) in self.layers_to_transform

    def _named(self, field_name: str, names: tuple[str, ...] | str, module: str) -> bool:
        """A string is a regular expression for the whole name, a list holds whole names or their last parts."""
        if isinstance(names, str):
            return self._matcher.matches(field_name, names, module)
        return any(module == name or module.endswith("." + name) for name in names)

    def _layer_of(self, module: str) -> int | None:
        patterns = [rf"(?:.*?\.)?{pattern}\.(?P<idx>\d+)\." for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            index = self._matcher.layer_index("layers_pattern", pattern, module)
            if index is not None:
                return index
        return None

    def _pattern_key(self, field_name: str, patterns: Mapping[str, Any], module: str) -> str | None:
        """The first key that matches the module's name or its last parts."""
        for key in patterns:
            if self._matcher.matches(field_name, rf"(.*\.)?({key})$", module):
                return key
        return None


def read_peft_config(folder: Path) -> tuple[PeftConfig | None, list[str]]:
    """Read `adapter_config.json`; the configuration, if enough of it is sound to go on, and every problem found.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
    """
    path = folder / CONFIG_NAME
    if path.stat().st_size > MAX_CONFIG_BYTES:
        return None, [f"{CONFIG_NAME} is larger than {MAX_CONFIG_BYTES} bytes"]
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return None, [f"{CONFIG_NAME} is not valid JSON: {error}"]
    if not isinstance(raw, dict):
        return None, [f"{CONFIG_NAME} must hold a JSON object"]
    return parse_peft_config(raw)


def parse_peft_config(raw: Mapping[str, Any]) -> tuple[PeftConfig | None, list[str]]:
    """Check a parsed `adapter_config.json`; as `read_peft_config`."""
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        return None, [f"peft_type: {kind!r} is not supported, only 'LORA' is"]
    problems = _refused_features(raw)
    fields = _Fields(raw, problems)
    config = PeftConfig(
        rank=fields.rank("r"),
        alpha=fields.number("lora_alpha"),
        use_rslora=fields.flag("use_rslora"),
        rank_pattern=fields.pattern("rank_pattern", fields.check_rank),
        alpha_pattern=fields.pattern("alpha_pattern", fields.check_number),
        target_modules=fields.names("target_modules"),
        exclude_modules=fields.names("exclude_modules"),
        layers_to_transform=fields.layers("layers_to_transform"),
        layers_pattern=_as_tuple(fields.names("layers_pattern")),
    )
    return (None if fields.broken else config), problems


def _refused_features(raw: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key}: {feature} is not supported, the value must be unset, not {_short(raw[key])}"
        for key, feature in _REFUSED.items()
        if not _is_unset(raw.get(key))
    ]
    if raw.get("bias", "none") not in ("none", None):
        problems.append(
            f"bias: trained biases are not supported, the value must be 'none', not {_short(raw['bias'])}"
        )
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        problems.append(
            f"init_lora_weights: {init!r} changed the base weights when training began; convert the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    elif isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        problems.append(f"init_lora_weights: {init!r} is not known, so it may have changed the base weights")
    known = _READ | _HARMLESS | _REFUSED.keys() | {"bias"}
    problems += [
        f"{key}: not known to this server, which cannot tell whether {_short(value)} changes the result"
        for key, value in raw.items()
        if key not in known and not _is_unset(value)
    ]
    return problems


def _is_unset(value: Any) -> bool:
    return value is None or value in (False, 0, "", [], {})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _as_tuple(names: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


@dataclass(slots=True)
class _Fields:
    """Typed access to the fields; a value of the wrong type becomes a problem, and `broken` is set."""

    raw: Mapping[str, Any]
    problems: list[str]
    broken: bool = False

    def rank(self, key: str) -> int:
        return self.check_rank(key, self.raw.get(key))

    def number(self, key: str) -> float:
        return self.check_number(key, self.raw.get(key))

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            self._wrong(key, value, "true or false")
        return bool(value)

    def check_rank(self, key: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self._wrong(key, value, "a positive whole number")
        return 1

    def check_number(self, key: str, value: Any) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        self._wrong(key, value, "a number")
        return 1.0

    def names(self, key: str) -> tuple[str, ...] | str | None:
        value = self.raw.get(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return tuple(value)
        self._wrong(key, value, "a string or a list of strings")
        return None

    def layers(self, key: str) -> tuple[int, ...] | None:
        value = self.raw.get(key)
        values = value if isinstance(value, list) else [value]
        if value is None:
            return None
        if all(isinstance(layer, int) and not isinstance(layer, bool) for layer in values):
            return tuple(values)
        self._wrong(key, value, "a whole number or a list of them")
        return None

    def pattern(self, key: str, check: Any) -> dict[str, Any]:
        value = self.raw.get(key) or {}
        if isinstance(value, dict):
            return {name: check(f"{key}[{name!r}]", number) for name, number in value.items()}
        self._wrong(key, value, "an object")
        return {}

    def _wrong(self, key: str, value: Any, expected: str) -> None:
        found = "is missing" if value is None else f"is {_short(value)}"
        self.problems.append(f"{key}: {found}, must be {expected}")
        self.broken = True
