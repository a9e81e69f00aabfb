"""How many requests may be in flight, altogether and for one adapter. Standard library only."""

from __future__ import annotations

import threading

from lorax_backend.errors import OverloadedError
from lorax_backend.types import AdapterRef

_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_WEIGHT = 0.1  # of the newest request in the running mean of durations


class Admission:
    """Counts what is in flight and refuses at once what exceeds a cap. Thread-safe.

    Args:
        max_requests: cap on all sequences in flight.
        max_per_adapter: cap on the requests of one adapter; 0 is none. The base model has no cap of its own.
    """

    def __init__(self, max_requests: int, max_per_adapter: int) -> None:
        self._max_requests = max_requests
        self._max_per_adapter = max_per_adapter
        self._lock = threading.Lock()
        self._by_adapter: dict[AdapterRef, int] = {}
        self._entered: dict[int, AdapterRef] = {}
        self._mean_s: float | None = None

    def refusal(self, in_flight: int) -> OverloadedError | None:
        """Why a request more cannot be taken, if that is so."""
        if in_flight < self._max_requests:
            return None
        return OverloadedError(
            f"{self._max_requests} requests are in flight, as many as this server takes (max_concurrent_requests); "
            "try again later",
            self.retry_after_s,
        )

    def enter(self, handle: int, adapter: AdapterRef | None) -> None:
        """Count request `handle` among those of its adapter.

        Raises:
            OverloadedError: the adapter has as many as it may; nothing was counted.
        """
        if adapter is None:
            return
        with self._lock:
            count = self._by_adapter.get(adapter, 0)
            if 0 < self._max_per_adapter <= count:
                raise OverloadedError(
                    f"adapter_id: {count} requests for {adapter.id} are in flight, as many as this server takes for "
                    "one adapter (max_requests_per_adapter); try again later",
                    self.retry_after_s,
                )
            self._by_adapter[adapter] = count + 1
            self._entered[handle] = adapter

    def leave(self, handle: int) -> None:
        """Undo `enter`, if there was one."""
        with self._lock:
            adapter = self._entered.pop(handle, None)
            if adapter is None:
                return
            self._by_adapter[adapter] -= 1
            if not self._by_adapter[adapter]:
                del self._by_adapter[adapter]

    def finished(self, seconds: float) -> None:
        """Note how long a request took that was answered."""
        mean = self._mean_s
        self._mean_s = seconds if mean is None else mean + _WEIGHT * (seconds - mean)

    @property
    def retry_after_s(self) -> float:
        """When trying again is worth it: about as long as a request takes, in seconds."""
        return float(round(min(max(self._mean_s or 0.0, _MIN_RETRY_S), _MAX_RETRY_S)))
