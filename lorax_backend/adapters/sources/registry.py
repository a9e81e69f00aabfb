"""Sources of adapters by name. A new one is a class like those beside this file and an entry here."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from lorax_backend.adapters.disk_cache import DiskCache
from lorax_backend.adapters.sources.base import AdapterSource
from lorax_backend.adapters.sources.hub import HubSource
from lorax_backend.adapters.sources.local import LocalSource
from lorax_backend.adapters.sources.pbase import PbaseSource
from lorax_backend.adapters.sources.s3 import S3Source
from lorax_backend.config import ServerConfig

_log = logging.getLogger(__name__)


def create_disk_cache(config: ServerConfig) -> DiskCache:
    """The disk cache of a server: in `adapter_disk_cache`, or in the user's cache folder, or, where that cannot be
    written, in a temporary folder, which does not survive.

    Raises:
        ValueError: the folder that the option names cannot be made.
    """
    if config.adapter_disk_cache:
        return DiskCache(Path(os.path.abspath(config.adapter_disk_cache)), config.adapter_disk_bytes)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    try:
        return DiskCache(caches.absolute() / "lorax-triton" / "adapters", config.adapter_disk_bytes)
    except ValueError as error:
        root = Path(tempfile.mkdtemp(prefix="lorax-triton-adapters-"))
        _log.warning("%s; downloaded adapters go to %s and are lost with it", error, root)
        return DiskCache(root, config.adapter_disk_bytes)


def create_sources(config: ServerConfig, disk: DiskCache | None = None) -> dict[str, AdapterSource]:
    """The sources of a server, by their names in lower case; their files go to `disk`, by default the server's.

    Hub adapters go to the disk cache, unless `hub_cache` names a folder for them and `adapter_disk_cache` none: that
    one is the user's, and nothing is ever removed from it.
    """
    disk = create_disk_cache(config) if disk is None else disk
    managed = bool(config.adapter_disk_cache) or not config.hub_cache
    # Files may be float32 where the server's pages are 16 bits wide.
    max_bytes = config.max_adapter_bytes or 2 * config.adapter_host_bytes
    deadline_s, pickle = config.adapter_load_timeout_s, config.allow_pickle_adapters
    hub = HubSource(
        cache_dir=str(disk.folder("hub")) if managed else config.hub_cache,
        max_bytes=max_bytes,
        deadline_s=deadline_s,
        disk=disk if managed else None,
        allow_pickle=pickle,
    )
    roots = [root.strip() for root in config.adapter_roots.split(",") if root.strip()]
    local = LocalSource(tuple(map(Path, roots)), max_bytes)
    s3 = S3Source(disk, max_bytes=max_bytes, deadline_s=deadline_s, allow_pickle=pickle)
    sources: list[AdapterSource] = [hub, local, s3, PbaseSource(s3, deadline_s=deadline_s)]
    return {source.name: source for source in sources}
