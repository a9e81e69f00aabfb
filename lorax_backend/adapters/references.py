"""What a reference to an adapter stands for: its one spelling, and the generation of its weights.

Standard library only.
`hf://owner/name@revision`, `s3://bucket/prefix`, `pbase://name/version` and `file:///folder` in an adapter's id name
the source themselves, whatever `adapter_source` says.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from urllib.parse import unquote

from lorax_backend.adapters.sources.base import AdapterSource
from lorax_backend.errors import ValidationError
from lorax_backend.types import AdapterRef

_SCHEMES = {"hf": "hub", "s3": "s3", "file": "local", "pbase": "pbase"}
_CACHED = 8192


def normalize_uri(ref: AdapterRef) -> AdapterRef:
    """The reference with the source that a URI in its id names; without a URI, unchanged but for the source's case.

    Raises:
        ValidationError: a scheme that no source has.
    """
    scheme, separator, rest = ref.id.partition("://")
    if not separator:
        return replace(ref, source=ref.source.lower())
    source = _SCHEMES.get(scheme.lower())
    if source is None:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ValidationError(f"adapter_id: {ref.id!r} begins with {scheme}://; this server knows {known}")
    if source == "local":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise ValidationError(f"adapter_id: {ref.id!r} names a host; write file:///absolute/folder")
        rest = "/" + unquote(path)
    return replace(ref, source=source, id=f"s3://{rest}" if source == "s3" else rest)


class References:
    """Canonical references, and which generation of an adapter new requests get."""

    def __init__(self, sources: Mapping[str, AdapterSource]) -> None:
        self._sources = sources
        self._current: dict[AdapterRef, int] = {}
        self._numbers = itertools.count(1)
        self._canonical = functools.lru_cache(_CACHED)(self._find_canonical)

    def __len__(self) -> int:
        """Adapters that were reloaded or unloaded while requests for the old weights lived, or live."""
        return len(self._current)

    def base(self, ref: AdapterRef) -> AdapterRef:
        """The one spelling, of no generation in particular.

        Raises:
            ValidationError: no such source, or an id it cannot have.
        """
        return self._canonical(replace(ref, generation=0) if ref.generation else ref)

    def resolve(self, ref: AdapterRef) -> AdapterRef:
        """The spelling and the generation under which a request that comes now is kept; raises as `base`.

        One that names a generation has been through here and is not moved to another.
        """
        base = self.base(ref)
        generation = ref.generation or self._current.get(base, 0)
        return replace(base, generation=generation) if generation else base

    def exact(self, ref: AdapterRef) -> AdapterRef:
        """The spelling of a reference that `resolve` gave; raises as `base`."""
        base = self.base(ref)
        return replace(base, generation=ref.generation) if ref.generation else base

    def next_generation(self, ref: AdapterRef) -> AdapterRef:
        """A generation that no record has had."""
        return replace(ref, generation=next(self._numbers))

    def make_current(self, ref: AdapterRef) -> None:
        """New requests get this generation from now on."""
        self._current[replace(ref, generation=0)] = ref.generation

    def forget(self, ref: AdapterRef, others: Iterable[AdapterRef]) -> None:
        """A record is gone; `others` are those that remain. Without any of its adapter, generations start anew."""
        base = replace(ref, generation=0)
        if base in self._current and not any(replace(other, generation=0) == base for other in others):
            del self._current[base]

    def _find_canonical(self, ref: AdapterRef) -> AdapterRef:
        named = normalize_uri(ref)
        source = self._sources.get(named.source)
        if source is None:
            known = ", ".join(sorted(self._sources))
            raise ValidationError(
                f"adapter_source: {named.source!r} is not known to this server, only {known}"
            )
        return source.canonical(named)
