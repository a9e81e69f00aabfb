"""The adapters of a server: `client.adapters`. Every call is one control request; see `Adapters`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lorax_triton._requests import ADAPTER_SOURCES
from lorax_triton.errors import RequestTimeoutError, ValidationError, parse_error

TIERS = ("device", "host", "disk")
# How often a waiting call asks again, in seconds: quickly at first, for adapters that only have to be copied.
_FIRST_POLL_S = 0.02
_LONGEST_POLL_S = 0.5

_ON_THE_WAY = ("fetching", "fetched", "reading", "loading")

Answer = dict[str, Any]
AdapterInfo = dict[str, Any]
# An adapter, weights by adapter, or entries of `adapter_id`, `adapter_source`, `revision` and `weight`.
AliasTarget = str | Mapping[str, float] | Sequence[Mapping[str, Any]]


def adapter_arguments(
    adapter_id: str,
    adapter_source: str | None = None,
    revision: str | None = None,
    api_token: str | None = None,
) -> dict[str, Any]:
    """Which adapter a command is about.

    Raises:
        ValidationError: no id, or an unknown source.
    """
    if not isinstance(adapter_id, str) or not adapter_id:
        raise ValidationError("`adapter_id` must be a non-empty text")
    if adapter_source is not None and adapter_source not in ADAPTER_SOURCES:
        raise ValidationError(
            f"`adapter_source={adapter_source}` must be one of {', '.join(ADAPTER_SOURCES)}"
        )
    arguments = {
        "adapter_id": adapter_id,
        "adapter_source": adapter_source,
        "revision": revision,
        "api_token": api_token,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def preload_arguments(adapter: dict[str, Any], tier: str, pin: bool) -> dict[str, Any]:
    """What to load, how near to the engine, and whether to keep it there."""
    if tier not in TIERS:
        raise ValidationError(f"`tier={tier}` must be one of {', '.join(TIERS)}")
    return {**adapter, "tier": tier, "pin": pin}


def alias_arguments(name: str, target: AliasTarget) -> dict[str, Any]:
    """A name and the adapters it stands for."""
    if not isinstance(name, str) or not name:
        raise ValidationError("an alias needs a name")
    if isinstance(target, str):
        targets: list[Mapping[str, Any]] = [{"adapter_id": target}]
    elif isinstance(target, Mapping):
        targets = [{"adapter_id": adapter_id, "weight": weight} for adapter_id, weight in target.items()]
    else:
        targets = list(target)
    if not targets or not all(entry.get("adapter_id") and entry.get("weight", 1) > 0 for entry in targets):
        raise ValidationError("`target` must name at least one adapter, each with a weight above 0")
    return {"alias": name, "targets": [dict(entry) for entry in targets]}


def is_loading(answer: Answer) -> bool:
    """True if the server has not finished with an adapter yet."""
    return answer.get("status") == "loading"


def progress_of(answer: Answer, adapters: Iterable[AdapterInfo], tier: str) -> Answer:
    """How far the adapter of an earlier answer is by now, from the server's list.

    Args:
        answer: to a command about it.
        adapters: the server's list.
        tier: where the adapter is wanted.

    Raises:
        AdapterError: it cannot be loaded; the subclasses say why.
    """
    same = [
        row
        for row in adapters
        if not row.get("retired")
        and all(row.get(key) == answer.get(key) for key in ("id", "source", "revision"))
    ]
    for row in same:
        # A command forgets the adapter's last error when it starts, so one that is there now is of this command.
        reason = row.get("error") or row.get("last_error")
        if reason:
            raise parse_error(424, {"error": reason, "error_type": row.get("error_type", "adapter_error")})
    if any(row.get("status") in _ON_THE_WAY for row in same):
        return answer
    if not same:
        # Files that nobody needs in memory are no longer listed under the name they were asked for by.
        return {**answer, "status": "ready" if tier == "disk" else "not_loaded"}
    row = same[0]
    near = row.get("tier") in TIERS[: TIERS.index(tier) + 1]
    return {**answer, **row, "status": "ready" if near else "loading"}


def _pauses(adapter_id: str, deadline: float | None) -> Iterator[float]:
    """Seconds to wait before each further question, until the deadline."""
    pause = _FIRST_POLL_S
    while deadline is None or time.monotonic() < deadline:
        yield pause if deadline is None else max(0.0, min(pause, deadline - time.monotonic()))
        pause = min(2 * pause, _LONGEST_POLL_S)
    raise RequestTimeoutError(f"Adapter {adapter_id!r} is still loading; the server goes on with it")


class Adapters:
    """What the server keeps of which adapter, and how to change it.

        client.adapters.list()                                 # id, status, tier, rank, bytes, hits ...
        client.adapters.preload("some/adapter", pin=True)      # on the device before its first request
        client.adapters.reload("some/adapter")                 # new weights; requests in flight keep the old
        client.adapters.set_alias("support", {"some/adapter@v1": 0.9, "some/adapter@v2": 0.1})

    `client.adapters()` is short for `client.adapters.list()`. All but the lists need the server's admin key (the
    client's `admin_key`); without it `list` shows only adapters that everybody may use. Every call raises a LoraxError
    if the server could not be asked or refused: UnauthorizedError without the right key, AdapterError and its
    subclasses for an adapter that cannot be used, NotFoundError for one the server does not have.
    """

    def __init__(self, control: Callable[[str, Mapping[str, Any]], Answer]) -> None:
        self._control = control

    def __call__(self) -> list[AdapterInfo]:
        """Same as `list`."""
        return self.list()

    def list(self) -> list[AdapterInfo]:
        """The adapters the server knows, one dict each: id, source, revision, status, tier, rank, bytes, users,
        pinned, hits and more."""
        return [*self._control("adapters", {}).get("adapters", ())]

    def preload(  # noqa: PLR0913 - all but the first by keyword
        self,
        adapter_id: str,
        adapter_source: str | None = None,
        *,
        revision: str | None = None,
        api_token: str | None = None,
        tier: str = "device",
        pin: bool = False,
        wait: bool = True,
        timeout: float | None = 300.0,
    ) -> Answer:
        """Bring an adapter to the server before its first request.

        Args:
            adapter_id: hub id, "id@revision", folder or URI.
            adapter_source: hub, local, s3 or pbase; None is the server's default.
            revision: branch, tag or commit.
            api_token: token for a private adapter.
            tier: how near to the engine: device, host or disk.
            pin: keep it there until `unpin`.
            wait: return when it is there; else at once.
            timeout: longest wait in seconds; None waits for ever.

        Returns:
            The server's answer; `status` is "ready", or "loading" without `wait`.

        Raises:
            RequestTimeoutError: it was not there in time; the server goes on loading it.
            AdapterError: it cannot be loaded; the subclasses say why.
        """
        adapter = adapter_arguments(adapter_id, adapter_source, revision, api_token)
        arguments = preload_arguments(adapter, tier, pin)
        return self._wait(self._control("adapter_preload", arguments), arguments, wait, timeout)

    def reload(
        self,
        adapter_id: str,
        adapter_source: str | None = None,
        *,
        revision: str | None = None,
        api_token: str | None = None,
        wait: bool = True,
        timeout: float | None = 300.0,
    ) -> Answer:
        """Look for new weights of an adapter and use them from now on; requests in flight finish on the old ones.

        Arguments and errors are those of `preload`.
        """
        arguments = adapter_arguments(adapter_id, adapter_source, revision, api_token)
        answer = self._control("adapter_reload", arguments)
        return self._wait(answer, arguments, wait, timeout)

    def pin(
        self, adapter_id: str, adapter_source: str | None = None, *, revision: str | None = None
    ) -> Answer:
        """Keep an adapter where it is, however long nobody uses it."""
        return self._control("adapter_pin", adapter_arguments(adapter_id, adapter_source, revision))

    def unpin(
        self, adapter_id: str, adapter_source: str | None = None, *, revision: str | None = None
    ) -> Answer:
        """Let the server evict a pinned adapter again."""
        return self._control("adapter_unpin", adapter_arguments(adapter_id, adapter_source, revision))

    def unload(
        self, adapter_id: str, adapter_source: str | None = None, *, revision: str | None = None
    ) -> Answer:
        """Take an adapter off the device and out of host memory, once no request uses it; files stay on disk."""
        return self._control("adapter_unload", adapter_arguments(adapter_id, adapter_source, revision))

    def purge(self, adapter_id: str | None = None, adapter_source: str | None = None) -> Answer:
        """Delete an adapter's downloaded files, or with None those of every adapter that is not in use."""
        if adapter_id is None:
            return self._control("adapter_purge", {"all": True})
        return self._control("adapter_purge", adapter_arguments(adapter_id, adapter_source))

    def aliases(self) -> dict[str, Any]:
        """The names that stand for adapters, each with its targets: `adapter_id`, `revision`, `weight` ..."""
        return dict(self._control("aliases", {}).get("aliases", {}))

    def set_alias(self, name: str, target: AliasTarget) -> Answer:
        """Let `name` stand for an adapter, or for several with weights, of which each request draws one; from now on.
        "__base_model__" is the base model."""
        return self._control("alias_set", alias_arguments(name, target))

    def delete_alias(self, name: str) -> bool:
        """Forget a name; False if there is none of that kind."""
        return bool(self._control("alias_delete", {"alias": name}).get("deleted", False))

    def _wait(
        self, answer: Answer, arguments: Mapping[str, Any], wait: bool, timeout: float | None
    ) -> Answer:
        deadline = None if timeout is None else time.monotonic() + timeout
        pauses = _pauses(arguments["adapter_id"], deadline)
        # A reloaded adapter comes back to where it was, which is at least in the host's memory.
        tier = arguments.get("tier", "host")
        while wait and is_loading(answer):
            time.sleep(next(pauses))
            answer = progress_of(answer, self.list(), tier)
        return answer


