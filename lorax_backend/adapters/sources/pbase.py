"""Adapters named in a Predibase account: a gateway says where in S3 they lie."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from lorax_backend.adapters.sources.base import FetchedAdapter
from lorax_backend.adapters.sources.retry import Retry
from lorax_backend.adapters.sources.s3 import S3Source
from lorax_backend.adapters.sources.tokens import token_digest
from lorax_backend.errors import AdapterDownloadError, AdapterError, AdapterNotFoundError, ValidationError
from lorax_backend.types import AdapterRef

_ENDPOINT = "https://api.predibase.com"
_TIMEOUT_S = 10.0
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_NOT_READY = ("pending", "queued", "stopping")


class PbaseSource:
    """`adapter_source=pbase`: `name/version`, or `name` for the latest model of the older interface.

    The gateway (PREDIBASE_GATEWAY_ENDPOINT) is asked with the request's token, or with PREDIBASE_API_TOKEN if the
    request has none, at every fetch and whenever a token's right is checked; the files then come from S3.
    """

    name = "pbase"
    remote = True

    def __init__(
        self,
        s3: S3Source,
        deadline_s: float = 120.0,
        attempts: int = 5,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._s3 = s3
        self._retry = Retry(attempts, deadline_s, sleep)

    def canonical(self, ref: AdapterRef) -> AdapterRef:
        parts = ref.id.strip("/").split("/")
        if len(parts) > 2 or not all(parts):
            raise ValidationError(f"adapter_id: {ref.id!r} is not name/version")
        return AdapterRef(self.name, "/".join(parts), ref.revision or None)

    def credential(self, token: str | None) -> str:
        return token_digest(_effective_token(token))

    def fetch(self, ref: AdapterRef, token: str | None) -> FetchedAdapter:
        ref = self.canonical(ref)
        path = self._locate(ref, token)
        try:
            fetched = self._s3.fetch(AdapterRef(self._s3.name, path, ref.revision), None)
        except AdapterNotFoundError:
            raise _not_found(ref) from None  # where it lies is the account's business
        return FetchedAdapter(fetched.folder, fetched.revision, False, fetched.cached, fetched.lease)

    def authorize(self, ref: AdapterRef, token: str | None) -> bool:
        self._locate(self.canonical(ref), token)
        return False

    def _locate(self, ref: AdapterRef, token: str | None) -> str:
        """The S3 address of an adapter that the token may use."""
        used = _effective_token(token)
        if not used:
            raise _not_found(ref)
        name, _, version = ref.id.partition("/")
        started = time.monotonic()
        if version:
            answer = self._get(f"/v2/repos/{quote(name)}/version/{quote(version)}", used, ref, started)
            if answer is not None:
                status = str(answer.get("status", "")).lower()
                if status in _NOT_READY or not answer.get("adapterPath"):
                    raise AdapterNotFoundError(f"{ref} is not available yet ({status or 'no files'})")
                return str(answer["adapterPath"])
        query = f"?version={quote(version)}" if version else ""
        answer = self._get(f"/v1/models/version/name/{quote(name)}{query}", used, ref, started)
        if answer is None or not answer.get("uuid") or not answer.get("bestRunID"):
            raise _not_found(ref)
        return f"{answer['uuid']}/{answer['bestRunID']}/artifacts/model/model_weights"

    def _get(self, path: str, token: str, ref: AdapterRef, started: float) -> dict[str, Any] | None:
        """The gateway's answer; None if it knows of no such thing, or will not say."""
        endpoint = os.environ.get("PREDIBASE_GATEWAY_ENDPOINT") or _ENDPOINT
        request = urllib.request.Request(
            endpoint.rstrip("/") + path, headers={"Authorization": f"Bearer {token}"}
        )

        def work() -> dict[str, Any] | None:
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                    found = json.load(answer)
                    return found if isinstance(found, dict) else None
            except urllib.error.HTTPError as error:
                with error:
                    if error.code in (400, 401, 403, 404):
                        return None
                raise

        def tell(error: Exception) -> AdapterError:
            reason = (
                f"answered {error.code}" if isinstance(error, urllib.error.HTTPError) else "did not answer"
            )
            return AdapterDownloadError(f"{ref}: the gateway {reason}; trying again later may help")

        return self._retry.call(work, started, _is_transient, tell)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _TRANSIENT_STATUS
    return isinstance(error, OSError | ValueError)


def _not_found(ref: AdapterRef) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"{ref} does not exist, or the api_token may not read it")


def _effective_token(token: str | None) -> str | None:
    return token or os.environ.get("PREDIBASE_API_TOKEN") or None
