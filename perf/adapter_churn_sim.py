"""How eviction policies fare with adapters that come and go: hit ratios and reload cost, simulated. No model runs.

    python perf/adapter_churn_sim.py [--requests 40000] [--seed 1]

The server's own order of eviction (lorax_backend.adapters.eviction) against plain LRU, for one tier of pages. Cost
is what misses bring in, in pages copied per request, with the fixed cost of each as 0.3 pages.
"""

from __future__ import annotations

import argparse
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from lorax_backend.adapters.eviction import EvictionOrder
from lorax_backend.types import AdapterRef

FIXED_COST = 0.3


class Policy(Protocol):
    """Who is in the tier, and who leaves first."""

    def use(self, ref: AdapterRef) -> bool:
        """Note a request; False if the adapter is not there."""
        ...

    def add(self, ref: AdapterRef, num_pages: int) -> None: ...

    def evict(self) -> AdapterRef: ...


class Lru:
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[AdapterRef, None] = OrderedDict()

    def use(self, ref: AdapterRef) -> bool:
        found = ref in self._order
        if found:
            self._order.move_to_end(ref)
        return found

    def add(self, ref: AdapterRef, num_pages: int) -> None:
        self._order[ref] = None

    def evict(self) -> AdapterRef:
        return self._order.popitem(last=False)[0]


class Served:
    """The order that the server uses."""

    def __init__(self) -> None:
        self._order = EvictionOrder()

    def use(self, ref: AdapterRef) -> bool:
        self._order.hit(ref)
        return ref in self._order

    def add(self, ref: AdapterRef, num_pages: int) -> None:
        self._order.add(ref, num_pages)

    def evict(self) -> AdapterRef:
        ref = min(self._order, key=self._order.rank)
        self._order.remove(ref, evicted=True)
        return ref


@dataclass(frozen=True)
class Workload:
    """Requests by adapter number; `pages[n]` of each adapter; the tier holds `capacity` pages."""

    name: str
    requests: list[int]
    pages: list[int]
    capacity: int


@dataclass(frozen=True)
class Outcome:
    hit_ratio: float
    cost: float  # pages copied a request


def simulate(policy: Policy, workload: Workload) -> Outcome:
    """Run one workload through an empty tier."""
    refs = [AdapterRef("hub", f"org/{number}") for number in range(len(workload.pages))]
    sizes = dict(zip(refs, workload.pages, strict=True))
    free, hits, cost = workload.capacity, 0, 0.0
    for number in workload.requests:
        ref = refs[number]
        if policy.use(ref):
            hits += 1
            continue
        cost += FIXED_COST + sizes[ref]
        free -= sizes[ref]
        while free < 0:
            free += sizes[policy.evict()]
        policy.add(ref, sizes[ref])
    return Outcome(hits / len(workload.requests), cost / len(workload.requests))


def workloads(requests: int, seed: int) -> list[Workload]:
    """Zipf(1.0) over 200 adapters with and without changing favourites, with scans through all, uniform traffic over
    twice the room, and rounds: the same adapters one after another for ever, more than there is room for."""
    rng, count = random.Random(seed), 200
    weights = [1 / (rank + 1) for rank in range(count)]
    mixed = [rng.choice([1, 2, 2, 4, 8]) for _ in range(count)]  # ranks 8 to 64
    zipf = rng.choices(range(count), weights, k=requests)
    drifting: list[int] = []
    order = list(range(count))
    for _ in range(8):
        rng.shuffle(order)
        drifting += [order[rank] for rank in rng.choices(range(count), weights, k=requests // 8)]
    uniform = [rng.randrange(64) for _ in range(requests)]
    scanned: list[int] = []
    while len(scanned) < requests:
        scanned += [*rng.choices(range(count), weights, k=4 * count), *range(count)]
    rounds = [number % 64 for number in range(requests)]
    return [
        Workload("zipf, rank 16, 32 on the device", zipf, [2] * count, 64),
        Workload("zipf, ranks 8 to 64, device", zipf, mixed, 110),
        Workload("zipf, ranks 8 to 64, host", zipf, mixed, 220),
        Workload("zipf, favourites change, device", drifting, mixed, 110),
        Workload("zipf, and a scan now and then", scanned, [2] * count, 64),
        Workload("uniform, twice the slots", uniform, [2] * 64, 64),
        Workload("rounds, twice the slots", rounds, [2] * 64, 64),
        Workload("rounds, twice the room, mixed", rounds, mixed[:64], sum(mixed[:64]) // 2),
        Workload("rounds, four slots too few", [n % 36 for n in range(requests)], [2] * 36, 64),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{'workload':34} {'LRU hits':>9} {'ours':>6} {'LRU cost':>9} {'ours':>6}")
    for workload in workloads(arguments.requests, arguments.seed):
        lru, ours = simulate(Lru(), workload), simulate(Served(), workload)
        print(
            f"{workload.name:34} {lru.hit_ratio:9.3f} {ours.hit_ratio:6.3f} {lru.cost:9.2f} {ours.cost:6.2f}"
        )


if __name__ == "__main__":
    main()
