"""What operators can do with adapters: preload, pin, unload, reload, purge, list. Standard library only.

No command waits: what takes time goes on in the background, and the answer's `status` says how far it is. Asking
again is harmless and tells the present state; `adapters` shows what failed.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorax_backend.adapters.background import DISK
from lorax_backend.adapters.loading import AdapterLoading, AdapterParts
from lorax_backend.adapters.registry import AdapterRecord, AdapterStatus
from lorax_backend.adapters.report import adapter_rows
from lorax_backend.adapters.tiers import DeviceTier
from lorax_backend.engine.protocols import AdapterFailure
from lorax_backend.errors import LoraxError, ValidationError
from lorax_backend.types import AdapterRef

if TYPE_CHECKING:
    from lorax_backend.adapters.lifecycle import AdapterLifecycle

_PLACES = ("device", "host", "disk")
_TARGET = ("adapter_id", "adapter_source", "revision", "api_token")
_ARGUMENTS = {
    "adapter_preload": (*_TARGET, "tier", "pin"),
    "adapter_pin": (*_TARGET, "tier"),
    "adapter_unpin": _TARGET,
    "adapter_unload": _TARGET,
    "adapter_reload": _TARGET,
    "adapter_purge": (*_TARGET, "all"),
    "adapter_list": (),
}
_NO_PINS = "pin: beside what is pinned on the {tier} already, it would leave no room for any other adapter"
_MAX_ERRORS = 256


@dataclass(slots=True)
class _Operation:
    """A command under way; it holds its adapter as a request does, by a negative handle."""

    handle: int
    record: AdapterRecord
    tier: str
    pin: bool = False


class AdapterControl:
    """Runs commands on the engine thread, and moves those under way on at each poll."""

    def __init__(
        self,
        lifecycle: AdapterLifecycle,
        loading: AdapterLoading,
        device: DeviceTier,
        parts: AdapterParts,
        clock: Callable[[], float],
    ) -> None:
        self._lifecycle = lifecycle
        self._loading = loading
        self._device = device
        self._parts = parts
        self._clock = clock
        self._handles = itertools.count(-1, -1)
        self._operations: dict[int, _Operation] = {}
        self._targets: dict[int, AdapterRef] = {}
        self._errors: OrderedDict[AdapterRef, LoraxError] = OrderedDict()
        self._commands: dict[str, Callable[[AdapterRef, dict[str, Any]], dict[str, Any]]] = {
            "adapter_preload": self._preload,
            "adapter_pin": self._pin,
            "adapter_unpin": self._unpin,
            "adapter_unload": self._unload,
            "adapter_reload": self._reload,
        }

    def run(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run one command; see AdapterProvider.control for what it raises."""
        allowed = _ARGUMENTS.get(command)
        if allowed is None:
            raise ValidationError(f"command: {command!r} is not one of {', '.join(_ARGUMENTS)}")
        for name in arguments:
            if name not in allowed:
                takes = ", ".join(allowed) or "none"
                raise ValidationError(f"{command}: unknown argument {name!r}; it takes {takes}")
        if command == "adapter_list":
            return {"adapters": self.rows()}
        if command == "adapter_purge" and arguments.get("all") is True:
            return self._purge_all()
        ref = self._loading.references.base(_target(command, arguments, self._parts.default_source))
        answer = self._purge(ref) if command == "adapter_purge" else self._commands[command](ref, arguments)
        self._loading.background.wakeup()  # a poll follows, which takes it from here
        return answer

    def rows(self) -> list[dict[str, Any]]:
        """See AdapterLifecycle.describe."""
        return adapter_rows(self._loading.records.values(), self._errors, self._parts.disk, self._clock())

    def progress(self) -> None:
        """Move the commands under way on as far as they can go now."""
        for operation in list(self._operations.values()):
            record = operation.record
            if operation.handle in record.unverified:
                continue  # the token that came with the command may have no right
            on_disk = record.status not in (AdapterStatus.FETCHING, AdapterStatus.FAILED)
            if record.replaces is not None and self._replace(record):
                done = True
            elif record.replaces is not None:
                done = False
            elif operation.tier == "disk":
                done = on_disk
            elif operation.tier == "host" or not record.is_loaded:
                done = record.is_loaded
            else:
                done = record.slot is not None or self._lifecycle.bring_in(record)
            if done:
                if operation.pin:
                    self._pin_now(record, operation.tier)
                self._finish(operation.handle)

    def take_failures(self, failures: list[AdapterFailure]) -> None:
        """Commands whose adapter could not be had."""
        for failure in failures:
            self._operations.pop(failure.handle, None)
            ref = self._targets.pop(failure.handle)
            self._errors[ref] = failure.error
            while len(self._errors) > _MAX_ERRORS:
                self._errors.popitem(last=False)

    def _preload(self, ref: AdapterRef, arguments: dict[str, Any]) -> dict[str, Any]:
        tier = _tier(arguments, _PLACES, "device")
        pin = arguments.get("pin", False)
        if not isinstance(pin, bool):
            raise ValidationError("pin: must be true or false")
        if pin and tier == "disk":
            raise ValidationError("pin: an adapter can be pinned on the device or the host, not on disk")
        record = self._loading.find(ref)
        if pin and not self._may_pin(ref, 1 if record is None else record.num_pages, tier):
            raise ValidationError(_NO_PINS.format(tier=tier))
        if record is not None and _is_at(record, tier):
            if pin:
                self._loading.pin(record, tier)
        else:
            self._start(ref, arguments.get("api_token"), tier, pin=pin)
            self.progress()
        return self._answer(ref, tier)

    def _pin(self, ref: AdapterRef, arguments: dict[str, Any]) -> dict[str, Any]:
        tier = _tier(arguments, ("device", "host"), "device")
        return self._preload(ref, arguments | {"tier": tier, "pin": True})

    def _unpin(self, ref: AdapterRef, arguments: dict[str, Any]) -> dict[str, Any]:
        record = self._loading.find(ref)
        if record is not None:
            self._loading.pin(record, "")
            for operation in self._operations.values():
                operation.pin = operation.pin and operation.record is not record
            self._loading.room_changed()
        return self._answer(ref)

    def _unload(self, ref: AdapterRef, arguments: dict[str, Any]) -> dict[str, Any]:
        record = self._loading.find(self._loading.references.resolve(ref))
        if record is None:
            return self._answer(ref) | {"status": "not_loaded"}
        for operation in list(self._operations.values()):
            if operation.record is record or operation.record.replaces is record:
                self._finish(operation.handle)
                if operation.record is not record and operation.record.status is not AdapterStatus.DROPPED:
                    self._lifecycle.retire(operation.record)
        if record.status is not AdapterStatus.DROPPED:
            if record.handles or record.users or not record.is_loaded:
                self._loading.references.make_current(self._loading.references.next_generation(record.ref))
            self._lifecycle.retire(record)
        return self._answer(ref) | {
            "status": "unloaded" if record.status is AdapterStatus.DROPPED else "unloading"
        }

    def _reload(self, ref: AdapterRef, arguments: dict[str, Any]) -> dict[str, Any]:
        """New weights for new requests; those in flight keep the old. Until the new are here all get the old."""
        old = self._loading.find(self._loading.references.resolve(ref))
        self._loading.recent.forget(ref)
        self._errors.pop(ref, None)
        if old is None or not old.is_loaded:
            return self._preload(ref, {name: arguments[name] for name in ("api_token",) if name in arguments})
        if not any(operation.record.replaces is old for operation in self._operations.values()):
            fresh = self._loading.references.next_generation(old.ref)
            tier = "device" if old.slot is not None else "host"
            self._start(fresh, arguments.get("api_token"), tier, replaces=old)
        return self._answer(ref) | {"status": "loading"}

    def _replace(self, record: AdapterRecord) -> bool:
        """Put a reloaded adapter in the old one's place once it is here; True if it turned out to be the same."""
        old = record.replaces
        assert old is not None
        if old.status is AdapterStatus.DROPPED or old.retired:
            pinned = ""
        elif record.revision and record.revision == old.revision:
            return True  # nothing has changed
        else:
            pinned = old.pinned
        if record.is_loaded:
            self._loading.references.make_current(record.ref)
            self._loading.counters.reloads += 1
            record.replaces, record.hits = None, old.hits
            self._loading.pin(record, pinned)
            self._loading.most_asked.count(record)
            if old.status is not AdapterStatus.DROPPED:
                self._lifecycle.retire(old)
        return False

    def _purge(self, ref: AdapterRef) -> dict[str, Any]:
        answer = self._unload(ref, {})
        self._errors.pop(ref, None)
        self._loading.recent.forget(ref)
        self._remove_files(ref, ref.source, ref.id)
        return answer | {"status": "purging"}

    def _purge_all(self) -> dict[str, Any]:
        for record in list(self._loading.records.values()):
            if not record.retired and record.ref in self._loading.records:
                self._unload(self._loading.references.base(record.ref), {})
        self._errors.clear()
        self._remove_files(AdapterRef("all", "adapters"), None, None)
        return {"status": "purging"}

    def _remove_files(self, ref: AdapterRef, source: str | None, adapter_id: str | None) -> None:
        disk = self._parts.disk
        if disk is not None:
            self._loading.background.submit(
                ref, DISK, lambda: disk.purge(source, adapter_id), lambda value, error: None
            )

    def _start(
        self,
        ref: AdapterRef,
        token: str | None,
        tier: str,
        pin: bool = False,
        replaces: AdapterRecord | None = None,
    ) -> None:
        self._errors.pop(replace(ref, generation=0), None)
        handle = next(self._handles)
        self._targets[handle] = replace(ref, generation=0)
        record = self._loading.acquire(handle, ref, token, replaces)
        if record is not None:
            self._operations[handle] = _Operation(handle, record, tier, pin)

    def _finish(self, handle: int) -> None:
        self._operations.pop(handle, None)
        self._targets.pop(handle, None)
        self._lifecycle.release(handle)

    def _may_pin(self, ref: AdapterRef, num_pages: int, tier: str, pending: bool = True) -> bool:
        """False if this pin beside the others, and those under way, would leave no room for any other adapter."""
        pinned = {r.ref: r.num_pages for r in self._loading.pinned if r.pinned == tier}
        for operation in self._operations.values():
            if pending and operation.pin and operation.tier == tier:
                pinned[operation.record.ref] = max(1, operation.record.num_pages)
        pinned[ref] = max(1, num_pages)
        if tier == "host":
            return sum(pinned.values()) < self._parts.memory.num_pages
        arena = self._parts.arena
        return sum(pinned.values()) < arena.num_pages and len(pinned) < arena.max_slots

    def _pin_now(self, record: AdapterRecord, tier: str) -> None:
        """An adapter to be pinned has come; only now is its size known."""
        if self._may_pin(record.ref, record.num_pages, tier, pending=False):
            self._loading.pin(record, tier)
        else:
            self._errors[replace(record.ref, generation=0)] = ValidationError(_NO_PINS.format(tier=tier))

    def _answer(self, ref: AdapterRef, tier: str = "") -> dict[str, Any]:
        record = self._loading.find(self._loading.references.resolve(ref))
        answer: dict[str, Any] = {"id": ref.id, "source": ref.source, "revision": ref.revision}
        if record is None:
            return answer | {"status": "loading" if ref in self._targets.values() else "not_loaded"}
        status = "ready" if _is_at(record, tier or "host") else "loading"
        return answer | {
            "status": status,
            "tier": record.describe(0.0)["tier"],
            "pinned": record.pinned or None,
        }


def _is_at(record: AdapterRecord, tier: str) -> bool:
    """True if the adapter is in this tier or a nearer one."""
    if tier == "device":
        return record.slot is not None
    return record.is_loaded or (tier == "disk" and bool(record.revision))


def _target(command: str, arguments: dict[str, Any], default_source: str) -> AdapterRef:
    for name in _TARGET:
        value = arguments.get(name)
        if value is not None and not isinstance(value, str):
            raise ValidationError(f"{command}: {name} must be a string")
    adapter_id = arguments.get("adapter_id")
    if not adapter_id:
        raise ValidationError(f"{command}: adapter_id is missing")
    return AdapterRef(
        arguments.get("adapter_source") or default_source, adapter_id, arguments.get("revision") or None
    )


def _tier(arguments: dict[str, Any], known: tuple[str, ...], default: str) -> str:
    tier = arguments.get("tier") or default
    if tier not in known:
        raise ValidationError(f"tier: {tier!r} is not one of {', '.join(known)}")
    return str(tier)
