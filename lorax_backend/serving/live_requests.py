"""The table of requests that have not had their final event yet. Standard library only."""

from __future__ import annotations

import threading

from lorax_backend.serving.delivery import LiveRequest


class LiveRequests:
    """Owner of the table. All methods are thread-safe; `get` takes no lock, since the engine's thread calls it per
    token."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._by_handle: dict[int, LiveRequest] = {}
        self._by_request_id: dict[str, set[LiveRequest]] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._by_handle)

    def get(self, handle: int) -> LiveRequest | None:
        return self._by_handle.get(handle)

    def add(self, live: LiveRequest) -> bool:
        """Enter a request; False once the table is closed."""
        with self._changed:
            if self._closed:
                return False
            self._by_handle[live.handle] = live
            if live.request_id:
                self._by_request_id.setdefault(live.request_id, set()).add(live)
            return True

    def remove(self, live: LiveRequest) -> None:
        with self._changed:
            self._by_handle.pop(live.handle, None)
            same_id = self._by_request_id.get(live.request_id, set())
            same_id.discard(live)
            if not same_id:
                self._by_request_id.pop(live.request_id, None)
            if not self._by_handle:
                self._changed.notify_all()

    def of_request_id(self, request_id: str) -> list[LiveRequest]:
        with self._changed:
            return list(self._by_request_id.get(request_id, ()))

    def snapshot(self) -> list[LiveRequest]:
        with self._changed:
            return list(self._by_handle.values())

    def close(self) -> None:
        """Let no request in any more."""
        with self._changed:
            self._closed = True

    def wait_empty(self, timeout: float) -> bool:
        """Wait until the table is empty; False if it is not after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._by_handle, timeout)
