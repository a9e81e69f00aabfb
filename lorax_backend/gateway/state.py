"""What all routes share: options, servers, counts, and ids of requests."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any, cast

from starlette.requests import Request

from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.counters import Counters
from lorax_backend.gateway.pool import Pool

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True, slots=True)
class GatewayState:
    """One per application."""

    config: GatewayConfig
    pool: Pool
    counters: Counters

    def request_id(self, request: Request) -> str:
        """The id of an HTTP request: the caller's `x-request-id` if it is a sensible one, else a new one."""
        return cast(str, request.scope["lorax_request_id"])

    def engine_request_id(self, request: Request) -> str:
        """The id on the Triton server: begins with the caller's, but is nobody else's, since a server cancels all
        requests of an id."""
        return f"{self.request_id(request)}.{uuid.uuid4().hex[:12]}"

    async def adapters(self, admin_key: str | None = None) -> list[dict[str, Any]]:
        """The adapters all servers know, without the right key only the public ones; with several servers each entry
        names its own.

        Raises:
            LoraxError: no server could be asked.
        """
        answers = await self.pool.control_all("adapters", {"admin_key": admin_key} if admin_key else {})
        several = len(self.pool.endpoints) > 1
        return [
            {**adapter, "server": url} if several else dict(adapter)
            for url, answer in answers.items()
            for adapter in answer.get("adapters", ())
        ]


def state_of(request: Request) -> GatewayState:
    """The state of the application that serves a request."""
    return cast(GatewayState, request.app.state.gateway)


def read_request_id(given: str) -> str:
    """The id to use for a request whose caller sent `given`."""
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
