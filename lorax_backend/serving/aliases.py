"""Names for adapters that an operator can point elsewhere: switching, A/B tests and canaries by weight."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lorax_backend.errors import LoraxError, ValidationError
from lorax_backend.serving.alias_store import AliasStore, KeptAlias
from lorax_backend.serving.schema import load_json, shorten
from lorax_backend.types import BASE_MODEL_ID, AdapterRef, GenerateRequest

_log = logging.getLogger(__name__)

MakeRef = Callable[[str, str, str | None], AdapterRef | None]
_TARGET_KEYS = ("adapter_id", "adapter_source", "revision", "weight")


@dataclass(frozen=True, slots=True)
class Target:
    """Where an alias may lead; `adapter` is None for the base model, `weight` above 0."""

    adapter: AdapterRef | None
    weight: float

    def describe(self) -> dict[str, Any]:
        ref = self.adapter
        if ref is None:
            return {"adapter_id": BASE_MODEL_ID, "weight": self.weight}
        return {
            "adapter_id": ref.id,
            "adapter_source": ref.source,
            "revision": ref.revision,
            "weight": self.weight,
        }


class AliasTable:
    """Aliases and their targets. Thread-safe: readers see one whole table or the next.

    An alias wins over an adapter of the same id. A target is not looked up again, so aliases cannot form a circle.

    Args:
        make_ref: (id, source, revision) -> the adapter, or None for the base model; raises ValidationError.
        store: where aliases that are set or deleted by command are kept over restarts; None: nowhere.
    """

    def __init__(self, make_ref: MakeRef, store: AliasStore | None = None) -> None:
        self._make_ref = make_ref
        self._store = store
        self._lock = threading.Lock()
        self._table: dict[str, tuple[Target, ...]] = {}
        self._configured: dict[str, list[dict[str, Any]]] = {}

    def load(self, text: str) -> None:
        """Take in the option `adapter_aliases`, a JSON object, alias -> adapter id, target, or list of targets, and
        what commands have changed since the option was last another one.

        Raises:
            ValidationError: naming the alias of the option that is at fault.
        """
        entries = load_json(text, "adapter_aliases") if text.strip() else {}
        if not isinstance(entries, dict):
            raise ValidationError("adapter_aliases: expected a JSON object of aliases")
        for name, value in entries.items():
            targets = value if isinstance(value, list) else [value]
            fields = [{"adapter_id": item} if isinstance(item, str) else item for item in targets]
            self._table[name] = self._made(name, fields)
            self._configured[name] = _described(self._table[name])
        if self._store is not None:
            for name, kept in self._store.load().items():
                self._restore(self._store, name, kept)

    def set(self, name: Any, targets: Any) -> dict[str, Any]:
        """Create an alias or point it elsewhere, from now on for every new request, and after a restart.

        Raises:
            ValidationError: naming the field at fault; nothing was changed.
            LoraxError: it could not be stored; nothing was changed.
        """
        made = self._made(name, targets)
        with self._lock:
            self._keep(name, _described(made))
            self._table = {**self._table, name: made}
        return {"alias": name, "targets": _described(made)}

    def delete(self, name: Any) -> bool:
        """Forget an alias, one of the configuration too; False if there is none of that name. Raises as `set`."""
        with self._lock:
            if not isinstance(name, str) or name not in self._table:
                return False
            self._keep(name, None)
            self._table = {key: targets for key, targets in self._table.items() if key != name}
        return True

    def describe(self) -> dict[str, Any]:
        """Every alias with its targets."""
        return {name: _described(targets) for name, targets in self._table.items()}

    def adapters(self, name: str) -> list[AdapterRef] | None:
        """The adapters an alias may lead to; None if there is no such alias."""
        targets = self._table.get(name)
        return None if targets is None else [t.adapter for t in targets if t.adapter is not None]

    def resolve(self, request: GenerateRequest) -> AdapterRef | None:
        """The adapter a request means. Among several targets the request's seed, else its id, decides, so that a
        request sent again meets the same one; without either it is drawn."""
        ref = request.adapter
        targets = self._table.get(ref.id) if ref is not None and ref.revision is None else None
        if ref is None or targets is None:
            return ref
        if len(targets) == 1:
            return targets[0].adapter
        key = str(request.sampling.seed) if request.seed_given else request.request_id
        share = _share(f"{ref.id}\0{key}" if key else secrets.token_hex(8)) * sum(t.weight for t in targets)
        for target in targets:
            share -= target.weight
            if share < 0:
                return target.adapter
        return targets[-1].adapter

    def _made(self, name: Any, targets: Any) -> tuple[Target, ...]:
        if not isinstance(name, str) or not name.strip() or name == BASE_MODEL_ID or len(name) > 256:
            raise ValidationError(f"alias: expected a name of at most 256 characters, got {shorten(name)}")
        if not isinstance(targets, list) or not targets:
            raise ValidationError("targets: expected a list of at least one adapter_id with its weight")
        return tuple(self._target(fields, f"targets[{index}]") for index, fields in enumerate(targets))

    def _keep(self, name: str, targets: list[dict[str, Any]] | None) -> None:
        if self._store is not None:
            configured = self._configured.get(name)
            # What agrees with the configuration needs no file.
            self._store.change({name: None if targets == configured else KeptAlias(targets, configured)})

    def _restore(self, store: AliasStore, name: str, kept: KeptAlias) -> None:
        """Take in what a command did before the restart, unless the configuration has been changed since."""
        if kept.configured != self._configured.get(name):
            _log.warning("alias %r is what the option adapter_aliases says now, not what a command set", name)
            with contextlib.suppress(LoraxError):  # or it would be back with the option's old value
                store.change({name: None})
        elif kept.targets is None:
            self._table.pop(name, None)
        else:
            try:
                self._table[name] = self._made(name, kept.targets)
            except ValidationError as error:
                _log.warning("alias %r, set by command, is left out: %s", name, error.message)

    def _target(self, fields: Any, label: str) -> Target:
        if not isinstance(fields, dict):
            raise ValidationError(f"{label}: expected an object with adapter_id, got {shorten(fields)}")
        for key in fields:
            if key not in _TARGET_KEYS:
                raise ValidationError(f"{label}.{shorten(key)}: unknown, expected {', '.join(_TARGET_KEYS)}")
        texts = {key: fields.get(key) or "" for key in _TARGET_KEYS[:3]}
        for key, text in texts.items():
            if not isinstance(text, str):
                raise ValidationError(f"{label}.{key}: expected a text, got {shorten(text)}")
        if not texts["adapter_id"]:
            raise ValidationError(f"{label}.adapter_id: missing; {BASE_MODEL_ID} stands for the base model")
        weight = 1.0 if fields.get("weight") is None else fields["weight"]
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < 1e9:
            raise ValidationError(f"{label}.weight: expected a number above 0, got {shorten(weight)}")
        ref = self._make_ref(texts["adapter_id"], texts["adapter_source"], texts["revision"] or None)
        return Target(ref, float(weight))


def _described(targets: Iterable[Target]) -> list[dict[str, Any]]:
    return [target.describe() for target in targets]


def _share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest()) / 2**48
