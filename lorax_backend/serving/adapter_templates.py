"""Chat templates that adapters bring along: an adapter's own wins over the base model's.

They are strangers' programs, so they run in a `TemplateSandbox`, never in this process.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lorax_backend.errors import TemplateError, ValidationError
from lorax_backend.serving.chat import template_source
from lorax_backend.serving.template_sandbox import SandboxedTemplate, TemplateSandbox
from lorax_backend.types import AdapterRef

_CAPACITY = 1024
# The largest of published models: 20 kB of template, 1 MB of tokenizer_config.json.
_LONGEST_TEMPLATE = 1 << 20
_LONGEST_CONFIG = 16 << 20


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
        sandbox: renders them; one of its own if None. `close` closes it.
    """

    def __init__(
        self,
        sources: Callable[[], Mapping[str, FileSource]],
        special_tokens: dict[str, str],
        sandbox: TemplateSandbox | None = None,
    ) -> None:
        self._make_sources = sources
        self._sources: Mapping[str, FileSource] | None = None
        self._special_tokens = special_tokens
        self._sandbox = sandbox or TemplateSandbox()
        self._lock = threading.Lock()
        self._known: OrderedDict[AdapterRef, SandboxedTemplate | None] = OrderedDict()

    def known(self, ref: AdapterRef) -> bool:
        """True if `get` answers without fetching anything."""
        with self._lock:
            return ref in self._known

    def get(self, ref: AdapterRef, token: str | None) -> SandboxedTemplate | None:
        """The adapter's own template; None if it has none. May fetch the adapter, and block for that.

        Raises:
            AdapterError: the adapter cannot be had.
            TemplateError: the adapter's template is not valid, or takes more to compile than it may.
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
        template = self._read(fetched.folder, f"adapter {ref.id}'s")
        with self._lock:
            self._known[ref] = template
            while len(self._known) > _CAPACITY:
                self._known.popitem(last=False)
        return template

    def forget(self) -> None:
        """Look again: adapters may have changed."""
        with self._lock:
            self._known.clear()

    def close(self) -> None:
        """Render nothing more."""
        self._sandbox.close()

    def _read(self, folder: Path, owner: str) -> SandboxedTemplate | None:
        path = folder / "tokenizer_config.json"
        try:
            config: Any = {}
            if path.is_file():
                _refuse_larger(path, owner, _LONGEST_CONFIG)
                config = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                return None
            if (template := folder / "chat_template.jinja").is_file():
                _refuse_larger(template, owner, _LONGEST_TEMPLATE)
            source = template_source(folder, config)
        except (OSError, ValueError, RecursionError) as error:
            raise TemplateError(f"adapter_id: {owner} chat template cannot be read: {error}") from None
        if source is None:
            return None
        if len(source) > _LONGEST_TEMPLATE:
            raise TemplateError(
                f"adapter_id: {owner} chat template has {len(source)} characters, at most {_LONGEST_TEMPLATE} "
                "are allowed"
            )
        return self._sandbox.open(source, self._special_tokens | _own_tokens(config), owner)


def _own_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, as texts or objects with content."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _refuse_larger(path: Path, owner: str, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise TemplateError(f"adapter_id: {owner} {path.name} has {size} bytes, at most {limit} are allowed")
