"""Which route answers what."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import unquote

from lorax_triton.errors import LoraxError
from lorax_triton.openai_api.answer import Answer, json_answer
from lorax_triton.openai_api.backend import Backend
from lorax_triton.openai_api.chat import answer_chat
from lorax_triton.openai_api.completions import answer_completion
from lorax_triton.openai_api.errors import ApiError, from_lorax, internal_error
from lorax_triton.openai_api.fields import Fields, parse_body
from lorax_triton.openai_api.models import get_model, list_models

_logger = logging.getLogger("lorax_triton")

# Methods and paths that `handle` answers, for servers that route by them; a model's id may hold slashes.
ROUTES = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model:path}"),
)
_MODELS = "/v1/models"
_Post = Callable[[Fields, Mapping[str, str], Backend, str], Awaitable[Answer]]


async def handle(method: str, path: str, headers: Mapping[str, str], body: bytes, backend: Backend) -> Answer:
    """Answer one request to OpenAI's API.

    Args:
        method: HTTP method.
        path: path of the URL, percent-encoded or not, without its query.
        headers: by name; the token of `authorization` is passed on for private adapters, so leave it out if it was
            meant for the web server.
        body: the JSON body; empty for GET.
        backend: the server that generates.

    Every failure is an answer with OpenAI's error object; nothing but cancellation is raised.
    """
    try:
        answer = await _route(method.upper(), path, headers, body, backend)
    except ApiError as error:
        answer = (await _with_served_model(error, backend)).answer()
    except LoraxError as error:
        answer = (await _with_served_model(from_lorax(error), backend)).answer()
    except RecursionError:
        answer = ApiError("The body of your request is nested too deeply.").answer()
    except Exception as error:
        _logger.exception("%s %s failed", method, path)
        answer = internal_error(error).answer()
    if not any(name.lower() == "x-request-id" for name in headers):  # else whoever gave it repeats it
        answer.headers["x-request-id"] = f"req_{uuid.uuid4().hex}"
    return answer


async def _with_served_model(error: ApiError, backend: Backend) -> ApiError:
    """Tell those who asked for a model that is not there which one is: most have another server's in mind."""
    if error.code == "model_not_found":
        with contextlib.suppress(LoraxError):
            base = (await backend.info()).get("model_id")
            error.message += f" (the served model is '{base}'; other names are those of adapters)"
    return error


async def _route(method: str, path: str, headers: Mapping[str, str], body: bytes, backend: Backend) -> Answer:
    post = _POSTS.get(path)
    if post is not None and method == "POST":
        return await post(Fields(parse_body(body)), headers, backend, _fingerprint())
    if path == _MODELS and method == "GET":
        return json_answer(await list_models(backend))
    if path.startswith(_MODELS + "/") and method == "GET":
        return json_answer(await get_model(unquote(path[len(_MODELS) + 1 :]), backend))
    if post is not None or path == _MODELS or path.startswith(_MODELS + "/"):
        raise ApiError(f"Not allowed to {method} on {path}.", code="method_not_supported", status=405)
    raise ApiError(f"Unknown request URL: {method} {path}.", code="unknown_url", status=404)


async def _refuse_embeddings(
    fields: Fields, headers: Mapping[str, str], backend: Backend, fingerprint: str
) -> Answer:
    """The server generates text; it has no embedding model."""
    fields.required_text("model")
    base = (await backend.info()).get("model_id")
    raise ApiError(
        f"The served model '{base}' generates text and makes no embeddings; serve an embedding model for that.",
        "model",
        "unsupported_model",
    )


_POSTS: dict[str, _Post] = {
    "/v1/chat/completions": answer_chat,
    "/v1/completions": answer_completion,
    "/v1/embeddings": _refuse_embeddings,
}


def _fingerprint() -> str:
    """This server's build, as `system_fingerprint` shows it."""
    try:
        return f"{version('lorax-triton')}-native"
    except PackageNotFoundError:  # imported out of a folder that was never installed
        return "unknown-native"
