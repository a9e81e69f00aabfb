"""Sources of adapters by name. A new one is a class like those beside this file and an entry here."""

from __future__ import annotations

from lorax_backend.adapters.sources.base import AdapterSource
from lorax_backend.adapters.sources.hub import HubSource
from lorax_backend.adapters.sources.local import LocalSource
from lorax_backend.config import ServerConfig


def create_sources(config: ServerConfig) -> dict[str, AdapterSource]:
    """The sources of a server, by their names in lower case."""
    hub = HubSource(
        cache_dir=config.hub_cache or None,
        # Files may be float32 where the server's pages are 16 bits wide.
        max_bytes=2 * config.adapter_host_bytes,
        deadline_s=config.adapter_load_timeout_s,
    )
    sources: list[AdapterSource] = [hub, LocalSource()]
    return {source.name: source for source in sources}
