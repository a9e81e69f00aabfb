"""Which route answers what."""

from __future__ import annotations

from collections.abc import Mapping

from lorax_triton.openai_api.answer import Answer
from lorax_triton.openai_api.backend import Backend
from lorax_triton.openai_api.errors import ApiError

# Methods and paths that `handle` answers, for servers that route by them; a model's id may hold slashes.
ROUTES = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model:path}"),
)


async def handle(method: str, path: str, headers: Mapping[str, str], body: bytes, backend: Backend) -> Answer:
    """Answer one request to OpenAI's API.

    Args:
        method: HTTP method.
        path: path of the URL, still percent-encoded or not, without its query.
        headers: by name; `authorization` is passed on as the token for private adapters, so leave it out if it was
            meant for the web server.
        body: the JSON body; empty for GET.
        backend: the server that generates.

    Every failure is an answer with OpenAI's error object; nothing but cancellation is raised.
    """
    return ApiError(f"Unknown request URL: {method} {path}.", code="unknown_url", status=404).answer()
