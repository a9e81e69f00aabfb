"""Aliases that were set by command, kept in a file over restarts. Standard library only.

The file holds, for each alias that a command has changed, where it leads (null: deleted) and what the configuration
said of it at that time. The later word wins: while the configuration says the same, the command's holds; once somebody
has changed the configuration, the configuration's does. The file is replaced as a whole, so that it is never half of
one, and servers that share it change it one after the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_backend.config import ServerConfig
from lorax_backend.errors import LoraxError

_log = logging.getLogger(__name__)

Targets = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class KeptAlias:
    """`targets` None: deleted. `configured` is what the configuration said when the command came, None: nothing."""

    targets: Targets | None
    configured: Targets | None


class AliasStore:
    """The file; any thread and any process may use it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, config: ServerConfig) -> AliasStore | None:
        """The store that the options ask for: `adapter_alias_file`, else one beside the disk cache that they name, with
        the model in its name, since others may share that folder; None without either."""
        if config.adapter_alias_file:
            return cls(Path(os.path.abspath(config.adapter_alias_file)))
        if not config.adapter_disk_cache:
            return None
        model = hashlib.sha256(config.model_id.encode()).hexdigest()[:12]
        return cls(Path(os.path.abspath(config.adapter_disk_cache)) / f"aliases-{model}.json")

    def load(self) -> dict[str, KeptAlias]:
        """What is there; nothing if there is no file, or none that can be read, which the log tells."""
        try:
            return self._read()
        except OSError as error:
            _log.error("aliases set by command are lost: %s cannot be read: %s", self.path, error.strerror)
        except ValueError:
            broken = self.path.with_name(self.path.name + ".broken")
            _log.error("aliases set by command are lost: %s is damaged; see %s", self.path, broken)
            with contextlib.suppress(OSError):
                self.path.replace(broken)
        return {}

    def change(self, changes: Mapping[str, KeptAlias | None]) -> None:
        """Note what became of these aliases; None: nothing needs to be known of it any more.

        Raises:
            LoraxError: the file cannot be written, and is as it was.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                kept = {**self._read(), **changes}
                self._write({name: alias for name, alias in kept.items() if alias is not None})
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or "it is damaged"
            raise LoraxError(
                f"alias: nothing was changed, as {self.path} (adapter_alias_file) could not be written: {reason}"
            ) from None

    def _read(self) -> dict[str, KeptAlias]:
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))["aliases"]
            return {
                name: KeptAlias(entry["targets"], entry.get("configured")) for name, entry in entries.items()
            }
        except FileNotFoundError:
            return {}
        except (AttributeError, KeyError, TypeError) as error:  # JSON of another kind
            raise ValueError from error

    def _write(self, kept: Mapping[str, KeptAlias]) -> None:
        entries = {
            name: {"targets": alias.targets, "configured": alias.configured} for name, alias in kept.items()
        }
        handle, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"aliases": entries}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self.path.with_name(f".{self.path.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
