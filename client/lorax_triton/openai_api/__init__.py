"""OpenAI's HTTP API over a lorax-triton server: the protocol alone, without a web framework.

    answer = await handle("POST", "/v1/chat/completions", headers, body, ClientBackend(client))

An HTTP server mounts `handle`; `lorax_triton.OpenAI` runs it in the caller's process.
"""

from lorax_triton.openai_api.answer import Answer
from lorax_triton.openai_api.backend import Backend, Call, Piece
from lorax_triton.openai_api.client_backend import ClientBackend
from lorax_triton.openai_api.routes import ROUTES, handle

__all__ = ["ROUTES", "Answer", "Backend", "Call", "ClientBackend", "Piece", "handle"]
