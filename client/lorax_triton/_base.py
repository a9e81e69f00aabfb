"""What `Client` and `AsyncClient` share: options, and turning a call into a request. No I/O."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorax_triton._channel import ChannelConfig, Tls, bearer_token, make_metadata, parse_base_url
from lorax_triton._transport import InferRequest
from lorax_triton._wire import ResponseDecoder, encode_control, encode_request
from lorax_triton.metrics import metrics_address
from lorax_triton.types import Parameters, Request

# The model that generates, and the one to ask about it and to cancel at: an ensemble in front of it cannot do either.
ENGINE_MODEL = "lorax"
DEFAULT_TIMEOUT_S = 60.0
# Commands that change something for everybody begin with one of these and need the admin key; the last two tell more
# with it.
_GUARDED_COMMANDS = ("adapter_", "alias_", "reset_", "adapters", "stats")
# A cancellation through a control request that nobody waits for.
CANCEL_TIMEOUT_S = 5.0


def check_timeout(name: str, value: float | None) -> None:
    """Refuse a time limit that could never be kept.

    Raises:
        ValueError: `value` is not None and not positive.
    """
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be more than 0 seconds, not {value!r}; None waits for ever")


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits of one request in seconds; None is none."""

    next_response: float | None
    total: float | None


class ClientBase:
    """Options of a client and the requests they lead to."""

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str] | None,
        cookies: Mapping[str, str] | None,
        timeout: float | None,
        model_name: str,
        total_timeout: float | None,
    ) -> None:
        check_timeout("timeout", timeout)
        check_timeout("total_timeout", total_timeout)
        self.base_url = base_url
        self.headers = headers
        self.cookies = cookies
        self.timeout = timeout
        self.model_name = model_name
        self.total_timeout = total_timeout
        self._bearer = bearer_token(headers)

    def _channel_config(
        self, tls: Tls | bool | None, connect_timeout: float, max_session_retries: int
    ) -> ChannelConfig:
        check_timeout("connect_timeout", connect_timeout)
        if max_session_retries < 0:
            raise ValueError(f"max_session_retries must not be negative, not {max_session_retries!r}")
        target, wants_tls = parse_base_url(self.base_url)
        if isinstance(tls, bool) or tls is None:
            tls = Tls() if tls or wants_tls else None
        metadata = make_metadata(self.headers, self.cookies)
        return ChannelConfig(target, tls, metadata, connect_timeout, max_session_retries)

    def _encode(self, request: Request, request_id: str | None) -> tuple[InferRequest, ResponseDecoder]:
        parameters = request.parameters or Parameters()
        if parameters.api_token is None and self._bearer is not None:
            request = dataclasses.replace(
                request, parameters=dataclasses.replace(parameters, api_token=self._bearer)
            )
        encoded = encode_request(request, self.model_name, request_id or new_request_id())
        return encoded, ResponseDecoder(request, encoded.request_id)

    def _administer(self, admin_key: str | None, metrics_url: str | None) -> None:
        """Take the options of everything but requests.

        Raises:
            ValueError: `metrics_url` is no http address.
        """
        self._admin_key = admin_key or os.environ.get("LORAX_ADMIN_KEY") or None
        self.metrics_url = metrics_address(parse_base_url(self.base_url)[0], metrics_url)

    def _encode_control(self, command: str, arguments: Mapping[str, Any]) -> InferRequest:
        if self._admin_key is not None and command.startswith(_GUARDED_COMMANDS):
            arguments = {**arguments, "admin_key": self._admin_key}
        return encode_control(command, arguments, ENGINE_MODEL, new_request_id())

    def _limits(self, timeout: float | None, total_timeout: float | None) -> Limits:
        check_timeout("timeout", timeout)
        check_timeout("total_timeout", total_timeout)
        return Limits(timeout or self.timeout, total_timeout or self.total_timeout)

    @property
    def _cancels_by_control(self) -> bool:
        # Triton tells no running member of an ensemble that its client has gone.
        return self.model_name != ENGINE_MODEL


def new_request_id() -> str:
    """A request id that no other client has."""
    return str(uuid.uuid4())
