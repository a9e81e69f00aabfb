"""Who may do what: bearer keys of users and administrators, and the hub token that travels beside them."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.requests import Request

from lorax_backend.gateway.config import GatewayConfig
from lorax_backend.gateway.errors import HttpError

HUB_TOKEN_HEADER = "x-hub-token"


def bearer(request: Request) -> str | None:
    """The token of `Authorization: Bearer X`, or None."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _among(key: str, keys: Iterable[str]) -> bool:
    # Every key is compared, so that the time taken tells nothing about them.
    matches = [hmac.compare_digest(key.encode(), known.encode()) for known in keys]
    return any(matches)


def require_user(request: Request, config: GatewayConfig) -> None:
    """Refuse callers without a key, if keys are configured.

    Raises:
        HttpError: 401.
    """
    if not config.api_keys:
        return
    key = bearer(request)
    if key is None or not _among(key, (*config.api_keys, *config.admin_api_keys)):
        raise HttpError(401, "unauthorized", "Authorization: send `Bearer KEY` with a key of this gateway")


def require_admin(request: Request, config: GatewayConfig) -> str | None:
    """Refuse callers who are no administrators; the key to present to the backend.

    Without administrators' keys here the backend decides by what the caller presented.

    Raises:
        HttpError: 401 without a known key, 403 with a user's.
    """
    key = bearer(request)
    if config.admin_api_keys:
        if key is None or not _among(key, (*config.admin_api_keys, *config.api_keys)):
            raise HttpError(
                401, "unauthorized", "Authorization: send `Bearer KEY` with an administrator's key"
            )
        if not _among(key, config.admin_api_keys):
            raise HttpError(
                403, "forbidden", "Authorization: this needs an administrator's key, not a user's"
            )
        return config.backend_admin_key or key
    require_user(request, config)
    if config.api_keys:
        raise HttpError(403, "forbidden", "this gateway has no administrator's key; start it with one")
    return key


def admin_key(request: Request, config: GatewayConfig) -> str | None:
    """The key to present to the backend for what administrators are told more of; None for other callers."""
    key = bearer(request)
    if key is None or not config.admin_api_keys:
        return key
    return (config.backend_admin_key or key) if _among(key, config.admin_api_keys) else None


def hub_token(request: Request, config: GatewayConfig) -> str | None:
    """The token for private adapters: its own header, else the bearer token if that is not a key of the gateway."""
    own = request.headers.get(HUB_TOKEN_HEADER, "").strip()
    if own:
        return own
    return None if config.api_keys else bearer(request)
