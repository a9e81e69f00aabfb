"""Which Triton server gets a request: rendezvous hashing by adapter, bounded by load. Pure logic."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

# A server that is this much busier than the average gives way to the next in its adapter's ranking.
_LOAD_BOUND = 1.5


def score(key: str, server: str) -> int:
    """Rank of a server for a key: the highest score owns it. Removing a server moves only its own keys
    (Thaler and Ravishankar's highest random weight)."""
    return int.from_bytes(hashlib.blake2b(f"{key}\0{server}".encode(), digest_size=8).digest(), "big")


def ranking(key: str | None, servers: Sequence[str], in_flight: Sequence[int]) -> list[int]:
    """Indices of servers in the order to try.

    Args:
        key: the adapter; None for the base model, which goes to the least busy server.
        servers: names, stable over restarts and equal in every gateway.
        in_flight: requests each has now.
    """
    if key is None:
        return sorted(range(len(servers)), key=lambda i: in_flight[i])
    order = sorted(range(len(servers)), key=lambda i: score(key, servers[i]), reverse=True)
    bound = _LOAD_BOUND * (sum(in_flight) + 1) / max(1, len(servers)) + 1
    # Stable: the ranking holds within both groups.
    return sorted(order, key=lambda i: in_flight[i] > bound)
