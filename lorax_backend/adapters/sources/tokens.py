"""Digests of tokens: tell equal tokens, and nothing else. Standard library only."""

from __future__ import annotations

import hashlib
import secrets

_KEY = secrets.token_bytes(32)  # of this process: a digest that leaks cannot be tried against guessed tokens


def token_digest(token: str | None) -> str:
    """A keyed digest; '' for no token."""
    return hashlib.blake2b(token.encode(), key=_KEY, digest_size=20).hexdigest() if token else ""
