"""Chat templates that adapters bring along: an adapter's own wins over the base model's."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lorax_backend.errors import TemplateError, ValidationError
from lorax_backend.serving.chat import ChatTemplate
from lorax_backend.types import AdapterRef

_CAPACITY = 1024


class FetchedFiles(Protocol):
    """What a source hands over."""

    @property
    def folder(self) -> Path: ...


class FileSource(Protocol):
    """Of `adapters.sources.base.AdapterSource`, what is needed here."""

    def fetch(self, ref: AdapterRef, token: str | None) -> FetchedFiles: ...


class AdapterTemplates:
    """Looks for a template in an adapter's folder, once an adapter. Thread-safe.

    The files come from the same sources, and so the same disk cache, as the engine's: what is fetched here is not
    downloaded again there. An answer found for one caller is used for another; whether that one may use the adapter
    is for the engine to say.

    Args:
        sources: makes the sources, by name; called on first use.
        special_tokens: the base model's, for adapters that name none.
    """

    def __init__(
        self, sources: Callable[[], Mapping[str, FileSource]], special_tokens: dict[str, str]
    ) -> None:
        self._make_sources = sources
        self._sources: Mapping[str, FileSource] | None = None
        self._special_tokens = special_tokens
        self._lock = threading.Lock()
        self._known: OrderedDict[AdapterRef, ChatTemplate | None] = OrderedDict()

    def known(self, ref: AdapterRef) -> bool:
        """True if `get` answers without fetching anything."""
        with self._lock:
            return ref in self._known

    def get(self, ref: AdapterRef, token: str | None) -> ChatTemplate | None:
        """The adapter's own template; None if it has none. May fetch the adapter, and block for that.

        Raises:
            AdapterError: the adapter cannot be had.
            TemplateError: the adapter's template is not valid.
            ValidationError: the id cannot be meant for this source.
        """
        with self._lock:
            if ref in self._known:
                self._known.move_to_end(ref)
                return self._known[ref]
            if self._sources is None:
                self._sources = self._make_sources()
        source = self._sources.get(ref.source)
        if source is None:
            known = ", ".join(self._sources)
            raise ValidationError(f"adapter_source: {ref.source!r} is not known to this server, only {known}")
        fetched = source.fetch(
            ref, token
        )  # referred to until its files have been read, or they might be removed
        template = _read(fetched.folder, self._special_tokens)
        with self._lock:
            self._known[ref] = template
            while len(self._known) > _CAPACITY:
                self._known.popitem(last=False)
        return template

    def forget(self) -> None:
        """Look again: adapters may have changed."""
        with self._lock:
            self._known.clear()


def _read(folder: Path, special_tokens: dict[str, str]) -> ChatTemplate | None:
    try:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise TemplateError(f"adapter_id: its tokenizer_config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        return None
    return ChatTemplate.from_folder(folder, config, special_tokens | _own_tokens(config))


def _own_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, as texts or objects with content."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens
