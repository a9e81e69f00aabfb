"""Which adapter a request names: id, source, revision, the server's default, and merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorax_backend.adapters.references import normalize_uri
from lorax_backend.config import ServerConfig
from lorax_backend.errors import UnsupportedError, ValidationError
from lorax_backend.serving.given import Given, at
from lorax_backend.serving.schema import shorten
from lorax_backend.types import BASE_MODEL_ID, AdapterRef

ADAPTER_SOURCES = ("hub", "local", "s3", "pbase")
MERGE_STRATEGIES = ("linear", "ties", "dare_linear", "dare_ties")
SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True, slots=True)
class MergedAdapters:
    """A merge asked for by one request; `weights` has one number an id."""

    ids: tuple[str, ...]
    weights: tuple[float, ...]
    strategy: str
    density: float
    sign_method: str


def read_adapter(given: Given, config: ServerConfig) -> AdapterRef | None:
    """The adapter asked for, or the server's default; None for the base model. Problems go to `given`."""
    values = given.values
    adapter_id = (values.get("adapter_id") or "").strip()
    merged = _merge(given)
    if merged is not None:
        if adapter_id not in ("", BASE_MODEL_ID):
            given.report(
                f"{given.label('adapter_id')} and {given.label('merged_adapters')}: both given; a request uses one "
                "adapter or one merge"
            )
        elif not given.problems:
            given.problems.append(
                UnsupportedError(
                    f"{given.label('merged_adapters')}: merging adapters is not supported by this server; merge them "
                    "offline and name the result as adapter_id"
                )
            )
        return None
    source = (values.get("adapter_source") or "").strip()
    try:
        if adapter_id == "":
            _source_name(source, config)
            return default_adapter(config)
        return adapter_ref(adapter_id, source, values.get("adapter_revision"), config)
    except ValidationError as error:
        given.problems.append(error)
        return None


def default_adapter(config: ServerConfig) -> AdapterRef | None:
    """The adapter of requests that name none.

    Raises:
        ValidationError: the option cannot be read.
    """
    if config.adapter_id in ("", BASE_MODEL_ID):
        return None
    return adapter_ref(config.adapter_id, config.adapter_source, None, config)


def adapter_ref(
    adapter_id: str, source: str, revision: str | None, config: ServerConfig
) -> AdapterRef | None:
    """Read an id, which may be `id@revision` (hub) or a URI (hf://, s3://, pbase://, file://), whose source wins.
    None for the base model.

    `source` is empty for the server's default.

    Raises:
        ValidationError: naming the field at fault.
    """
    name = _source_name(source, config)
    if adapter_id in ("", BASE_MODEL_ID):
        return None
    ref = normalize_uri(AdapterRef(name, adapter_id))
    name, adapter_id = ref.source, ref.id
    if name == "hub" and "@" in adapter_id:  # a folder's name may hold an @
        plain, given_revision = (part.strip() for part in adapter_id.rsplit("@", 1))
        if not plain or not given_revision:
            raise ValidationError(f"adapter_id: expected id@revision, got {shorten(adapter_id)}")
        if revision not in (None, "", given_revision):
            raise ValidationError(
                f"adapter_id and adapter_revision: {shorten(given_revision)} and {shorten(revision)} name two revisions"
            )
        adapter_id, revision = plain, given_revision
    return AdapterRef(name, adapter_id, (revision or "").strip() or None)


def _source_name(source: str, config: ServerConfig) -> str:
    name = source.lower() or config.default_adapter_source
    if name not in ADAPTER_SOURCES:
        raise ValidationError(
            f"adapter_source: {shorten(source)} is not one of {', '.join(ADAPTER_SOURCES)}; leave it out for "
            f"{config.default_adapter_source}"
        )
    return name


def _merge(given: Given) -> MergedAdapters | None:
    fields = given.values.get("merged_adapters")
    if not fields:
        return None
    label = given.label("merged_adapters")
    try:
        return parse_merge(fields, label)
    except ValidationError as error:
        given.problems.append(error)
        return None


def parse_merge(fields: dict[str, Any], label: str = "merged_adapters") -> MergedAdapters:
    """Check a merge by LoRAX's rules; weights are ones where none are given.

    Raises:
        ValidationError: naming the key at fault.
    """
    known = ("ids", "weights", "merge_strategy", "density", "majority_sign_method")
    for key in fields:
        if key not in known:
            raise ValidationError(
                f"{at(label, f'.{shorten(key)}')}: unknown, expected one of {', '.join(known)}"
            )
    ids = fields.get("ids")
    if not isinstance(ids, list) or not ids or not all(isinstance(item, str) and item for item in ids):
        raise ValidationError(f"{at(label, '.ids')}: expected a list of at least one adapter id")
    weights = fields.get("weights") or [1.0] * len(ids)
    if not isinstance(weights, list) or not all(_is_number(item) for item in weights):
        raise ValidationError(f"{at(label, '.weights')}: expected a list of numbers")
    if len(weights) != len(ids):
        raise ValidationError(
            f"{at(label, '.weights')}: {len(weights)} weights for {len(ids)} ids; give one an id"
        )
    strategy = fields.get("merge_strategy") or "linear"
    if strategy not in MERGE_STRATEGIES:
        raise ValidationError(
            f"{at(label, '.merge_strategy')}: {shorten(strategy)} is not one of {', '.join(MERGE_STRATEGIES)}"
        )
    method = fields.get("majority_sign_method") or "total"
    if method not in SIGN_METHODS:
        raise ValidationError(
            f"{at(label, '.majority_sign_method')}: {shorten(method)} is not one of {', '.join(SIGN_METHODS)}"
        )
    density = 0.0 if fields.get("density") is None else fields["density"]
    if not _is_number(density) or not 0 <= density <= 1:
        raise ValidationError(
            f"{at(label, '.density')}: expected a number from 0 to 1, got {shorten(density)}"
        )
    if strategy != "linear" and density == 0:
        raise ValidationError(
            f"{at(label, '.density')}: {strategy} needs a density above 0, the share of weights to keep"
        )
    return MergedAdapters(tuple(ids), tuple(map(float, weights)), strategy, float(density), method)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
