"""What operators and metrics are told of the adapters. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lorax_backend.adapters.counters import DEVICE, HOST
from lorax_backend.adapters.loading import MAX_NAMED, AdapterLoading
from lorax_backend.adapters.registry import AdapterRecord
from lorax_backend.adapters.sources.base import DiskTier
from lorax_backend.adapters.tiers import DeviceTier
from lorax_backend.errors import LoraxError
from lorax_backend.types import AdapterRef

_MAX_DISK_LISTED = 4096


def tier_stats(loading: AdapterLoading, device: DeviceTier, disk: DiskTier | None) -> dict[str, Any]:
    """Plain numbers, lists and dicts, made each second on the engine's thread: what it costs grows with the device's
    slots and the requests that wait, not with the adapters that are known.

    Gauges: pages_total, pages_used, pages_pinned, slots_total, on_device, on_host, on_disk, loading, known, pinned,
    host_bytes_total, host_bytes_used, disk_bytes_total, disk_bytes_used. Counters: loads (adapters
    read into host memory), failed_loads, evictions (from the device, or from the host alone), auth_checks,
    auth_denials, reloads; by tier: tier_hits, tier_loads, tier_evictions. load_seconds: by tier, a histogram (see
    counters.Histogram). running, waiting: names of adapters that sequences run with or requests wait for, at most 64
    each; popular: for the 64 with most requests, their number by name (see popularity.MostAsked).
    """
    arena, counters, on_device = device.arena, loading.counters, list(device)
    evicted = counters.evictions[DEVICE] + counters.evictions[HOST]
    disk_stats = disk.stats() if disk is not None else {"bytes_total": 0, "bytes_used": 0, "entries": 0}
    known, on_device_alone = len(loading.records), sum(record.host is None for record in on_device)
    return {
        "pages_total": arena.num_pages,
        "pages_used": arena.num_pages - arena.num_free_pages,
        "pages_pinned": device.num_pinned_pages,
        "slots_total": arena.max_slots,
        "on_device": len(device),
        "on_host": len(loading.host),
        "on_disk": disk_stats["entries"],
        "known": known,
        "pinned": len(loading.pinned),
        "loading": known - len(loading.host) - on_device_alone,
        "host_bytes_total": loading.host.budget,
        "host_bytes_used": loading.host.used,
        "disk_bytes_total": disk_stats["bytes_total"],
        "disk_bytes_used": disk_stats["bytes_used"],
        "loads": counters.loads[HOST],
        "failed_loads": counters.failed_loads,
        "evictions": evicted,
        "auth_checks": counters.auth_checks,
        "auth_denials": counters.auth_denials,
        "reloads": counters.reloads,
        "tier_hits": dict(counters.hits),
        "tier_loads": dict(counters.loads),
        "tier_evictions": counters.evictions | {"disk": disk_stats.get("evictions", 0)},
        "load_seconds": {tier: histogram.as_dict() for tier, histogram in counters.seconds.items()},
        "running": [str(record.ref) for record in on_device if record.users][:MAX_NAMED],
        "waiting": [str(record.ref) for record in loading.waiting()],
        "popular": loading.most_asked.by_name(),
    }


def device_problems(loading: AdapterLoading, device: DeviceTier) -> Iterator[str]:
    """What does not add up between records and device; a defect of this program."""
    records, arena = loading.records.values(), device.arena
    pages = sum(record.num_pages for record in records if record.slot is not None)
    if pages + arena.num_free_pages != arena.num_pages:
        yield "pages of the device"
    if {r.ref for r in records if r.slot is not None} != {r.ref for r in device if r.ref in device.order}:
        yield "records on the device"
    if any(record.slot is None for record in records if record.users):
        yield "slots of running sequences"


def adapter_rows(
    records: Iterable[AdapterRecord],
    errors: Mapping[AdapterRef, LoraxError],
    disk: DiskTier | None,
    now: float,
) -> list[dict[str, Any]]:
    """See AdapterLifecycle.describe: the adapters that are known, those that commands could not have, by `errors`, and
    those that are on disk alone. `now` is the time on the lifecycle's clock."""
    rows = [record.describe(now) for record in sorted(records, key=lambda record: str(record.ref))]
    known = {(row["source"], row["id"]) for row in rows}
    for ref, error in errors.items():
        failure = {"last_error": error.message, "error_type": error.error_type}
        if (ref.source, ref.id) not in known:
            row = _absent_row(ref.source, ref.id, ref.revision, "failed", error=error.message)
            rows.append(row | failure)
            continue
        # The adapter is here all the same: its reload failed, or it was had another time.
        for row in rows:
            if (row["source"], row["id"], row["revision"]) == (ref.source, ref.id, ref.revision):
                row |= failure
    entries = disk.entries() if disk is not None else []
    for entry in entries[:_MAX_DISK_LISTED]:
        if (entry["source"], entry["id"]) not in known:
            row = _absent_row(entry["source"], entry["id"], entry["revision"], "on_disk")
            seconds = round(max(0.0, time.time() - entry["last_used"]), 3)
            rows.append(row | {"tier": "disk", "bytes": entry["bytes"], "last_used_s": seconds})
    return rows


def _absent_row(
    source: str, adapter_id: str, revision: str | None, status: str, error: str | None = None
) -> dict[str, Any]:
    record = AdapterRecord(AdapterRef(source, adapter_id, revision))
    return record.describe(0.0) | {
        "status": status,
        "tier": None,
        "error": error,
        "resolved_revision": revision,
    }