class AsyncAdapters:
    """`Adapters` for an event loop: every call is awaited, `await client.adapters()` too."""

    def __init__(self, control: Callable[[str, Mapping[str, Any]], Awaitable[Answer]]) -> None:
        self._control = control

    async def __call__(self) -> list[AdapterInfo]:
        """Same as `list`."""
        return await self.list()

    async def list(self) -> list[AdapterInfo]:
        """See `Adapters.list`."""
        return [*(await self._control("adapters", {})).get("adapters", ())]

    async def preload(  # noqa: PLR0913 - all but the first by keyword
        self,
        adapter_id: str,
        adapter_source: str | None = None,
        *,
        revision: str | None = None,
        api_token: str | None = None,
        tier: str = "device",
        pin: bool = False,
        wait: bool = True,
        timeout: float | None = 300.0,
    ) -> Answer:
        """See `Adapters.preload`."""
        adapter = adapter_arguments(adapter_id, adapter_source, revision, api_token)
        arguments = preload_arguments(adapter, tier, pin)
        answer = await self._control("adapter_preload", arguments)
        return await self._wait(answer, arguments, wait, timeout)

    async def reload(
        self,
        adapter_id: str,
        adapter_source: str | None = None,
        *,
        revision: str | None = None,
        api_token: str | None = None,
        wait: bool = True,
        timeout: float | None = 300.0,
    ) -> Answer:
        """See `Adapters.reload`."""
        arguments = adapter_arguments(adapter_id, adapter_source, revision, api_token)
        answer = await self._control("adapter_reload", arguments)
        return await self._wait(answer, arguments, wait, timeout)

    async def pin(
        self, adapter_id: str, adapter_source: str | None = None, *, revision: str | None = None
    ) -> Answer:
        """See `Adapters.pin`."""
        return await self._control("adapter_pin", adapter_arguments(adapter_id, adapter_source, revision))

    async def unpin(
        self, adapter_id: str, adapter_source: str | None = None, *, revision: str | None = None
    ) -> Answer:
        """See `Adapters.unpin`."""
        return await self._control("adapter_unpin", adapter_arguments(adapter_id, adapter_source, revision))

    async def unload(
        self, adapter_id: str, adapter_source: str | None = None, *, revision: str | None = None
    ) -> Answer:
        """See `Adapters.unload`."""
        return await self._control("adapter_unload", adapter_arguments(adapter_id, adapter_source, revision))

    async def purge(self, adapter_id: str | None = None, adapter_source: str | None = None) -> Answer:
        """See `Adapters.purge`."""
        if adapter_id is None:
            return await self._control("adapter_purge", {"all": True})
        return await self._control("adapter_purge", adapter_arguments(adapter_id, adapter_source))

    async def aliases(self) -> dict[str, Any]:
        """See `Adapters.aliases`."""
        return dict((await self._control("aliases", {})).get("aliases", {}))

    async def set_alias(self, name: str, target: AliasTarget) -> Answer:
        """See `Adapters.set_alias`."""
        return await self._control("alias_set", alias_arguments(name, target))

    async def delete_alias(self, name: str) -> bool:
        """See `Adapters.delete_alias`."""
        return bool((await self._control("alias_delete", {"alias": name})).get("deleted", False))

    async def _wait(
        self, answer: Answer, arguments: Mapping[str, Any], wait: bool, timeout: float | None
    ) -> Answer:
        deadline = None if timeout is None else time.monotonic() + timeout
        pauses = _pauses(arguments["adapter_id"], deadline)
        # A reloaded adapter comes back to where it was, which is at least in the host's memory.
        tier = arguments.get("tier", "host")
        while wait and is_loading(answer):
            await asyncio.sleep(next(pauses))
            answer = progress_of(answer, await self.list(), tier)
        return answer
